"""Semantic segmentation with a linear head on frozen regions: what the region task should improve.

The head is a logistic regression on the region features. A region's class is the most frequent one of its pixels in the
mask; lambda is chosen on a fifth of the training images. For a test image the logits are interpolated to the pixels, and
the figure is the mean, over the classes, of intersection over union of all test images together (mIoU).
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from esvit_core.config import Config
from esvit_core.data.ingest.sources import open_source
from esvit_core.data.ingest.split import hold_out
from esvit_core.data.loading.augment import Normalize
from esvit_core.errors import UserError
from esvit_core.evaluation.logistic_regression import LogisticProblem
from esvit_core.evaluation.results import MODELS, Result, left_out, measure_once, measured
from esvit_core.evaluation.significance import ALPHA, Difference
from esvit_core.evaluation.transfer import search_lambda
from esvit_core.monitoring.progress_line import ProgressLine
from esvit_core.runs.gpus import computing_device
from esvit_core.storage import ObjectStore

NAME = "segmentation"
IGNORED = 255
_MASK_FOLDERS = ("masks", "mask", "SegmentationClass", "annotations", "trimaps", "segmim", "labels")
_IMAGE_SUFFIXES, _MASK_SUFFIXES = (".jpg", ".jpeg", ".png"), (".png", ".jpg")
_TEST_FOLDERS = ("val", "validation", "test", "testing")
_TEST_SHARE, _VALIDATION_SHARE = 0.2, 0.2
_RESAMPLES, _SEED = 10_000, 0


@dataclass(frozen=True)
class MaskedImage:
    """An image and its mask, resized to the input of the network.

    Attributes:
        pixels: (S, S, 3) uint8.
        mask: class of each pixel, (S, S) uint8; 255 is ignored.
    """

    pixels: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class SegmentationOutcome:
    """Outcome of a linear head.

    Attributes:
        intersections, unions: pixels of each test image and class, (M, C).
        strength: chosen lambda.
    """

    intersections: np.ndarray
    unions: np.ndarray
    strength: float

    @property
    def figure(self) -> float:
        """mIoU, percent."""
        return 100 * mean_iou(self.intersections, self.unions)


def find_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Pair images with their masks: the mask has the name of the image and lies in a folder such as ``masks``.

    This covers a folder ``images`` beside ``masks``, PASCAL VOC (``JPEGImages`` and ``SegmentationClass``), ADE20K (``images``
    and ``annotations``), Oxford-IIIT Pets (``annotations/trimaps``) and Oxford Flowers (``image_00001`` and
    ``segmim_00001``).

    Returns:
        Image and mask, sorted.
    """
    masks: dict[str, str] = {}
    images: dict[str, str] = {}
    for name in sorted(names):
        path = PurePosixPath(name)
        if path.name.startswith("."):
            continue
        stem = path.stem.removeprefix("segmim_").removeprefix("image_").removesuffix("_mask")
        if set(path.parts[:-1]) & set(_MASK_FOLDERS):
            if path.suffix.lower() in _MASK_SUFFIXES:
                masks.setdefault(stem, name)
        elif path.suffix.lower() in _IMAGE_SUFFIXES:
            images.setdefault(stem, name)
    return [(image, masks[stem]) for stem, image in sorted(images.items()) if stem in masks]


