"""Correspondence is perfect if features encode the position, and at chance level if they are random."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from esvit_core.config import AugmentConfig, CropConfig
from esvit_core.data.loading.augment import MultiCrop
from esvit_core.evaluation.correspondence import (
    Crop,
    accuracy,
    chance_level,
    crop_to_image,
    draw_pair,
    image_to_crop,
    make_pair,
    match_pairs,
    match_regions,
    region_centers,
    regions_per_side,
    score_matches,
)

SIDE = 6
CONFIG = AugmentConfig(global_crops=CropConfig(size=48, number=2, scale=(0.4, 1.0)))


def map_image(seed: int = 0) -> np.ndarray:
    """An image whose red and green encode the position, with texture in blue, (90, 120, 3)."""
    y, x = np.mgrid[0:90, 0:120]
    blue = np.random.default_rng(seed).integers(0, 255, (90, 120))
    return np.stack([x * 255 / 119, y * 255 / 89, blue], axis=-1).astype(np.uint8)


class PositionFeatures(nn.Module):
    """Region features on two circles; their cosine falls with the distance of the positions in red and green."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def views_and_regions(self, x):
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CONFIG.mean, CONFIG.std))
        positions = F.adaptive_avg_pool2d(x * std + mean, SIDE)[:, :2].flatten(2).transpose(1, 2)  # (B, N, 2)
        regions = torch.cat([positions.cos(), positions.sin()], dim=2)
        return regions.mean(1), regions


class RandomFeatures(PositionFeatures):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def views_and_regions(self, x):
        regions = torch.randn(len(x), SIDE * SIDE, 16, generator=self.generator)
        return regions.mean(1), regions


@pytest.fixture(scope="module")
def pairs():
    drawn = [
        draw_pair(map_image(i), MultiCrop(CONFIG), np.random.default_rng(i), regions_per_side(PositionFeatures(), 48))
        for i in range(60)
    ]
    assert any(p.a.flipped != p.b.flipped for p in drawn)
    return drawn


def test_features_that_encode_the_position_match_every_region(pairs):
    assert accuracy(pairs, match_pairs(PositionFeatures(), pairs, batch_size=7)) == 100


def test_random_features_match_at_chance_level(pairs):
    expected = 100 * np.average([chance_level(p) for p in pairs], weights=[p.queries.sum() for p in pairs])
    assert accuracy(pairs, match_pairs(RandomFeatures(), pairs, batch_size=7)) == pytest.approx(expected, abs=4)


def test_a_wrong_flip_lowers_the_accuracy(pairs):
    """With wrong geometry even perfect features fail, so the test above can fail."""
    wrong = [
        make_pair(p.image, Crop(p.a.pixels, p.a.box, not p.a.flipped), p.b, SIDE)
        for p in pairs
        if p.a.flipped != p.b.flipped
    ]
    assert accuracy(wrong, match_pairs(PositionFeatures(), wrong, batch_size=7)) < 60


boxes = st.tuples(st.floats(0, 0.4), st.floats(0, 0.4), st.floats(0.5, 1), st.floats(0.5, 1))


@given(box=boxes, flipped=st.booleans())
def test_going_to_the_image_and_back_changes_nothing(box, flipped):
    points = region_centers(5)
    assert image_to_crop(crop_to_image(points, box, flipped), box, flipped) == pytest.approx(points)


def test_a_flip_mirrors_left_and_right_only():
    box = (0.2, 0.1, 0.6, 0.5)
    corner = np.array([[0.0, 0.0]])
    assert crop_to_image(corner, box, False) == pytest.approx(np.array([[0.2, 0.1]]))
    assert crop_to_image(corner, box, True) == pytest.approx(np.array([[0.6, 0.1]]))


def textured(size: int = 24) -> torch.Tensor:
    return torch.rand(3, size, size, generator=torch.Generator().manual_seed(0))


def test_only_regions_inside_both_crops_are_queries():
    left, right = Crop(textured(), (0, 0, 0.5, 1), False), Crop(textured(), (0.25, 0, 0.75, 1), False)
    queries = make_pair(map_image(), left, right, 4).queries.reshape(4, 4)
    assert queries.tolist() == [[False, False, True, True]] * 4


def test_blank_regions_are_not_queries():
    pixels = textured()
    pixels[:, :12] = 0.3
    whole = (0.0, 0.0, 1.0, 1.0)
    queries = make_pair(map_image(), Crop(pixels, whole, False), Crop(pixels, whole, False), 4).queries.reshape(4, 4)
    assert queries.tolist() == [[False] * 4] * 2 + [[True] * 4] * 2


def test_a_blank_image_gives_no_pair():
    white = np.full((60, 60, 3), 255, np.uint8)
    assert draw_pair(white, MultiCrop(CONFIG), np.random.default_rng(0), SIDE) is None


def test_a_match_one_region_away_is_correct_and_farther_is_wrong():
    whole = Crop(textured(), (0.0, 0.0, 1.0, 1.0), False)
    pair = make_pair(map_image(), whole, whole, 4)
    center = 5  # row 1, column 1
    for index, correct in ((5, True), (4, True), (6, True), (1, True), (9, True), (0, False), (7, False), (13, False)):
        assert score_matches(pair, np.full(16, index)).correct[center] == correct, index


def test_chance_level_counts_the_regions_within_reach():
    whole = Crop(textured(), (0.0, 0.0, 1.0, 1.0), False)
    # Of 16 regions the 4 inner ones have 5 within reach, the 8 on an edge 4, the 4 corners 3.
    assert chance_level(make_pair(map_image(), whole, whole, 4)) == pytest.approx((4 * 5 + 8 * 4 + 4 * 3) / 16 / 16)


def test_matching_ignores_the_length_of_features():
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    b = torch.tensor([[0.1, 0.0], [5.0, 5.0], [0.0, 0.2]])
    assert match_regions(a, b).tolist() == [0, 2]


def test_regions_that_are_not_a_square_map_are_reported():
    class Odd(PositionFeatures):
        def views_and_regions(self, x):
            return x.mean((2, 3)), torch.zeros(len(x), 12, 3)

    with pytest.raises(ValueError, match="12 regions do not form a square map"):
        regions_per_side(Odd(), 48)
