"""Compiled networks are tried before the first step, and a training goes on without them where that fails."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from esvit_core.data.loading.loader import Batch
from esvit_core.errors import UserError
from esvit_core.training import compilation
from esvit_core.training.compilation import compile_and_try_, compile_networks_
from esvit_core.training.loop import training_step
from esvit_core.training.state import TrainState

VIT = {"arch": "deit_tiny", "patch_size": 4, "embed_dim": None, "depths": None, "num_heads": None, "window_size": None}


def loss_of_a_step(state: TrainState) -> float:
    augment, generator = state.config.augment, torch.Generator().manual_seed(0)
    sizes = [kind.size for kind in (augment.global_crops, *augment.local_kinds) for _ in range(kind.number)]
    crops = [torch.randn(16, 3, size, size, generator=generator) for size in sizes]
    return float(training_step(state, Batch(crops, np.arange(16), 0.0), state.schedule_values()).terms.total)


def test_a_compiled_training_takes_the_same_step(assembled, capfd) -> None:
    plain, compiled = (assembled(model=VIT | {"drop_path": 0.0}) for _ in range(2))
    random = torch.get_rng_state()
    line = compile_and_try_(compiled, backend="aot_eager")
    assert line.startswith("12 blocks compiled in ")
    assert "compiling 12 blocks" in capfd.readouterr().out
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in compiled.student.parameters())
    for before, after in zip(plain.student.state_dict().values(), compiled.student.state_dict().values(), strict=True):
        assert torch.equal(before, after)
    assert loss_of_a_step(compiled) == pytest.approx(loss_of_a_step(plain), rel=1e-5)


def test_every_shape_of_a_step_is_compiled_before_it(assembled) -> None:
    state = assembled(model=VIT | {"drop_path": 0.3}, training={"max_images_per_process": 4})
    compile_and_try_(state, backend="aot_eager")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    loss_of_a_step(state)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_a_compiler_that_fails_leaves_a_training_without_compiled_blocks(assembled) -> None:
    def broken(graph, inputs):
        raise OSError("no space left on device")

    state, plain = (assembled(model=VIT | {"drop_path": 0.0}) for _ in range(2))
    line = compile_and_try_(state, backend=broken)
    assert line.startswith("blocks not compiled (")
    assert "no space left on device" in line
    assert loss_of_a_step(state) == pytest.approx(loss_of_a_step(plain), rel=1e-5)


def test_networks_on_a_cpu_are_not_compiled_and_asking_for_it_is_an_error(assembled) -> None:
    state = assembled()
    assert compile_networks_(state) == ""
    assert state.student.passes is None
    with pytest.raises(UserError, match=r"training\.compile: true, but only networks on a GPU are compiled"):
        compile_networks_(assembled(training={"compile": True}))


@pytest.mark.parametrize(
    ("sections", "problem", "reason"),
    [
        ({"training": {"compile": False}}, "", "as configured"),
        ({}, "Triton is not installed", "Triton is not installed"),
        ({"launch": {"activation_checkpointing": True}}, "", "launch.activation_checkpointing computes blocks again"),
        ({"model": dict.fromkeys(VIT) | {"arch": "resnet18"}}, "", "resnet18 has no linear layers"),
    ],
)
def test_networks_on_a_gpu_that_are_not_compiled_have_a_reason(
    assembled, monkeypatch, sections, problem, reason
) -> None:
    monkeypatch.setattr(compilation, "triton_problem", lambda device: problem)
    state = assembled(**({"model": VIT} | sections))
    on_gpu = dataclasses.replace(state, world=dataclasses.replace(state.world, device=torch.device("cuda", 0)))
    assert compile_networks_(on_gpu) == f"blocks not compiled ({reason})"
    assert state.student.passes is None
