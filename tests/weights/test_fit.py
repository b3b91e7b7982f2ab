"""Architectures are recognized by names and shapes."""

from __future__ import annotations

import pytest
import torch

from esvit_core.config import ModelConfig
from esvit_core.models import create_backbone
from esvit_core.weights.fit import group_by_block, recognize_architecture
from esvit_core.weights.timm_names import to_timm


@pytest.mark.parametrize("arch", ["swin_tiny_w14", "cvt_tiny", "vil_2262", "deit_small", "resnet50"])
def test_each_family_is_recognized_under_our_names_and_timms(arch):
    with torch.device("meta"):
        state = create_backbone(ModelConfig(arch=arch)).state_dict()
    assert recognize_architecture(state) == arch
    assert recognize_architecture(to_timm(arch, state)) == arch
    assert recognize_architecture(dict(list(state.items())[:-1])) is None


def test_names_are_grouped_by_block():
    names = ["norm.weight", "layers.2.blocks.6.norm1.weight", "layers.2.blocks.6.mlp.fc1.bias", "head.mlp.0.weight"]
    assert group_by_block(names) == ["norm.weight", "layers.2.blocks.6.* (2)", "head.mlp.0.weight"]
