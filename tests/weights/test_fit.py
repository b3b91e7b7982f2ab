"""The architecture is found by names and shapes."""

from __future__ import annotations

import pytest
import torch

from esvit_core.config import ModelConfig
from esvit_core.models import create_backbone
from esvit_core.weights.fit import condensed, recognise
from esvit_core.weights.timm_names import to_timm


@pytest.mark.parametrize("arch", ["swin_tiny_w14", "cvt_tiny", "vil_2262", "deit_small", "resnet50"])
def test_each_family_is_recognised_under_our_names_and_timms(arch):
    with torch.device("meta"):
        state = create_backbone(ModelConfig(arch=arch)).state_dict()
    assert recognise(state) == arch
    assert recognise(to_timm(arch, state)) == arch
    assert recognise(dict(list(state.items())[:-1])) is None


def test_every_name_is_in_the_condensed_list():
    names = ["norm.weight", "layers.2.blocks.6.norm1.weight", "layers.2.blocks.6.mlp.fc1.bias", "head.mlp.0.weight"]
    assert condensed(names) == ["norm.weight", "layers.2.blocks.6.* (2)", "head.mlp.0.weight"]
