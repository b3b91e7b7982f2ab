"""The Triton kernel over many tensors, in Triton's interpreter on a CPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("compiled here, not interpreted", allow_module_level=True)

from esvit_core.kernels import multi_tensor_triton as kernels


def test_each_tensor_is_multiplied_by_its_own_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BLOCK", 16)
    monkeypatch.setattr(kernels, "_PROGRAMS", 2)  # so that a program has several blocks
    tensors = [torch.randn(shape) for shape in ((), (3,), (7, 5), (4, 4, 4))]
    factors = torch.tensor([1.0, 0.5, -2.0, 3.0])
    expected = [t * factor for t, factor in zip(tensors, factors, strict=True)]
    kernels.multiply_each_(tensors, factors)
    assert all(torch.equal(found, wanted) for found, wanted in zip(tensors, expected, strict=True))
