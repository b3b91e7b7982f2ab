"""Choose the feature and the learning rate of a linear probe on validation images (as DINOv2 does).

Every combination of 13 learning rates and of the features of the last block or of the last blocks is trained on one pass of
frozen features. All learning rates, and all validation folds of a small set, are trained at once: a step is two matrix
products for all of them. The test images have no part in the choice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from esvit_core.evaluation.validation import folds_to_use, validation_folds
from esvit_core.monitoring.progress_line import ProgressLine
from esvit_core.runs.gpus import computing_device

#: Learning rates per 256 images of the batch: those of DINOv2's linear evaluation.
LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
_REFERENCE_BATCH = 256
_MOMENTUM = 0.9
_MANY_PRODUCTS = 1 << 28  # of a step: some 10 ms on one core
_SAME = 1e-5  # relative difference of two features that are the same up to rounding


@dataclass(frozen=True)
class Choice:
    """A chosen combination.

    Attributes:
        feature: name of the feature, a key of :func:`probe_features`.
        rate: learning rate per 256 images of the batch.
        validation: accuracy on the validation images in percent, by feature and learning rate; empty if there are too few
            images to validate.
    """

    feature: str
    rate: float
    validation: dict[str, dict[float, float]]


def probe_features(view: np.ndarray, blocks: np.ndarray, class_token: bool) -> dict[str, np.ndarray]:
    """Return the features that a probe is tried on, the smallest first.

    They are that of the last block and that of the last blocks, each as the average of the regions. A network with a class
    token has it in both, and each with the average of the last block's regions. Features of a file are tried as they are.

    Args:
        view: view features, (N, D).
        blocks: linear-probe features, (N, D'); of a file, (N, 0).
        class_token: see :func:`has_class_token`.
    """
    if not blocks.shape[1]:
        return {"features": view}
    width = view.shape[1]
    if not class_token:
        return {"last block": view, "last blocks": blocks}
    average = blocks[:, -width:]
    return {
        "last block": view,
        "last block and average": np.concatenate([view, average], 1),
        "last blocks": blocks[:, :-width],
        "last blocks and average": blocks,
    }


def has_class_token(view: np.ndarray, blocks: np.ndarray) -> bool:
    """Return whether the features are those of a ViT: its linear-probe feature ends with its class token, which is the view
    feature, and the average of the last block.

    Args:
        view: view features, (N, D).
        blocks: linear-probe features, (N, D').
    """
    width = view.shape[1]
    if blocks.shape[1] < 2 * width or not len(view):
        return False
    token = blocks[:, -2 * width : -width]
    return bool(np.abs(token - view).max() <= _SAME * np.abs(view).max())


def choose_probe(
    features: dict[str, np.ndarray],
    labels: np.ndarray,
    classes: int,
    epochs: int,
    batch_size: int,
    seed: int,
    label: str,
) -> Choice | None:
    """Train every combination without the validation images, and choose the best; None if there are too few images.

    Among equal ones, the first feature and the lowest learning rate are chosen.

    Args:
        features: of :func:`probe_features`.
        labels: classes from 0, (N,).
        classes: number of classes.
        epochs, batch_size: of each training.
        seed: seed of folds, weights and order.
        label: first word of the progress lines.
    """
    folds = folds_to_use(validation_folds(labels, seed))
    if not folds:
        return None
    validation: dict[str, dict[float, float]] = {}
    with ProgressLine(len(features) * epochs, unit="epochs", label=label) as progress:
        for name, values in features.items():
            with threads_for(values.shape[1] * classes * len(LEARNING_RATES) * len(folds) * batch_size):
                predicted = _train(values, labels, classes, folds, epochs, batch_size, seed, progress)  # (R, images)
            truth = np.concatenate([labels[held_out] for held_out in folds])
            scores = (predicted == truth).sum(1) * 100 / len(truth)
            validation[name] = {rate: float(score) for rate, score in zip(LEARNING_RATES, scores, strict=True)}
    best = max(score for scores_of in validation.values() for score in scores_of.values())
    feature, rate = next(
        (name, rate) for name, scores_of in validation.items() for rate, score in scores_of.items() if score == best
    )
    return Choice(feature, rate, validation)


@contextlib.contextmanager
def threads_for(products: int) -> Iterator[None]:
    """Use one thread for steps of so few multiplications that the threads of a busy machine would mostly wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if products < _MANY_PRODUCTS else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train(
    features: np.ndarray,
    labels: np.ndarray,
    classes: int,
    folds: list[np.ndarray],
    epochs: int,
    batch_size: int,
    seed: int,
    progress: ProgressLine,
) -> np.ndarray:
    """Train a probe per learning rate and fold; return the classes of all validation images, fold after fold, (R, M)."""
    device = computing_device()
    generator = torch.Generator().manual_seed(seed)
    rates = torch.tensor(LEARNING_RATES, device=device)
    probes, width = (len(folds), len(rates), classes), features.shape[1]
    start = torch.empty(classes, width).normal_(std=0.01, generator=generator).to(device)  # as for a single probe
    weights = start.T[:, None, None].expand(width, *probes).flatten(1).contiguous()  # (D, F * R * C)
    biases = weights.new_zeros(weights.shape[1])
    weight_speed, bias_speed = torch.zeros_like(weights), torch.zeros_like(biases)
    x, y = torch.as_tensor(features).to(device), torch.as_tensor(labels).to(device)
    used = torch.as_tensor(~np.stack(folds, 1)).to(device).float()  # (N, F)
    batch = min(batch_size, len(x))
    for epoch in range(epochs):
        # The schedule of the probe: cosine to 0, constant within an epoch.
        step = rates * batch / _REFERENCE_BATCH * (1 + np.cos(np.pi * epoch / epochs)) / 2
        sizes = step[None, :, None].expand(probes).flatten()  # (F * R * C,)
        for chosen in torch.randperm(len(x), generator=generator).to(device).split(batch):
            slopes = _slopes(x[chosen] @ weights + biases, y[chosen], used[chosen], probes)
            weight_speed.mul_(_MOMENTUM).addmm_(x[chosen].T, slopes)
            bias_speed.mul_(_MOMENTUM).add_(slopes.sum(0))
            weights.sub_(weight_speed * sizes)
            biases.sub_(bias_speed * sizes)
        progress.update(1)
    predicted = []
    for number, held_out in enumerate(folds):
        part = slice(number * len(rates) * classes, (number + 1) * len(rates) * classes)
        logits = x[torch.as_tensor(held_out).to(device)] @ weights[:, part] + biases[part]
        # Probes that have diverged are wrong about every image.
        logits = logits.unflatten(1, probes[1:])
        found = torch.where(logits.isfinite().all(2), logits.argmax(2), torch.full_like(logits[..., 0], -1).long())
        predicted.append(found.T.cpu().numpy())  # (R, M')
    return np.concatenate(predicted, 1)


def _slopes(logits: Tensor, labels: Tensor, used: Tensor, probes: tuple[int, int, int]) -> Tensor:
    """Return the derivative of each probe's mean cross-entropy by its logits, (B, F * R * C)."""
    shares = logits.unflatten(1, probes).softmax(3)  # (B, F, R, C)
    index = labels[:, None, None, None].expand(-1, *probes[:2], 1)
    shares.scatter_add_(3, index, torch.full_like(shares[..., :1], -1.0))
    share = used / used.sum(0).clamp_min(1)  # (B, F)
    return (shares * share[:, :, None, None]).flatten(1)
