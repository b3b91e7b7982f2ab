"""Count what a training step asks of a GPU: launches, waits, bytes moved, and peak memory, for each preset.

    python benchmarks/gpu_counts.py
    python benchmarks/gpu_counts.py --recipe imagenet_swin_tiny_w7 --batch 64 --operators 20

None of the figures depends on the device's speed, nor on the values of tensors. They can therefore be compared over
time on a machine without a GPU, with a stand-in for the CUDA runtime that accepts launches and computes nothing. Such a
stand-in is preloaded and counts launches in an exported function ``long fake_launches()``; on a real GPU, torch's profiler
counts them.

- launches: kernels, copies and fills of one step after two warm-up steps; with a stand-in, which has no cuDNN, a
  convolution and its backward pass count as one each
- waits: calls that wait for the device, as reported by ``torch.cuda.set_sync_debug_mode``
- bytes: sizes of the operands and results of torch's operators; views count nothing, a Triton kernel counts nothing, and
  every library kernel counts as one operator
- peak: memory that torch's allocator has handed out at most, the batch included
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from machine import describe
from noise_batch import noise_batch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from esvit_core.config import Config
from esvit_core.data.loading.loader import TrainLoader
from esvit_core.errors import UserError
from esvit_core.training.distributed.processes import World
from esvit_core.training.loop import training_step
from esvit_core.training.state import (
    TrainState,
    apply_activation_checkpointing_,
    assemble_train_state,
    make_deterministic,
)

PRESETS = (
    "imagenet_swin_tiny_w7",
    "imagenet_swin_tiny_w7_view",
    "imagenet_swin_small_w7",
    "imagenet_swin_base_w7",
    "imagenet_swin_base_w14",
    "imagenet_vil_2262",
    "imagenet_cvt_tiny",
    "imagenet_resnet50",
)
WARM_UP = 2


@dataclass
class OneBatch:
    """A stand-in for the loader: an epoch of one step."""

    steps_per_epoch: int = 1


@dataclass
class Counts:
    """Figures of one step.

    Attributes:
        launches: None if nothing counts them here.
        waits: number of waits for the device.
        bytes: moved by operators.
        peak: bytes of memory.
        operators: bytes by name of the operator.
    """

    launches: int | None = None
    waits: int = 0
    bytes: float = 0.0
    peak: int = 0
    operators: collections.Counter[str] = field(default_factory=collections.Counter)


class MovedBytes(TorchDispatchMode):
    """Adds up the bytes of the operands and results of every operator that is not a view."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        storages = {t.untyped_storage()._cdata for t in given}
        new = [t for t in made if t.untyped_storage()._cdata not in storages]
        if new or func._schema.is_mutable:
            written = new or made or given[:1]
            self.operators[str(func.overloadpacket)] += sum(t.numel() * t.itemsize for t in (*given, *written))
        return result


class _Convolutions(TorchDispatchMode):
    """Counts what convolutions launch beyond one kernel each: without cuDNN they are loops over images."""

    def __init__(self, count: Callable[[], int]) -> None:
        super().__init__()
        self._count, self.excess = count, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self._count()
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.convolution, torch.ops.aten.convolution_backward):
            self.excess += self._count() - before - 1
        return result


def count_step(config: Config, batch_size: int, device: torch.device) -> Counts:
    """Count one step of ``config`` on ``batch_size`` images of noise on ``device``, a GPU."""
    training = config.training.model_copy(update={"batch_size": batch_size})
    config = config.model_copy(update={"training": training})
    state = assemble_train_state(config, World(0, 1, device, None), cast(TrainLoader, OneBatch()))
    if config.launch.activation_checkpointing:
        apply_activation_checkpointing_(state.student, config.model.arch)
    batch = noise_batch(config, batch_size)

    def step() -> None:
        training_step(state, batch, state.schedule_values())

    for _ in range(WARM_UP):
        step()
    counts = Counts()
    torch.cuda.reset_peak_memory_stats()
    counts.waits = _count_waits(step)
    counts.peak = torch.cuda.max_memory_allocated()
    counts.launches = _count_launches(step)
    with MovedBytes() as moved:
        step()
    counts.operators, counts.bytes = moved.operators, float(sum(moved.operators.values()))
    _release(state)
    return counts


def _count_waits(step: Callable[[], None]) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def _count_launches(step: Callable[[], None]) -> int | None:
    count = getattr(ctypes.CDLL(None), "fake_launches", None)
    if count is not None:  # of a preloaded stand-in for the CUDA runtime
        count.restype = ctypes.c_long
        with _Convolutions(count) as convolutions:
            before = count()
            step()
            return int(count() - before - convolutions.excess)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return len(events) or None


def _release(state: TrainState) -> None:
    for network in (state.student, state.teacher):
        network.to("meta")
    state.optimizer.state.clear()
    torch.cuda.empty_cache()


def table(rows: dict[str, Counts]) -> list[str]:
    """Return the lines of the Markdown table."""
    lines = ["| recipe | launches | waits | GB moved | GB at the peak |", "| --- | --- | --- | --- | --- |"]
    for recipe, found in rows.items():
        launches = "not counted" if found.launches is None else f"{found.launches:,}"
        lines.append(f"| `{recipe}` | {launches} | {found.waits} | {found.bytes / 1e9:.1f} | {found.peak / 1e9:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append", help=f"default: {', '.join(PRESETS)}")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--batch", type=int, default=64, help="images of the step")
    parser.add_argument("--operators", type=int, default=0, metavar="N", help="the N operators that move most bytes")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: torch finds no GPU; this script counts the work of one")
    torch.backends.cudnn.enabled = not hasattr(ctypes.CDLL(None), "fake_launches")  # a stand-in has no cuDNN
    device, rows = torch.device("cuda", 0), {}
    for recipe in arguments.recipe or PRESETS:
        try:
            config = Config.load(recipe, arguments.set)
        except UserError as error:
            raise SystemExit(f"error: {error}") from None
        if config.training.deterministic:
            make_deterministic()
        rows[recipe] = count_step(config, arguments.batch, device)
        for name, size in rows[recipe].operators.most_common(arguments.operators):
            print(f"{recipe}: {name} {size / 1e9:.1f} GB")
    print(f"{arguments.batch} images a step; {describe(device)}\n")
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
