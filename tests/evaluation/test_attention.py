"""Maps of networks with and without attention."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from esvit_core.config import ModelConfig
from esvit_core.evaluation.attention_maps import attention_maps, scale_maps, shows_attention
from esvit_core.evaluation.plots import attention_figure, heads_shown
from esvit_core.models.factory import create_backbone

SWIN = {"arch": "swin", "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}


@pytest.mark.parametrize(("model", "attention", "heads"), [(SWIN, True, 4), ({"arch": "resnet50"}, False, 1)])
def test_every_network_gives_a_map(model, attention, heads):
    backbone = create_backbone(ModelConfig.model_validate(model), img_size=64).eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert shows_attention(backbone, images) is attention
    maps = attention_maps(backbone, images)
    assert maps.shape[:2] == (2, heads)
    assert maps.min() == 0 and maps.max() == 1


@pytest.mark.parametrize(("heads", "shown"), [(1, 0), (2, 2), (24, 4)])
def test_the_figure_takes_any_number_of_heads(heads, shown):
    assert heads_shown(heads) == shown
    maps = list(np.random.default_rng(0).random((2, heads, 4, 4)))
    figure = Image.open(io.BytesIO(attention_figure([np.zeros((32, 32, 3), np.uint8)] * 2, maps, maps)))
    assert figure.width > 400 and figure.getpixel((0, 0))[3] == 0


def test_maps_are_stretched_one_by_one():
    scaled = scale_maps(np.array([[[1.0, 3.0]], [[10.0, 10.0]]]))
    assert scaled.tolist() == [[[0.0, 1.0]], [[0.0, 0.0]]]
