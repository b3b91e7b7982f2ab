"""Semantic segmentation with a linear head on frozen regions: what the region task should improve.

The head is a logistic regression on the region features. A region's class is the most frequent one of its pixels in the
mask. Lambda is chosen on a fifth of the training images, by the mIoU of their regions: the share of correct regions would
choose a head that knows the ground only, where most regions are ground. For a test image the logits are interpolated to the pixels, and
the figure is the mean, over the classes, of intersection over union of all test images together (mIoU).

Region retrieval needs no head: the share of the regions of the test images whose nearest region of the training images, by
cosine similarity, has the same class (R@1).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from esvit_core.config import Config
from esvit_core.data.loading.augment import Normalize
from esvit_core.evaluation.imported_features import NO_NETWORK, has_network
from esvit_core.evaluation.knn import nearest
from esvit_core.evaluation.logistic_regression import LogisticProblem
from esvit_core.evaluation.masked_images import IGNORED, MaskedImage, read_masked_images
from esvit_core.evaluation.metric_difference import mean_difference
from esvit_core.evaluation.plots import segmentation_figure
from esvit_core.evaluation.results import MODELS, Result, left_out, measure_once, measured
from esvit_core.evaluation.significance import ALPHA, Difference
from esvit_core.evaluation.transfer import search_lambda
from esvit_core.monitoring.progress_line import ProgressLine
from esvit_core.runs.gpus import computing_device
from esvit_core.storage import ObjectStore, join_uri

NAME, RETRIEVAL = "segmentation", "segmentation/retrieval"
IMAGES_SHOWN = 4
_BANK_REGIONS = 100_000
_VALIDATION_SHARE = 0.2
_RESAMPLES, _SEED = 10_000, 0


@dataclass(frozen=True)
class SegmentationOutcome:
    """Outcome of a linear head.

    Attributes:
        intersections, unions: pixels of each test image and class, (M, C).
        strength: chosen lambda.
        retrieved: share of the regions of each test image whose nearest training region has their class, (M,); NaN for an
            image without a known region.
        maps: predicted classes of the first test images, (S, S) uint8 each.
    """

    intersections: np.ndarray
    unions: np.ndarray
    strength: float
    retrieved: np.ndarray = field(default_factory=lambda: np.zeros(0))
    maps: tuple[np.ndarray, ...] = ()

    @property
    def figure(self) -> float:
        """mIoU, percent."""
        return 100 * mean_iou(self.intersections, self.unions)


def mean_iou(intersections: np.ndarray, unions: np.ndarray) -> float:
    """Return the mean over the classes that occur of intersection over union, of images (M, C) together."""
    total = unions.sum(0)
    return float((intersections.sum(0)[total > 0] / total[total > 0]).mean())


def region_iou(predicted: np.ndarray, truth: np.ndarray, classes: int) -> float:
    """Return the mean intersection over union of regions, over the classes that occur.

    Args:
        predicted, truth: class of each region, (N,).
        classes: number of classes.
    """
    overlap, union = _counts(predicted, truth, classes)
    return mean_iou(overlap[None], union[None])


def fit_head(
    train: Sequence[MaskedImage], test: Sequence[MaskedImage], backbone: nn.Module, config: Config, label: str
) -> SegmentationOutcome:
    """Fit the linear head to the training images, and measure it on the test images.

    Args:
        train, test: images with masks of side S.
        backbone: in eval mode.
        config: normalization and batch size.
        label: first word of the progress lines.
    """
    classes = 1 + max(int(item.mask[item.mask != IGNORED].max(initial=0)) for item in (*train, *test))
    regions = np.concatenate(list(_regions(train, backbone, config, label)))  # (N, h * w, D)
    side = math.isqrt(regions.shape[1])
    truth = np.stack([region_classes(item.mask, side, classes) for item in train])  # (N, h * w)
    known = truth >= 0
    image = np.broadcast_to(np.arange(len(train))[:, None], truth.shape)[known]
    present, targets = np.unique(truth[known], return_inverse=True)
    problem = LogisticProblem(regions[known], targets)
    held_out = image % round(1 / _VALIDATION_SHARE) == 0
    strength = 1.0
    if held_out.any() and len(np.unique(targets[~held_out])) == len(present):

        def score(strengths: list[float]) -> list[float]:
            used = np.repeat(~held_out[:, None], len(strengths), 1)
            fits = problem.fit(np.array(strengths), used, tolerance=1e-4)
            answers = [problem.classes_of(problem.decisions(fits, i))[held_out] for i in range(len(strengths))]
            return [region_iou(answer, targets[held_out], len(present)) for answer in answers]

        strength, _ = search_lambda(score)
    weights, biases = problem.coefficients(problem.fit(np.array([strength]), tolerance=1e-5), 0)
    bank = _Bank(regions[known], present[targets], config.seed)
    counts, retrieved = [], []
    shown: list[np.ndarray] = []
    for part, items in zip(_regions(test, backbone, config, label), _batches(test, config), strict=True):
        logits = part.astype(np.float64) @ weights + biases  # (B, h * w, C)
        if logits.shape[2] == 1:
            logits = np.concatenate([np.zeros_like(logits), logits], 2)
        maps = torch.as_tensor(logits).transpose(1, 2).unflatten(2, (side, side))
        for item, of_image, features in zip(items, maps, part, strict=True):
            large = F.interpolate(of_image[None], item.mask.shape, mode="bilinear", align_corners=False)
            predicted = present[large[0].argmax(0).numpy()]
            counts.append(_overlap(predicted, item.mask, classes))
            retrieved.append(bank.share_found(features, region_classes(item.mask, side, classes)))
            if len(shown) < IMAGES_SHOWN:
                shown.append(predicted.astype(np.uint8))
    overlap, union = (np.stack([count[i] for count in counts]) for i in range(2))
    return SegmentationOutcome(overlap, union, strength, np.array(retrieved), tuple(shown))


class _Bank:
    """The regions of the training images, by which regions of test images are found."""

    def __init__(self, regions: np.ndarray, classes: np.ndarray, seed: int) -> None:
        if len(regions) > _BANK_REGIONS:  # the same ones for every backbone
            chosen = np.random.default_rng(seed).choice(len(regions), _BANK_REGIONS, replace=False)
            regions, classes = regions[chosen], classes[chosen]
        self._device = computing_device()
        self._regions = F.normalize(torch.as_tensor(regions).float(), dim=1).to(self._device)
        self._classes = classes

    def share_found(self, regions: np.ndarray, truth: np.ndarray) -> float:
        """Return the share of regions (h * w, D) whose nearest region has their class; those of class -1 do not count."""
        known = truth >= 0
        if not known.any():
            return float("nan")
        queries = F.normalize(torch.as_tensor(regions[known]).float(), dim=1).to(self._device)
        found = nearest(queries, self._regions, 1)[1][:, 0].cpu().numpy()
        return float((self._classes[found] == truth[known]).mean())


def region_classes(mask: np.ndarray, side: int, classes: int) -> np.ndarray:
    """Return the most frequent class of each region's pixels, row by row, (side * side,); -1 if most are ignored."""
    edges = np.linspace(0, len(mask), side + 1).round().astype(int)
    found = []
    for top, bottom in itertools.pairwise(edges):
        for left, right in itertools.pairwise(edges):
            counts = np.bincount(mask[top:bottom, left:right].ravel(), minlength=IGNORED + 1)
            best = int(counts[:classes].argmax())
            found.append(best if counts[best] >= counts[IGNORED] and counts[best] else -1)
    return np.array(found)


