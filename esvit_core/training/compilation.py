"""Compile the blocks of a training's networks on a GPU, and try them before the first step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from esvit_core.errors import UserError
from esvit_core.kernels.half_linear import PointwiseConv
from esvit_core.kernels.triton_support import LONGEST_REASON, triton_problem
from esvit_core.models.compile_blocks import CompiledPasses
from esvit_core.models.multicrop import MultiCropNetwork
from esvit_core.training.state import TrainState


def compile_networks_(state: TrainState) -> str:
    """Compile student and teacher in place as ``training.compile`` asks.

    Every shape of a step is compiled here, forward and backward. If that fails, the networks compute without compiled
    blocks.

    Returns:
        What was done, as part of a line for the log; "" on a CPU.

    Raises:
        UserError: ``training.compile`` is true, and these networks cannot be compiled here.
    """
    setting = state.config.training.compile
    problem = _why_not(state)
    if setting is True and problem:
        raise UserError(f"training.compile: true, but {problem}; expected auto or false")
    if state.world.device.type != "cuda":
        return ""
    if not setting or problem:
        return f"blocks not compiled ({problem or 'as configured'})"
    return compile_and_try_(
        state, **({"options": {"deterministic": True}} if state.config.training.deterministic else {})
    )


def compile_and_try_(state: TrainState, **options: Any) -> str:
    """Compile student and teacher with ``torch.compile`` and these options; return what :func:`compile_networks_` does."""
    networks, start = (state.student, state.teacher), time.monotonic()
    passes = [CompiledPasses(network.backbone, **options) for network in networks]
    for network, compiled in zip(networks, passes, strict=True):
        network.passes = compiled
    count = len(passes[0].blocks)
    if state.world.is_main:
        print(f"train: compiling {count} blocks; the first time on a machine this takes minutes", flush=True)
    try:
        _try_passes(state)
    except Exception as error:  # of the compiler, the linker, the driver or torch
        for compiled in passes:
            compiled.undo_()
        return f"blocks not compiled ({describe_failure(error)})"
    return f"{count} blocks compiled in {time.monotonic() - start:.0f} s"


def describe_failure(error: Exception) -> str:
    """Describe an error of a compiler or of the driver in one short line."""
    reason = " ".join(str(error).splitlines()[:2])  # such as "backend='inductor' raised:" and the cause
    return f"{type(error).__name__}: {reason[:LONGEST_REASON]}"


def _why_not(state: TrainState) -> str:
    """Return why the networks cannot be compiled here; "" if they can."""
    config, device, setting = state.config, state.world.device, state.config.training.compile
    if device.type != "cuda":
        return "only networks on a GPU are compiled"
    if problem := triton_problem(device):
        return problem
    if state.student.passes is not None:
        return f"{config.model.arch} has kernels of its own"
    if config.launch.activation_checkpointing:
        return "launch.activation_checkpointing computes blocks again"
    backbone = state.student.backbone
    if setting == "auto" and not any(isinstance(module, nn.Linear | PointwiseConv) for module in backbone.modules()):
        return f"{config.model.arch} has no linear layers"  # a compiled ResNet has more kernels
    if any(isinstance(module, nn.SyncBatchNorm) for module in backbone.modules()):
        return f"the batch norms of {config.model.arch} communicate between the processes"
    return ""


def _try_passes(state: TrainState) -> None:
    """Compute the passes of a step forward and backward; buffers, gradients and random numbers stay as they are."""
    student, teacher = state.student, state.teacher
    with unchanged(state):
        batches = blank_batches(state)
        with state.precision.autocast():
            with torch.no_grad():
                _sum_of_passes(teacher, batches[:1])
            loss = _sum_of_passes(student, batches)
        torch.autograd.grad(loss, [p for p in student.backbone.parameters() if p.requires_grad], allow_unused=True)


@contextlib.contextmanager
def unchanged(state: TrainState) -> Iterator[None]:
    """Restore buffers and random numbers after passes that are no part of the training."""
    device = state.world.device
    kept = [(buffer, buffer.clone()) for network in (state.student, state.teacher) for buffer in network.buffers()]
    if state.half_weights is not None:
        state.half_weights.update_()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


def blank_batches(state: TrainState) -> list[Tensor]:
    """Return blank crops as :class:`MultiCropNetwork` batches those of a step; the first batch has the global crops."""
    images = state.config.training.micro_batch(state.world.size)
    counts = [(size, len(list(group))) for size, group in groupby(state.config.augment.crop_sizes)]
    return [torch.zeros(number * images, 3, size, size, device=state.world.device) for size, number in counts]


def _sum_of_passes(network: MultiCropNetwork, batches: list[Tensor]) -> Tensor:
    assert network.passes is not None
    parts = [part.float().sum() for outputs in network.passes(network.backbone, batches) for part in outputs]
    return torch.stack(parts).sum()
