"""Correspondence: does the best match of a region show the same part of the image? (EsViT, section 3.3, figure 1.)

Two crops of one image with known geometry are compared. A region of crop A is a *query* if its center also lies in crop
B and it is not blank: blank regions look alike and have no correct match. Its match is the region of B with the highest
cosine similarity of backbone features. The match is *correct* if the center of the matched region is at most one
region's side away from the true position, measured in B's region map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from esvit_core.data.loading.augment import MultiCrop
    from esvit_core.evaluation.features import Images
    from esvit_core.monitoring.progress_line import ProgressLine

Box = tuple[float, float, float, float]

_DRAWS = 20  # attempts to draw two crops that overlap enough
_MIN_QUERIES = 0.25  # fraction of crop A's regions that should be queries
_MAX_BLANK_RANGE = 0.15  # of a blank region's normalized pixels: 9 gray levels


@dataclass(frozen=True)
class Crop:
    """A crop with known geometry.

    Attributes:
        pixels: network input, (3, S, S) float32.
        box: left, top, right, bottom as fractions of the image's sides.
        flipped: whether the crop is mirrored horizontally.
    """

    pixels: torch.Tensor
    box: Box
    flipped: bool


@dataclass(frozen=True)
class Pair:
    """Two crops of one image.

    Attributes:
        image: (H, W, 3) uint8.
        queries: which regions of A are queries, (N,) bool.
        positions: centers of A's regions in B as fractions of its sides, x and y, (N, 2).
    """

    image: np.ndarray
    a: Crop
    b: Crop
    queries: np.ndarray
    positions: np.ndarray


@dataclass(frozen=True)
class Matches:
    """Best matches of crop A's regions: their indices in B and whether they are correct, both (N,)."""

    indices: np.ndarray
    correct: np.ndarray


def region_centers(side: int) -> np.ndarray:
    """Return the region centers of a square map, row by row, as fractions x, y of the crop's sides, (side * side, 2)."""
    ticks = (np.arange(side) + 0.5) / side
    y, x = np.meshgrid(ticks, ticks, indexing="ij")
    return np.stack([x.ravel(), y.ravel()], axis=1)


def crop_to_image(points: np.ndarray, box: Box, flipped: bool) -> np.ndarray:
    """Convert points (N, 2) from fractions of the crop's sides to fractions of the image's sides."""
    x0, y0, x1, y1 = box
    x = 1 - points[:, 0] if flipped else points[:, 0]
    return np.stack([x0 + x * (x1 - x0), y0 + points[:, 1] * (y1 - y0)], axis=1)


def image_to_crop(points: np.ndarray, box: Box, flipped: bool) -> np.ndarray:
    """Convert points (N, 2) from fractions of the image's sides to fractions of the crop's; outside the crop, outside 0..1."""
    x0, y0, x1, y1 = box
    x = (points[:, 0] - x0) / (x1 - x0)
    return np.stack([1 - x if flipped else x, (points[:, 1] - y0) / (y1 - y0)], axis=1)


def make_pair(image: np.ndarray, a: Crop, b: Crop, side: int) -> Pair:
    """Create a pair with its queries, for maps of ``side`` x ``side`` regions."""
    positions = image_to_crop(crop_to_image(region_centers(side), a.box, a.flipped), b.box, b.flipped)
    inside = ((positions >= 0) & (positions <= 1)).all(axis=1)
    return Pair(image, a, b, inside & ~_blank_regions(a.pixels, side), positions)


def draw_pair(image: np.ndarray, multicrop: MultiCrop, rng: np.random.Generator, side: int) -> Pair | None:
    """Draw two global crops that share a quarter of their regions if possible; None if there are no queries."""
    best: Pair | None = None
    for _ in range(_DRAWS):
        a, b = (Crop(*multicrop.geometric_crop(image, rng)) for _ in range(2))
        pair = make_pair(image, a, b, side)
        if best is None or pair.queries.sum() > best.queries.sum():
            best = pair
        if pair.queries.mean() >= _MIN_QUERIES:
            break
    return best if best is not None and best.queries.any() else None


