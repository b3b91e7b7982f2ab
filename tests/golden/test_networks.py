"""Networks against the published implementation: names of weights, outputs, features, attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from esvit_core.config import ModelConfig
from esvit_core.kernels.choose import select_kernels_
from esvit_core.models import MultiCropNetwork, ProjectionHead, create_backbone
from esvit_core.models.layers.resize import resize_by_products
from esvit_core.weights.published_names import from_published, to_published

LOGITS, FEATURES = 1e-4, 1e-3


def test_weights_have_the_published_names_shapes_and_dtypes(golden, key_arch):
    with torch.device("meta"):
        backbone = create_backbone(ModelConfig(arch=key_arch))
        heads = (ProjectionHead(backbone.num_features, golden.index["head_out_dim"]) for _ in range(2))
        state = MultiCropNetwork(backbone, *heads).state_dict()
    ours = {
        name: [list(value.shape), str(value.dtype).removeprefix("torch.")]
        for name, value in to_published(state).items()
    }
    assert ours == golden.keys(key_arch)
    assert set(from_published(golden.keys(key_arch))) == set(state)


@torch.no_grad()
def test_outputs_equal_the_published_ones(golden, forward_arch, record):
    """As the network is built, and with the kernels that are selected for training and evaluation."""
    network = golden.network(forward_arch)
    record(forward_arch, largest_differences(golden, forward_arch, network))
    select_kernels_(network, torch.float32, torch.device("cpu"))
    largest_differences(golden, forward_arch, network)


def largest_differences(golden, arch, network):
    """Largest absolute differences from the published outputs, by name; all are within their tolerance."""
    expected, crops = golden.arrays(arch), golden.crops()
    out = network(crops)
    views = [network.backbone(torch.cat(crops[i : i + 2])) for i in (0, 2)]
    found = {
        "view_logits": (out.view_logits, LOGITS),
        "region_logits": (out.region_logits[:, :8], LOGITS),
        "region_features": (out.region_features[:, :8], FEATURES),
        "view_features_global": (views[0], FEATURES),
        "view_features_local": (views[1], FEATURES),
    }
    if "last4_avgpool" in expected:  # not of a ResNet
        found["last4_avgpool"] = (network.backbone.last_blocks(crops[0], 4), FEATURES)
    if "last_attention" in expected:
        found["last_attention"] = (network.backbone.last_attention(crops[0])[:2, :, :8], LOGITS)
    assert [out.regions_per_crop[0], out.regions_per_crop[2]] == expected.pop("npatch").tolist()
    assert set(found) == set(expected)
    largest = {name: float(np.abs(value.numpy() - expected[name]).max()) for name, (value, _) in found.items()}
    assert not {name: value for name, value in largest.items() if not value <= found[name][1]}
    return largest


@torch.no_grad()
@pytest.mark.parametrize("arch", ["deit_tiny", "vil_2262"])
def test_resizing_as_on_a_gpu_keeps_the_published_outputs(golden, arch, monkeypatch):
    for name in ("vil", "vit", "layers.longformer"):
        monkeypatch.setattr(f"esvit_core.models.{name}.resize", resize_by_products)
    found = golden.network(arch)(golden.crops()).view_logits
    assert np.abs(found.numpy() - golden.arrays(arch)["view_logits"]).max() <= LOGITS