def read_mask(data: bytes, name: str) -> np.ndarray:
    """Decode a mask, (H, W) uint8: a palette or gray image holds the classes; blue is the background of a color image.

    Raises:
        UserError: the file is not an image.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode in ("P", "L", "1"):
                return np.array(image if image.mode != "1" else image.convert("L")).clip(0, 255).astype(np.uint8)
            colors = np.asarray(image.convert("RGB")).astype(np.int16)
    except OSError as error:
        raise UserError(f"mask {name}: it cannot be decoded ({error}); copy it again") from None
    # Oxford Flowers: a color JPEG whose background is blue.
    blue = (colors[..., 2] > 150) & (colors[..., 0] < 100) & (colors[..., 1] < 100)
    return (~blue).astype(np.uint8)


def mean_iou(intersections: np.ndarray, unions: np.ndarray) -> float:
    """Return the mean over the classes that occur of intersection over union, of images (M, C) together."""
    total = unions.sum(0)
    return float((intersections.sum(0)[total > 0] / total[total > 0]).mean())


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
            return [float((answer == targets[held_out]).mean()) for answer in answers]

        strength, _ = search_lambda(score)
    weights, biases = problem.coefficients(problem.fit(np.array([strength]), tolerance=1e-5), 0)
    counts = []
    start = 0
    for part in _regions(test, backbone, config, label):
        logits = part.astype(np.float64) @ weights + biases  # (B, h * w, C)
        if logits.shape[2] == 1:
            logits = np.concatenate([np.zeros_like(logits), logits], 2)
        maps = torch.as_tensor(logits).transpose(1, 2).unflatten(2, (side, side))
        for item, of_image in zip(test[start : start + len(part)], maps, strict=True):
            large = F.interpolate(of_image[None], item.mask.shape, mode="bilinear", align_corners=False)
            counts.append(_overlap(present[large[0].argmax(0).numpy()], item.mask, classes))
        start += len(part)
    overlap, union = (np.stack([count[i] for count in counts]) for i in range(2))
    return SegmentationOutcome(overlap, union, strength)


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
        train, test = read_masked_images(source, store, config.evaluation.crop)
        networks = {model: load_model(run_uri, model, store) for model in MODELS}
        return measure_segmentation(train, test, networks, config)

    return measure_once(store, run_uri, NAME, measure)


def measure_segmentation(
    train: Sequence[MaskedImage], test: Sequence[MaskedImage], networks: Mapping[str, nn.Module], config: Config
) -> Result:
    """Measure every network on the same images."""
    if not train or not test:
        return left_out(NAME, "there are too few images with masks; at least one to fit and one to measure are needed")
    outcomes = {
        model: fit_head(train, test, network, config, f"segmentation with the {model} backbone")
        for model, network in networks.items()
    }
    result: dict[str, Any] = measured(
        NAME,
        {model: {NAME: outcome.figure} for model, outcome in outcomes.items()},
        [],
        samples={"train": len(train), "val": len(test)},
    )
    result["lambda"] = {model: outcome.strength for model, outcome in outcomes.items()}
    if set(outcomes) >= set(MODELS):
        difference = miou_difference(outcomes["trained"], outcomes["baseline"])
        result["differences"] = {NAME: difference.as_json()}
    return result


def read_masked_images(
    source: str, store: ObjectStore | None, side: int
) -> tuple[list[MaskedImage], list[MaskedImage]]:
    """Read the images that have a mask, to fit and to measure.

    Images in a folder such as ``val`` are for measuring; without one, a fifth of the images.

    Args:
        source: folder, tar, zip, or ``s3://bucket/prefix``.
        store: store of an ``s3://`` source.
        side: side of the images and masks, which are resized to a square, pixels.

    Raises:
        UserError: no image has a mask, or a file cannot be decoded.
    """
    with open_source(source, store) as opened:
        entries = {entry.name: entry for entry in opened.entries}
        pairs = find_pairs(list(entries))
        if not pairs:
            raise UserError(
                f"evaluation.segmentation {source}: no image has a mask; expected folders such as images and masks with "
                "files of the same names"
            )
        held = {n for n, (image, _) in enumerate(pairs) if set(PurePosixPath(image).parts) & set(_TEST_FOLDERS)}
        held = held or hold_out([image for image, _ in pairs], [None] * len(pairs), _TEST_SHARE)
        found: tuple[list[MaskedImage], list[MaskedImage]] = ([], [])
        for number, (image, mask) in enumerate(pairs):
            classes = Image.fromarray(read_mask(opened.read(entries[mask]), mask))
            try:
                with Image.open(io.BytesIO(opened.read(entries[image]))) as decoded:
                    pixels = decoded.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
            except OSError as error:
                raise UserError(f"image {image}: it cannot be decoded ({error}); copy it again") from None
            resized = np.asarray(classes.resize((side, side), Image.Resampling.NEAREST))
            found[number in held].append(MaskedImage(np.asarray(pixels), resized))
    return found


def _regions(items: Sequence[MaskedImage], backbone: nn.Module, config: Config, label: str) -> Iterator[np.ndarray]:
    """Yield the region features of each batch, (B, h * w, D) float32."""
    device = computing_device()
    backbone.to(device)
    normalize, size = Normalize(config.augment.mean, config.augment.std), config.evaluation.batch_size
    with ProgressLine(len(items), label=label) as progress:
        for start in range(0, len(items), size):
            part = items[start : start + size]
            batch = torch.stack([normalize(torch.from_numpy(i.pixels.copy()).permute(2, 0, 1).float()) for i in part])
            with torch.inference_mode():
                regions = backbone.views_and_regions(batch.to(device))[1]  # type: ignore[operator]
            progress.update(len(part))
            yield regions.float().cpu().numpy()


def _overlap(predicted: np.ndarray, mask: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return intersection and union of each class in pixels, (C,) and (C,); ignored pixels do not count."""
    known = mask != IGNORED
    predicted, truth = predicted[known], mask[known]
    inside = np.bincount(truth[predicted == truth], minlength=classes)
    both = np.bincount(truth, minlength=classes) + np.bincount(predicted, minlength=classes)
    return inside, both - inside
