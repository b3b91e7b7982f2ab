"""Count what a training step asks of a GPU: launches, waits, bytes moved, and peak memory, for each preset.

    python benchmarks/gpu_counts.py
    python benchmarks/gpu_counts.py --recipe imagenet_swin_tiny_w7 --batch 64 --operators 20

None of the figures depends on the device's speed, nor on the values of tensors. They can therefore be compared over
time on a machine without a GPU, with a stand-in for the CUDA runtime that accepts launches and computes nothing. Such a
stand-in is preloaded and counts launches in an exported function ``long fake_launches()``; on a real GPU, torch's profiler
counts them.

- launches: kernels, copies and fills of one step after two warm-up steps; with a stand-in, which has no cuDNN, a
  convolution and its backward pass count as one each. Compiled: with the blocks compiled, where ``training.compile`` of
  the recipe does so; its peak of memory, too. Graphs: with ``training.cuda_graphs``, where a graph is one launch
- waits: calls that wait for the device, as reported by ``torch.cuda.set_sync_debug_mode``
- bytes: sizes of the operands and results of torch's operators and of Triton kernels; views count nothing, and every
  library kernel counts as one operator
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
from triton.runtime.jit import JITFunction

from esvit_core.config import Config
from esvit_core.data.loading.loader import TrainLoader
from esvit_core.errors import UserError
from esvit_core.models.compile_blocks import CompiledPasses
from esvit_core.models.graphed_passes import GraphedPasses
from esvit_core.training.compilation import compile_networks_
from esvit_core.training.cuda_graphs import graph_networks_
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
        compiled_launches, compiled_peak: the same with compiled blocks; None if they are not compiled.
        graph_launches: with CUDA graphs of the passes; None if there are none.
        operators: bytes by name of the operator.
        launched: launches by name of the operator.
    """

    launches: int | None = None
    waits: int = 0
    bytes: float = 0.0
    peak: int = 0
    compiled_launches: int | None = None
    compiled_peak: int | None = None
    graph_launches: int | None = None
    operators: collections.Counter[str] = field(default_factory=collections.Counter)
    launched: collections.Counter[str] = field(default_factory=collections.Counter)


class Operators(TorchDispatchMode):
    """Counts, by operator and Triton kernel, launches and the bytes of operands and results; views count nothing.

    Args:
        launches: number of launches so far; None if nothing counts them.
    """

    def __init__(self, launches: Callable[[], int] | None = None) -> None:
        super().__init__()
        self.bytes: collections.Counter[str] = collections.Counter()
        self.launches: collections.Counter[str] = collections.Counter()
        self.more_of_convolutions = 0  # launches of convolutions beyond one each
        self._launches = launches or (lambda: 0)
        self._own_operator = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before, name, self._own_operator = self._launches(), str(func.overloadpacket), func.namespace == "esvit"
        result = func(*args, **(kwargs or {}))
        self._own_operator = False
        launched = self._launches() - before
        # Without cuDNN a convolution is a loop over images.
        convolution = func.overloadpacket in (torch.ops.aten.convolution, torch.ops.aten.convolution_backward)
        self.launches[name] += 1 if convolution else launched
        self.more_of_convolutions += launched - 1 if convolution else 0
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        storages = {t.untyped_storage()._cdata for t in given}
        new = [t for t in made if t.untyped_storage()._cdata not in storages]
        if "empty" not in name and (new or func._schema.is_mutable):  # creating a tensor moves nothing
            written = new or made or given[:1]
            self.bytes[name] += sum(t.numel() * t.itemsize for t in (*given, *written))
        return result

    def __enter__(self) -> Any:
        self._run = JITFunction.run
        counted = self

        def run(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            if not counted._own_operator:  # otherwise the operator counts
                tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
                counted.bytes[kernel.__name__] += sum(t.numel() * t.itemsize for t in tensors)
                counted.launches[kernel.__name__] += 1
            return counted._run(kernel, *args, **kwargs)

        JITFunction.run = run
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        JITFunction.run = self._run
        super().__exit__(*exception)


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
    stand_in = _stand_in_launches()
    with Operators(stand_in) as operators:
        step()
    counts.operators, counts.bytes = operators.bytes, float(sum(operators.bytes.values()))
    counts.launched = operators.launches
    if stand_in is None:
        operators.more_of_convolutions = 0  # cuDNN launches one kernel
        counts.launches = _count_launches(step)
    else:
        counts.launches = sum(operators.launches.values())
    print(f"{config.recipe}: {compile_networks_(state)}")
    if isinstance(state.student.passes, CompiledPasses) and state.student.passes.blocks:
        for _ in range(WARM_UP):
            step()
        torch.cuda.reset_peak_memory_stats()
        counts.waits += _count_waits(step)
        counts.compiled_peak = torch.cuda.max_memory_allocated()
        launches = _count_launches(step)
        counts.compiled_launches = None if launches is None else launches - operators.more_of_convolutions
    _set_graphs(state)
    if isinstance(state.student.passes, GraphedPasses):
        for _ in range(WARM_UP):
            step()
        counts.waits += _count_waits(step)
        counts.graph_launches = _count_launches(step)
    _release(state)
    return counts


def _set_graphs(state: TrainState) -> None:
    """Let the networks replay CUDA graphs, if these settings and this device allow it."""
    training = state.config.training.model_copy(update={"cuda_graphs": True})
    state.config = state.config.model_copy(update={"training": training})
    try:
        print(f"{state.config.recipe}: {graph_networks_(state)}")
    except UserError as error:
        print(f"{state.config.recipe}: {error}")


def _count_waits(step: Callable[[], None]) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def _stand_in_launches() -> Callable[[], int] | None:
    """Return the counter of a preloaded stand-in for the CUDA runtime; None if there is none."""
    count = getattr(ctypes.CDLL(None), "fake_launches", None)
    if count is not None:
        count.restype = ctypes.c_long
    return count


def _count_launches(step: Callable[[], None]) -> int | None:
    if stand_in := _stand_in_launches():
        before = stand_in()
        step()
        return stand_in() - before
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
    lines = [
        "| recipe | launches | compiled | graphs | waits | GB moved | GB at the peak | compiled |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for recipe, found in rows.items():
        launches = "not counted" if found.launches is None else f"{found.launches:,}"
        compiled = "" if found.compiled_launches is None else f"{found.compiled_launches:,}"
        graphs = "" if found.graph_launches is None else f"{found.graph_launches:,}"
        compiled_peak = "" if found.compiled_peak is None else f"{found.compiled_peak / 1e9:.2f}"
        lines.append(
            f"| `{recipe}` | {launches} | {compiled} | {graphs} | {found.waits} | {found.bytes / 1e9:.1f} "
            f"| {found.peak / 1e9:.2f} | {compiled_peak} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append", help=f"default: {', '.join(PRESETS)}")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--batch", type=int, default=64, help="images of the step")
    parser.add_argument("--operators", type=int, default=0, metavar="N", help="list the N largest operators")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: torch finds no GPU; this script counts the work of one")
    torch.backends.cudnn.enabled = _stand_in_launches() is None  # a stand-in has no cuDNN
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
        for name, launches in rows[recipe].launched.most_common(arguments.operators):
            print(f"{recipe}: {name} {launches} launches")
    print(f"{arguments.batch} images a step; {describe(device)}\n")
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
