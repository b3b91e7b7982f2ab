"""Linear probe: a linear classifier on frozen features (EsViT, section 4; ``eval_linear.py`` of the published code).

There are two protocols (``evaluation.linear.protocol``). ``grid`` trains on features of the evaluation transform, computed
once; the feature and the learning rate are chosen on validation images, see :mod:`esvit_core.evaluation.linear_grid`.
``published`` is that of the paper: every epoch computes the features of a new random crop and flip of every image, and the
learning rate is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from esvit_core.config import Config, LinearConfig
from esvit_core.evaluation.imported_features import NO_NETWORK, has_network
from esvit_core.evaluation.labels import Task, run_task
from esvit_core.evaluation.linear_grid import Choice, choose_probe, has_class_token, probe_features, threads_for
from esvit_core.evaluation.outcomes import keep_outcomes, pack_outcomes
from esvit_core.evaluation.results import Result, left_out, measure_once, measured
from esvit_core.monitoring.progress_line import ProgressLine
from esvit_core.runs.gpus import computing_device
from esvit_core.storage import ObjectStore

_REFERENCE_BATCH = 256  # batch size that the configured learning rate refers to
_CONFUSION_CLASSES = 100  # maximum number of classes of a confusion matrix


@dataclass(frozen=True)
class ProbeOutcome:
    """Outcome of a probe.

    Attributes:
        last: accuracy after the last epoch, percent.
        best: accuracy of the best epoch, chosen on the same test images, percent; the published code prints it.
        best_epoch: the best epoch, from 1.
        top5: top-5 accuracy after the last epoch, percent.
        predictions: class of each test image after the last epoch, (M,).
    """

    last: float
    best: float
    best_epoch: int
    top5: float
    predictions: np.ndarray


def linear_probe(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    classes: int,
    config: LinearConfig,
    seed: int = 0,
    label: str = "linear probe",
    features_of_epoch: Callable[[int], np.ndarray] | None = None,
) -> ProbeOutcome:
    """Train a linear classifier with SGD (momentum 0.9, no weight decay, cosine schedule to 0 by epoch).

    The learning rate is ``config.lr * batch / 256``; features are not standardized.

    Args:
        train, test: features, (N, D) and (M, D) float32.
        train_labels, test_labels: classes from 0, (N,) and (M,).
        classes: number of classes C.
        config: batch size, learning rate and epochs.
        seed: seed of the weights (normal, 0.01) and of the order of the images; there is no other randomness.
        label: first word of the progress lines.
        features_of_epoch: returns the training features of an epoch, from 0; None: they are ``train`` in all epochs.
    """
    device = computing_device()
    generator = torch.Generator().manual_seed(seed)
    probe = nn.Linear(train.shape[1], classes)
    nn.init.normal_(probe.weight, std=0.01, generator=generator)
    nn.init.zeros_(probe.bias)
    probe.to(device)
    x, y = torch.as_tensor(train), torch.as_tensor(train_labels).to(device)
    x = x if features_of_epoch else x.to(device)
    x_test, truth = torch.as_tensor(test).to(device), torch.as_tensor(test_labels).to(device)
    batch = min(config.batch_size, len(x))
    optimizer = torch.optim.SGD(probe.parameters(), lr=config.lr * batch / _REFERENCE_BATCH, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs, eta_min=0)
    best, best_epoch, ranking = -1.0, 0, torch.empty(0)
    with (
        threads_for(batch * train.shape[1] * classes),
        ProgressLine(config.epochs, unit="epochs", label=label) as progress,
    ):
        for epoch in range(1, config.epochs + 1):
            if features_of_epoch is not None:
                x = torch.as_tensor(features_of_epoch(epoch - 1)).to(device)
            for chosen in torch.randperm(len(x), generator=generator).to(device).split(batch):
                loss = F.cross_entropy(probe(x[chosen]), y[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
            with torch.no_grad():
                ranking = probe(x_test).topk(min(5, classes)).indices  # (M, 5)
            last = _percent(ranking[:, 0] == truth)
            if last > best:
                best, best_epoch = last, epoch
            progress.update(1, loss=loss.item(), accuracy=last)
    top5 = _percent((ranking == truth[:, None]).any(1))
    return ProbeOutcome(last, best, best_epoch, top5, ranking[:, 0].cpu().numpy())


def evaluate_linear(run_uri: str, store: ObjectStore, config: Config) -> Result:
    """Evaluate a linear probe of both backbones.

    The result is written once to ``evaluation/linear.json``: ``linear`` is the accuracy after the last epoch, which does
    not depend on the test images. With the protocol ``grid``, ``chosen`` and ``validation`` describe the choice of feature
    and learning rate; with ``published``, ``linear/best`` is the accuracy of the best epoch, the figure of the published
    code. ``confusion`` counts the predictions of the trained backbone (rows: true class, columns: predicted).
    """

    def measure() -> Result:
        task = run_task(run_uri, store, blocks=True)
        if isinstance(task, str) or config.evaluation.linear.protocol == "grid":
            return measure_linear(task, config)
        if not has_network(store, run_uri):
            return left_out("linear", f"{NO_NETWORK}; use evaluation.linear.protocol=grid")
        from esvit_core.evaluation.features import load_model

        networks = {model: load_model(run_uri, model, store) for model in task.splits}
        return measure_linear(task, config, augmented_features(networks, run_uri, store, config))

    return measure_once(store, run_uri, "linear", measure)


def augmented_features(
    networks: Mapping[str, nn.Module], run_uri: str, store: ObjectStore, config: Config
) -> dict[str, Callable[[int], np.ndarray]]:
    """Return for each network a function that computes the features of an epoch of the published protocol.

    The features are those of the labeled training images of the run, each after a random crop and flip, which depend on
    the seed, the epoch and the image.
    """
    from esvit_core.evaluation.features import compute_features, split_datasets
    from esvit_core.evaluation.random_crops import RandomCrops
    from esvit_core.storage import join_uri

    dataset = split_datasets(store, join_uri(run_uri, "data"))["train"]
    labeled = np.flatnonzero(dataset.labels >= 0)

    def features_of(model: str, network: nn.Module) -> Callable[[int], np.ndarray]:
        def of_epoch(epoch: int) -> np.ndarray:
            crops = RandomCrops(dataset, labeled, config, epoch)
            return compute_features(
                network,
                crops,
                crops.normalize,
                config.evaluation.batch_size,
                config.evaluation.linear.last_blocks,
                precision="bfloat16" if config.training.precision == "bfloat16" else "float32",
                label=f"linear probe: features of the {model} backbone, epoch {epoch + 1}",
            ).blocks

        return of_epoch

    return {model: features_of(model, network) for model, network in networks.items()}


def confusion_matrix(truth: np.ndarray, predicted: np.ndarray, classes: int) -> list[list[int]]:
    """Count the predictions (columns) of each true class (rows), (C, C)."""
    return np.bincount(truth * classes + predicted, minlength=classes**2).reshape(classes, classes).tolist()


def measure_linear(
    task: Task | str, config: Config, augmented: Mapping[str, Callable[[int], np.ndarray]] | None = None
) -> Result:
    """Measure the task for every model in it.

    Args:
        task: the task, or the reason why there is none.
        config: configuration of the run.
        augmented: of :func:`augmented_features`, for the protocol ``published``; unused by ``grid``.
    """
    if isinstance(task, str):
        return left_out("linear", task)
    settings, classes = config.evaluation.linear, len(task.classes)
    outcomes: dict[str, ProbeOutcome] = {}
    choices: dict[str, Choice] = {}
    notes = list(task.notes)
    for model, (train, val) in task.splits.items():
        label, of_model = f"linear probe of the {model} backbone", settings
        x, x_val = (part.blocks if part.blocks.shape[1] else part.view for part in (train, val))
        if settings.protocol == "grid":
            class_token = has_class_token(train.view, train.blocks)
            features = probe_features(train.view, train.blocks, class_token)
            choice = choose_probe(
                features, train.labels, classes, settings.epochs, settings.batch_size, config.seed, f"{label}, grid"
            )
            if choice is not None:
                choices[model] = choice
                of_model = settings.model_copy(update={"lr": choice.rate})
                x, x_val = features[choice.feature], probe_features(val.view, val.blocks, class_token)[choice.feature]
        of_epoch = augmented[model] if augmented and settings.protocol == "published" else None
        outcomes[model] = linear_probe(
            x, train.labels, x_val, val.labels, classes, of_model, config.seed, label, of_epoch
        )
    if settings.protocol == "grid" and not choices:
        notes.append(
            f"every class has a single training image, so the learning rate was not chosen and is {settings.lr:g}"
        )
    more: dict[str, Any] = {"protocol": settings.protocol}
    if choices:
        more["chosen"] = {model: {"feature": c.feature, "lr": c.rate} for model, c in choices.items()}
        more["validation"] = {
            model: {name: {f"{rate:g}": round(v, 4) for rate, v in of.items()} for name, of in c.validation.items()}
            for model, c in choices.items()
        }
    if classes <= _CONFUSION_CLASSES and "trained" in outcomes:
        truth = task.splits["trained"][1].labels
        more["confusion"] = confusion_matrix(truth, outcomes["trained"].predictions, classes)
    published = settings.protocol == "published"
    if published:
        more["best_epoch"] = {model: o.best_epoch for model, o in outcomes.items()}
    result = measured(
        "linear",
        {model: {"linear": o.last} | ({"linear/best": o.best} if published else {}) for model, o in outcomes.items()},
        task.classes,
        notes=notes,
        top5={model: {"linear": round(o.top5, 4)} for model, o in outcomes.items()},
        **more,
    )
    # The best epoch was chosen on the test images, so a test of its figure would mean nothing.
    correct = {model: {"linear": o.predictions == task.splits[model][1].labels} for model, o in outcomes.items()}
    return keep_outcomes(result, pack_outcomes(task.held_out, correct))


def _percent(correct: torch.Tensor) -> float:
    return int(correct.sum()) * 100 / len(correct)
