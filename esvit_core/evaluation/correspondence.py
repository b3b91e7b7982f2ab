"""Correspondence: does the best match of a region show the same place of the image? (EsViT, section 3.3, figure 1.)

Two crops of one image with known geometry are compared. A region of crop A is *asked* if its center lies in crop B
too and its pixels are not all of one colour (a blank region looks like every other blank one and has no right match).
Its match is the region of B with the highest cosine similarity of backbone features. The match is *right* if the
center of the matched region is at most one region's side away from the true place, both measured in B's map of regions.
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
    from esvit_core.monitoring.progress_line import Progress

Box = tuple[float, float, float, float]

_DRAWS = 20  # attempts to draw two crops that overlap enough
_ENOUGH = 0.25  # share of crop A's regions that should be asked
_FLAT = 0.15  # largest spread of a blank region's pixels, in standard deviations of an image's: 9 grey levels


@dataclass(frozen=True)
class Crop:
    """A crop with known geometry.

    Attributes:
        pixels: network input, (3, S, S) float32.
        box: left, top, right, bottom as shares of the image's sides.
        flipped: mirrored left to right after cropping.
    """

    pixels: torch.Tensor
    box: Box
    flipped: bool


@dataclass(frozen=True)
class Pair:
    """Two crops of one image.

    Attributes:
        image: (H, W, 3) uint8.
        asked: which regions of A are asked, (N,) bool.
        places: where their centers are in B as shares of its sides, x and y, (N, 2).
    """

    image: np.ndarray
    a: Crop
    b: Crop
    asked: np.ndarray
    places: np.ndarray


@dataclass(frozen=True)
class Matches:
    """Best matches of crop A's regions: their index in B and whether that is right, both (N,)."""

    chosen: np.ndarray
    right: np.ndarray


def region_centers(side: int) -> np.ndarray:
    """Centers of the regions of a square map, row by row, x and y as shares of the crop's sides, (side * side, 2)."""
    ticks = (np.arange(side) + 0.5) / side
    y, x = np.meshgrid(ticks, ticks, indexing="ij")
    return np.stack([x.ravel(), y.ravel()], axis=1)


def crop_to_image(points: np.ndarray, box: Box, flipped: bool) -> np.ndarray:
    """From shares of the crop's sides to shares of the image's, (N, 2)."""
    x0, y0, x1, y1 = box
    x = 1 - points[:, 0] if flipped else points[:, 0]
    return np.stack([x0 + x * (x1 - x0), y0 + points[:, 1] * (y1 - y0)], axis=1)


def image_to_crop(points: np.ndarray, box: Box, flipped: bool) -> np.ndarray:
    """From shares of the image's sides to shares of the crop's, outside 0..1 where the crop does not reach; (N, 2)."""
    x0, y0, x1, y1 = box
    x = (points[:, 0] - x0) / (x1 - x0)
    return np.stack([1 - x if flipped else x, (points[:, 1] - y0) / (y1 - y0)], axis=1)


def pair_of(image: np.ndarray, a: Crop, b: Crop, side: int) -> Pair:
    """The pair with its questions, for maps of ``side`` x ``side`` regions."""
    places = image_to_crop(crop_to_image(region_centers(side), a.box, a.flipped), b.box, b.flipped)
    inside = ((places >= 0) & (places <= 1)).all(axis=1)
    return Pair(image, a, b, inside & ~_blank_regions(a.pixels, side), places)


def draw_pair(image: np.ndarray, multicrop: MultiCrop, rng: np.random.Generator, side: int) -> Pair | None:
    """Two global crops that share at least a quarter of their regions; None if none are found or all is blank."""
    best: Pair | None = None
    for _ in range(_DRAWS):
        a, b = (Crop(*multicrop.geometric_crop(image, rng)) for _ in range(2))
        pair = pair_of(image, a, b, side)
        if best is None or pair.asked.sum() > best.asked.sum():
            best = pair
        if pair.asked.mean() >= _ENOUGH:
            break
    return best if best is not None and best.asked.any() else None


def match_regions(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """Index of the most similar region (cosine) in ``b`` (M, D) for each of ``a`` (N, D); (N,)."""
    return (F.normalize(a.float(), dim=1) @ F.normalize(b.float(), dim=1).T).argmax(1).cpu().numpy()


def judge(pair: Pair, chosen: np.ndarray) -> Matches:
    """Whether the match of each region is within one region's side of the true place."""
    side = math.isqrt(len(pair.places))
    distance = np.linalg.norm(region_centers(side)[chosen] - pair.places, axis=1) * side  # (N,)
    return Matches(chosen, distance <= 1)


def chance(pair: Pair) -> float:
    """Share of right matches that a random choice would have, over the asked regions."""
    side = math.isqrt(len(pair.places))
    gaps = region_centers(side)[None] - pair.places[pair.asked][:, None]  # (asked, N, 2)
    return float((np.linalg.norm(gaps, axis=2) * side <= 1).mean())


def regions_per_side(backbone: nn.Module, size: int) -> int:
    """Side of the map of regions that the backbone makes of a square crop of ``size`` pixels.

    Raises:
        ValueError: its regions are not a square map.
    """
    device = next(backbone.parameters()).device
    with torch.inference_mode():
        regions = _regions(backbone, torch.zeros(1, 3, size, size, device=device)).shape[1]
    side = math.isqrt(regions)
    if side * side != regions:
        raise ValueError(f"the backbone's {regions} regions are not a square map")
    return side


def match_pairs(
    backbone: nn.Module, pairs: Sequence[Pair], batch_size: int, progress: Progress | None = None
) -> list[Matches]:
    """Matches of every pair under a backbone (in eval mode, where it is)."""
    device = next(backbone.parameters()).device
    found = []
    with torch.inference_mode():
        for start in range(0, len(pairs), batch_size):
            part = pairs[start : start + batch_size]
            crops = torch.stack([crop.pixels for pair in part for crop in (pair.a, pair.b)]).to(device)
            regions = _regions(backbone, crops)  # (2B, N, D)
            for pair, a, b in zip(part, regions[::2], regions[1::2], strict=True):
                found.append(judge(pair, match_regions(a, b)))
            if progress is not None:
                progress.update(len(part))
    return found


def share_right(pairs: Sequence[Pair], matches: Sequence[Matches]) -> float:
    """Share of right matches among all asked regions, percent."""
    right = sum(int(m.right[p.asked].sum()) for p, m in zip(pairs, matches, strict=True))
    return 100 * right / sum(int(p.asked.sum()) for p in pairs)


def draw_pairs(dataset: Images, indices: Sequence[int], multicrop: MultiCrop, seed: int, side: int) -> dict[int, Pair]:
    """One pair of each image that gives one, by the image's index; the same for the same seed."""
    drawn = (
        (index, draw_pair(dataset.image(index), multicrop, np.random.default_rng((seed, index)), side))
        for index in indices
    )
    return {index: pair for index, pair in drawn if pair is not None}


def _regions(backbone: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return backbone.views_and_regions(images)[1]  # type: ignore[operator]


def _blank_regions(pixels: torch.Tensor, side: int) -> np.ndarray:
    # Pooling also takes crops whose side is not a multiple of the map's.
    highest = F.adaptive_max_pool2d(pixels[None], side)[0]  # (3, side, side)
    lowest = -F.adaptive_max_pool2d(-pixels[None], side)[0]
    return ((highest - lowest).amax(0) < _FLAT).flatten().numpy()
