"""The strategy of the cross-entropy is selected by device and number of prototypes, and reaches heads and objective."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from esvit_core.config import Config
from esvit_core.kernels import triton_support
from esvit_core.kernels.fused_softmax import select_softmax_kernels
from esvit_core.losses import strategy
from esvit_core.losses.strategy import BLOCKWISE, CHUNKED, LAZY_TRITON, TRITON, logit_bytes, select_strategy
from esvit_core.models.lazy_logits import MIN_LAZY_PROTOTYPES, LazyLogits
from esvit_core.models.multicrop import build_network

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_a_cpu_uses_lazy_logits_from_many_prototypes_on() -> None:
    assert select_strategy(CPU, MIN_LAZY_PROTOTYPES - 1) is CHUNKED
    assert select_strategy(CPU, MIN_LAZY_PROTOTYPES) is BLOCKWISE[select_softmax_kernels()]


def test_a_setting_decides_whether_logits_are_lazy() -> None:
    assert select_strategy(CPU, 512, lazy=True) is BLOCKWISE[select_softmax_kernels()]
    assert select_strategy(CPU, MIN_LAZY_PROTOTYPES, lazy=False) is CHUNKED


def test_a_gpu_uses_triton_if_its_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategy, "triton_problem", lambda device: "")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=24e9))
    assert select_strategy(GPU, 65536, stored_bytes=2.3e9) is TRITON
    assert select_strategy(GPU, 65536, stored_bytes=2.5e9) is LAZY_TRITON
    assert select_strategy(GPU, 512, lazy=True) is LAZY_TRITON
    assert select_strategy(GPU, 65536, lazy=False, stored_bytes=20e9) is TRITON


def test_the_size_of_stored_logits_is_that_of_a_forward_pass() -> None:
    config = Config.load("demo", ["head.out_dim=64"])
    network = build_network(config)
    kinds = (config.augment.global_crops, *config.augment.local_kinds)
    output = network([torch.zeros(3, 3, kind.size, kind.size) for kind in kinds for _ in range(kind.number)])
    student = output.view_logits.numel() + output.region_logits.numel()
    teacher = 64 * 3 * (2 + sum(output.regions_per_crop[:2]))
    assert logit_bytes(config, network.backbone, 3, torch.bfloat16) == 2 * (2 * student + teacher)


def test_a_gpu_on_which_triton_cannot_compile_uses_torch_and_the_reason_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(device: torch.device) -> None:
        raise RuntimeError("fatal error: Python.h: No such file or directory\ncompilation terminated.")

    deregistered: list[bool] = []
    monkeypatch.setattr(triton_support, "_try_kernels", fail)
    monkeypatch.setattr(triton_support, "deregister_triton_kernels", lambda: deregistered.append(True))
    monkeypatch.setattr(strategy, "triton_problem", triton_support.triton_problem.__wrapped__)
    monkeypatch.setenv("CC", "/opt/cc")
    chosen = select_strategy(GPU, 65536)
    assert chosen.cross_entropy is CHUNKED.cross_entropy and not chosen.lazy_logits and deregistered
    assert chosen.name == (
        "softmax in torch, because Triton cannot compile its kernels (fatal error: Python.h: No such file or directory)"
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_with_a_compiler_that_fails_computes_all_in_torch(tmp_path: Path) -> None:
    """Including outer products, which the backward pass of ViL has and for which torch has a kernel in Triton."""
    program = """
import torch
from esvit_core.losses.strategy import select_strategy
print(select_strategy(torch.device("cuda", 0), 512).name)
a, b = torch.ones(2, 3, 1, device="cuda", requires_grad=True), torch.ones(2, 1, 3, device="cuda", requires_grad=True)
torch.bmm(a, b).sum().backward()
"""
    environment = {**os.environ, "CC": "/bin/false", "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("softmax in torch, because Triton cannot compile") and done.stdout.count("\n") == 1


def test_both_heads_return_lazy_logits_when_enabled() -> None:
    network = build_network(Config.load("demo"))
    crops = [torch.zeros(1, 3, 32, 32)]
    assert isinstance(network(crops).view_logits, torch.Tensor)
    network.set_lazy_logits()
    output = network(crops)
    assert isinstance(output.view_logits, LazyLogits) and isinstance(output.region_logits, LazyLogits)
