"""Parts of the figures whose errors are hard to see."""

from __future__ import annotations

import numpy as np
import torch

from esvit_core.evaluation.correspondence import Crop
from esvit_core.evaluation.plots import cut, heat_over
from esvit_core.evaluation.visualize import spread


def test_the_crop_shown_is_the_network_s_input():
    image = np.arange(8 * 10 * 3, dtype=np.uint8).reshape(8, 10, 3)
    part = cut(image, Crop(torch.zeros(3, 4, 4), (0.2, 0.5, 0.7, 1.0), False))
    assert (part == image[4:8, 2:7]).all()
    mirrored = cut(image, Crop(torch.zeros(3, 4, 4), (0.2, 0.5, 0.7, 1.0), True))
    assert (mirrored == part[:, ::-1]).all()


def test_a_crop_thinner_than_a_pixel_is_still_shown():
    assert cut(np.zeros((3, 3, 3), np.uint8), Crop(torch.zeros(3, 4, 4), (0.1, 0.1, 0.15, 0.15), False)).size


def test_heat_lies_where_the_attention_is():
    heat = np.zeros((4, 4))
    heat[0, 3] = 1
    shown = heat_over(np.full((32, 32, 3), 128, np.uint8), heat, side=40)
    assert shown.shape == (40, 40, 3)
    assert shown[:8, 32:].mean() > shown[30:, :10].mean() + 0.1


def test_the_choice_of_images_takes_the_classes_in_turn():
    labels = np.repeat([0, 1, 2], [20, 5, 2])
    chosen = spread(labels, 7, seed=0)
    assert len(set(chosen)) == 7
    assert np.bincount(labels[chosen]).tolist() in ([3, 2, 2], [2, 3, 2])
    assert sorted(labels[chosen[:3]]) == [0, 1, 2]
    assert spread(labels, 7, seed=0) == chosen
    assert len(spread(labels, 100, seed=0)) == 27