def match_regions(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """Return the index (N,) of the most similar region (cosine) in ``b`` (M, D) for each region in ``a`` (N, D)."""
    return (F.normalize(a.float(), dim=1) @ F.normalize(b.float(), dim=1).T).argmax(1).cpu().numpy()


def score_matches(pair: Pair, indices: np.ndarray) -> Matches:
    """Check whether the match of each region is within one region's side of the true position."""
    side = math.isqrt(len(pair.positions))
    distance = np.linalg.norm(region_centers(side)[indices] - pair.positions, axis=1) * side  # (N,)
    return Matches(indices, distance <= 1)


def chance_level(pair: Pair) -> float:
    """Return the expected fraction of correct matches of a random choice, over the queries."""
    side = math.isqrt(len(pair.positions))
    gaps = region_centers(side)[None] - pair.positions[pair.queries][:, None]  # (queries, N, 2)
    return float((np.linalg.norm(gaps, axis=2) * side <= 1).mean())


def regions_per_side(backbone: nn.Module, size: int) -> int:
    """Return the side of the backbone's region map of a square crop of ``size`` pixels.

    Raises:
        ValueError: the region map is not square.
    """
    device = next(backbone.parameters()).device
    with torch.inference_mode():
        regions = _regions(backbone, torch.zeros(1, 3, size, size, device=device)).shape[1]
    side = math.isqrt(regions)
    if side * side != regions:
        raise ValueError(f"the backbone's {regions} regions do not form a square map")
    return side


def match_pairs(
    backbone: nn.Module, pairs: Sequence[Pair], batch_size: int, progress: ProgressLine | None = None
) -> list[Matches]:
    """Match every pair with a backbone in eval mode, on the backbone's device, ``batch_size`` crops at a time."""
    device = next(backbone.parameters()).device
    matches = []
    with torch.inference_mode():
        count = max(1, batch_size // 2)  # a pair is two images
        for start in range(0, len(pairs), count):
            part = pairs[start : start + count]
            crops = torch.stack([crop.pixels for pair in part for crop in (pair.a, pair.b)]).to(device)
            regions = _regions(backbone, crops)  # (2B, N, D)
            for pair, a, b in zip(part, regions[::2], regions[1::2], strict=True):
                matches.append(score_matches(pair, match_regions(a, b)))
            if progress is not None:
                progress.update(len(part))
    return matches


def accuracy(pairs: Sequence[Pair], matches: Sequence[Matches]) -> float:
    """Return the percentage of correct matches over all queries."""
    correct = sum(int(m.correct[p.queries].sum()) for p, m in zip(pairs, matches, strict=True))
    return 100 * correct / sum(int(p.queries.sum()) for p in pairs)


def draw_pairs(dataset: Images, indices: Sequence[int], multicrop: MultiCrop, seed: int, side: int) -> dict[int, Pair]:
    """Draw one pair per image, keyed by the image's index; images without queries are left out. Seeded."""
    drawn = (
        (index, draw_pair(dataset.image(index), multicrop, np.random.default_rng((seed, index)), side))
        for index in indices
    )
    return {index: pair for index, pair in drawn if pair is not None}


def _regions(backbone: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return backbone.views_and_regions(images)[1]  # type: ignore[operator]


def _blank_regions(pixels: torch.Tensor, side: int) -> np.ndarray:
    # Pooling also handles crops whose side is not a multiple of the map's side.
    highest = F.adaptive_max_pool2d(pixels[None], side)[0]  # (3, side, side)
    lowest = -F.adaptive_max_pool2d(-pixels[None], side)[0]
    return ((highest - lowest).amax(0) < _MAX_BLANK_RANGE).flatten().numpy()
