"""Resizing by products gives torch's numbers, and networks on a GPU resize in no other way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from esvit_core.config import ModelConfig
from esvit_core.models import create_backbone
from esvit_core.models.layers.resize import resize, resize_by_products

CASES = {
    "DeiT: 14 x 14 patches to 6 x 6": ((1, 24, 14, 14), {"size": (6, 6)}),
    "not square, larger": ((1, 8, 6, 7), {"size": (11, 9)}),
    "ViL: by a scale": ((1, 8, 7, 7), {"scale_factor": (10 / 49) ** 0.5}),
    "relative position bias": ((1, 3, 49, 49), {"size": (9, 9)}),
    "timm: antialiased": ((1, 24, 14, 14), {"size": [6, 6], "antialias": True}),
    "bilinear": ((2, 4, 7, 5), {"size": (14, 3), "mode": "bilinear"}),
    "one axis": ((1, 16, 27), {"size": 11, "mode": "linear"}),
    "corners aligned": ((1, 16, 27), {"size": 11, "mode": "linear", "align_corners": True}),
}
RESIZED = {  # networks whose position embeddings are resized for crops of 96 pixels
    "deit_tiny": {},
    "vil_1281": {},
    "vil": {"stages": "l1,h1,d8,n1,s1,g1,p16,f7,a1_l2,h1,d8,n1,s0,g0,p2,f7,a1"},
    "vil relative": {"stages": "l1,h1,d8,n1,s1,g1,p16,f7,a0_l2,h1,d8,n1,s0,g0,p2,f7,a0"},
    "timm:vit_tiny_patch16_224": {},
    "timm:eva02_tiny_patch14_224": {},
}


@pytest.mark.parametrize("case", CASES)
def test_products_give_torchs_interpolation_and_its_gradient(case):
    shape, arguments = CASES[case]
    arguments = {"mode": "bicubic", **arguments}
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    expected, found = F.interpolate(x, **arguments), resize_by_products(x, **arguments)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    weight = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad(expected, x, weight)
    torch.testing.assert_close(torch.autograd.grad(found, x, weight)[0], gradient, rtol=0, atol=4e-6)


def test_products_are_in_float32_under_autocast():
    x = torch.randn(1, 4, 14, 14)
    with torch.autocast("cpu", torch.bfloat16):
        found = resize_by_products(x, (6, 6))
    assert torch.equal(found, resize_by_products(x, (6, 6)))


def test_on_a_cpu_the_numbers_are_torchs_bit_for_bit():
    x = torch.randn(1, 4, 14, 14)
    assert torch.equal(resize(x, (6, 6)), F.interpolate(x, (6, 6), mode="bicubic"))


class _GpuOperations(TorchDispatchMode):
    """The names of the operations on tensors of a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(isinstance(argument, torch.Tensor) and argument.is_cuda for argument in args):
            self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize("arch", RESIZED)
def test_no_network_interpolates_on_a_gpu(arch):
    """The backward passes of torch's interpolations raise with training.deterministic there."""
    network = create_backbone(ModelConfig(arch=arch.split()[0], **RESIZED[arch]))
    with FakeTensorMode(allow_non_fake_inputs=True):
        network.to("cuda")
        with _GpuOperations() as operations:
            network.views_and_regions(torch.empty(2, 3, 96, 96, device="cuda"))
    assert "aten.convolution.default" in operations.names
    assert not [name for name in operations.names if "upsample" in name]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("arch", RESIZED)
def test_a_deterministic_backward_pass_on_a_gpu(arch):
    network = create_backbone(ModelConfig(arch=arch.split()[0], **RESIZED[arch])).to("cuda")
    torch.use_deterministic_algorithms(True)
    try:
        view, regions = network.views_and_regions(torch.randn(2, 3, 96, 96, device="cuda"))
        (view.sum() + regions.sum()).backward()
    finally:
        torch.use_deterministic_algorithms(False)
