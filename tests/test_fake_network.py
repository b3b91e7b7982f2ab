"""Networks on fake tensors."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from esvit_core.config import Config
from esvit_core.models.multicrop import build_network
from esvit_core.planning.fake_network import fake_crops, fake_network


@pytest.mark.parametrize("arch", ["swin", "deit_tiny", "timm:vit_tiny_patch16_224", "vil"])
def test_a_fake_network_has_the_parameters_of_the_real_one(arch: str) -> None:
    config = Config.from_mapping({"model": {"arch": arch, "drop_path": 0.1}, "head": {"out_dim": 64, "hidden_dim": 32}})
    real = {name: (value.shape, value.dtype) for name, value in build_network(config).state_dict().items()}
    with fake_network(config) as network:
        state = network.state_dict()
        assert {name: (value.shape, value.dtype) for name, value in state.items()} == real
        assert all(isinstance(value, FakeTensor) for value in state.values())
        loss = sum(out.sum() for out in network.backbone.views_and_regions(*fake_crops(2, [224])))
        loss.backward()
    assert isinstance(loss, torch.Tensor) and any(p.grad is not None for p in network.parameters())