def miou_difference(first: SegmentationOutcome, second: SegmentationOutcome) -> Difference:
    """Compare two heads on the same test images: paired bootstrap over the images, and a test that swaps the heads.

    The test exchanges the two outcomes of each image at random; its p-value is the share of exchanges with a difference at
    least as large as the observed one.
    """
    rng = np.random.default_rng(_SEED)
    images = len(first.unions)
    parts = [(first.intersections, first.unions), (second.intersections, second.unions)]

    def share(weights: np.ndarray, part: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        inside, union = (weights @ each for each in part)  # (R, C)
        return np.nanmean(np.where(union > 0, inside / np.maximum(union, 1), np.nan), 1)

    observed = mean_iou(*parts[0]) - mean_iou(*parts[1])
    drawn = rng.multinomial(images, np.full(images, 1 / images), size=_RESAMPLES).astype(np.float64)
    low, high = np.quantile(share(drawn, parts[0]) - share(drawn, parts[1]), [ALPHA / 2, 1 - ALPHA / 2])
    swapped = (rng.random((_RESAMPLES, images)) < 0.5).astype(np.float64)
    mixed = [
        (np.concatenate([one[0], other[0]]), np.concatenate([one[1], other[1]])) for one, other in (parts, parts[::-1])
    ]
    weights = np.concatenate([1 - swapped, swapped], 1)
    exchanged = np.abs(share(weights, mixed[0]) - share(weights, mixed[1]))
    p = (1 + int((exchanged >= abs(observed) - 1e-12).sum())) / (_RESAMPLES + 1)
    differ = int((first.intersections != second.intersections).any(1).sum())
    return Difference(100 * observed, 100 * float(low), 100 * float(high), p, images, differ, None)


def evaluate_segmentation(run_uri: str, store: ObjectStore, config: Config) -> Result:
    """Evaluate both backbones on ``evaluation.segmentation``; written once to ``evaluation/segmentation.json``."""

    def measure() -> Result:
        from esvit_core.evaluation.features import load_model

        source = config.evaluation.segmentation
        if source is None:
            return left_out(NAME, "evaluation.segmentation is not set")
        if not has_network(store, run_uri):
            return left_out(NAME, NO_NETWORK)
        train, test = read_masked_images(source, store, config.evaluation.crop)
        networks = {model: load_model(run_uri, model, store) for model in MODELS}
        result, outcomes = measure_segmentation(train, test, networks, config)
        if outcomes:
            maps = {model: outcomes[model].maps for model in ("baseline", "trained")}
            store.put_bytes(overlays_uri(run_uri), segmentation_figure(test, maps), content_type="image/png")
        return result

    return measure_once(store, run_uri, NAME, measure)


def overlays_uri(run_uri: str) -> str:
    """Return the address of the figure of test images with their masks and the predictions of both backbones."""
    return join_uri(run_uri, "evaluation", "segmentation.png")


def measure_segmentation(
    train: Sequence[MaskedImage], test: Sequence[MaskedImage], networks: Mapping[str, nn.Module], config: Config
) -> tuple[Result, dict[str, SegmentationOutcome]]:
    """Measure every network on the same images; returns the result and the outcome of each."""
    if not train or not test:
        reason = "there are too few images with masks; at least one to fit and one to measure are needed"
        return left_out(NAME, reason), {}
    outcomes = {
        model: fit_head(train, test, network, config, f"segmentation with the {model} backbone")
        for model, network in networks.items()
    }
    result: dict[str, Any] = measured(
        NAME,
        {
            model: {NAME: outcome.figure, RETRIEVAL: 100 * float(np.nanmean(outcome.retrieved))}
            for model, outcome in outcomes.items()
        },
        [],
        samples={"train": len(train), "val": len(test)},
    )
    result["lambda"] = {model: outcome.strength for model, outcome in outcomes.items()}
    if set(outcomes) >= set(MODELS):
        trained, baseline = (outcomes[model] for model in MODELS)
        known = np.isfinite(trained.retrieved)
        result["differences"] = {
            NAME: miou_difference(trained, baseline).as_json(),
            RETRIEVAL: mean_difference(trained.retrieved[known], baseline.retrieved[known]).as_json(),
        }
    return result, outcomes


def _batches(items: Sequence[MaskedImage], config: Config) -> Iterator[Sequence[MaskedImage]]:
    size = config.evaluation.batch_size
    return (items[start : start + size] for start in range(0, len(items), size))


def _regions(items: Sequence[MaskedImage], backbone: nn.Module, config: Config, label: str) -> Iterator[np.ndarray]:
    """Yield the region features of each batch, (B, h * w, D) float32."""
    device = computing_device()
    backbone.to(device)
    normalize = Normalize(config.augment.mean, config.augment.std)
    with ProgressLine(len(items), label=label) as progress:
        for part in _batches(items, config):
            batch = torch.stack([normalize(torch.from_numpy(i.pixels.copy()).permute(2, 0, 1).float()) for i in part])
            with torch.inference_mode():
                regions = backbone.views_and_regions(batch.to(device))[1]  # type: ignore[operator]
            progress.update(len(part))
            yield regions.float().cpu().numpy()


def _overlap(predicted: np.ndarray, mask: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return intersection and union of each class in pixels, (C,) and (C,); ignored pixels do not count."""
    known = mask != IGNORED
    return _counts(predicted[known], mask[known], classes)


def _counts(predicted: np.ndarray, truth: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return intersection and union of each class, (C,) and (C,)."""
    inside = np.bincount(truth[predicted == truth], minlength=classes)
    both = np.bincount(truth, minlength=classes) + np.bincount(predicted, minlength=classes)
    return inside, both - inside
