"""The processes that train together: who they are, and what they say to each other."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from esvit_core.collectives import collective
from esvit_core.launch.stop import RENDEZVOUS_VARIABLE

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
BUCKET_BYTES = 16 << 20


@dataclass(frozen=True)
class World:
    """This process among those that train together.

    Attributes:
        rank, size: number of this process, and how many there are.
        device: where its networks are.
        control: gloo group for words between the processes on the CPU; None when alone.
    """

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup | None

    @property
    def first(self) -> bool:
        """Whether this process speaks for all: prints, logs, writes checkpoints."""
        return self.rank == 0

    @property
    def first_of_node(self) -> bool:
        """Whether this process speaks for those of its machine: serves metrics."""
        return int(os.environ.get("LOCAL_RANK", 0)) == 0

    @property
    def node_share(self) -> float:
        """The share of the processes that run on this machine, above 0 and at most 1."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size)) / self.size

    def mean_(self, value: Tensor) -> Tensor:
        """Average ``value`` over the processes, in place."""
        if self.size > 1:
            with collective():
                dist.all_reduce(value)
            value.div_(self.size)
        return value

    def rows_of_all(self, rows: Tensor) -> Tensor:
        """The rows of all processes, by rank; each process brings equally many."""
        if self.size == 1:
            return rows
        gathered = [torch.empty_like(rows) for _ in range(self.size)]
        with collective():
            dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    def from_first(self, value: Any) -> Any:
        """What rank 0 gives, on every rank; each tensor arrives on the CPU."""
        if self.size == 1:
            return value
        box = [value]
        with collective():
            dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def to_first(self, value: Any) -> list[Any] | None:
        """What every rank gives, on rank 0; None on the others."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.first else None
        with collective():
            dist.gather_object(value, values, dst=0, group=self.control)
        return values

    def wait_for_all(self, seconds: float = 600.0) -> None:
        """Until every process has come here, but not longer than ``seconds``."""
        if self.size > 1:
            with collective():
                dist.monitored_barrier(group=self.control, timeout=timedelta(seconds=seconds))

    def leave(self) -> None:
        """Part from the others in order."""
        if self.size > 1:
            dist.destroy_process_group()


def join_world(patience: float = 0.0) -> World:
    """Join the processes that torchrun has started; alone, without torchrun, this process is the world.

    NCCL between GPUs, gloo between CPUs. They meet where torchrun says (``MASTER_ADDR``), on one machine in a file.

    Args:
        patience: seconds that the others may be kept waiting, beyond what is usual.
    """
    timeout = COLLECTIVE_TIMEOUT + timedelta(seconds=patience)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if size == 1:
        return World(0, 1, device, None)
    store = None
    if folder := os.environ.get(RENDEZVOUS_VARIABLE):
        # On one machine a file does what a TCP server does, and listens on no interface.
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.FileStore(str(Path(folder) / f"workers-{restart}"), size)
    with collective():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timeout,
        )
        control = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(control, dist.ProcessGroup)
    return World(rank, size, device, control)


class GradientReducer:
    """Averages gradients over the processes while the backward pass still runs.

    What DistributedDataParallel does, with one difference that exact resume needs: DDP regroups its buckets after
    the first backward pass, so that the sums of a process that has just been resumed are grouped, and with three or
    more processes rounded, differently from those of one that was not. Here buckets follow the order of the
    parameters, always.

    Args:
        parameters: of the student, in the order of the forward pass.
        world: the processes.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], world: World) -> None:
        self._world = world
        self._parameters = [p for p in parameters if p.requires_grad]
        self._buckets: list[_Bucket] = []
        self._next = 0
        self._work: list[dist.Work] = []
        if world.size == 1:
            return
        bucket_of: dict[nn.Parameter, _Bucket] = {}
        for group in _grouped(reversed(self._parameters)):  # the last layers' gradients are ready first
            bucket = _Bucket(group)
            self._buckets.append(bucket)
            bucket_of |= dict.fromkeys(group, bucket)
        for p, bucket in bucket_of.items():
            p.register_post_accumulate_grad_hook(lambda _, bucket=bucket: self._ready(bucket))

    def zero(self, passes: int = 1) -> None:
        """Forget the gradients.

        Args:
            passes: backward passes whose gradients add up before they are averaged.
        """
        if self._world.size == 1:
            for p in self._parameters:
                p.grad = None
            return
        self._next = 0
        for bucket in self._buckets:
            bucket.zero(passes)

    def finish(self) -> None:
        """Wait until every gradient is the mean over the processes."""
        while self._next < len(self._buckets):  # those with a parameter that took no part
            self._launch()
        with collective():
            for work in self._work:
                work.wait()
        self._work.clear()
        for bucket in self._buckets:
            bucket.flat.div_(self._world.size)

    def _ready(self, bucket: _Bucket) -> None:
        bucket.missing -= 1
        # In order, whatever order they become ready in: the processes must agree on it.
        while self._next < len(self._buckets) and self._buckets[self._next].missing == 0:
            self._launch()

    def _launch(self) -> None:
        with collective():
            work = dist.all_reduce(self._buckets[self._next].flat, async_op=True)
        assert work is not None
        self._work.append(work)
        self._next += 1


class _Bucket:
    """Gradients that travel together, as views of one tensor."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.missing = 0
        first = parameters[0]
        self.flat = torch.zeros(sum(p.numel() for p in parameters), dtype=first.dtype, device=first.device)
        parts = self.flat.split([p.numel() for p in parameters])
        self._views = [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]

    def zero(self, passes: int) -> None:
        self.flat.zero_()
        self.missing = passes * len(self.parameters)
        for p, view in zip(self.parameters, self._views, strict=True):
            p.grad = view  # anew: a frozen layer's gradient is taken away after the backward pass


def _grouped(parameters: Iterable[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    group: list[nn.Parameter] = []
    size = 0
    for p in parameters:
        if group and (size + p.nbytes > BUCKET_BYTES or p.dtype != group[0].dtype):
            yield group
            group, size = [], 0
        group.append(p)
        size += p.nbytes
    if group:
        yield group


class Vote:
    """Lets all processes stop, or save, after the same step, though signals and clocks reach them at different moments.

    The vote of a step is counted while the step runs, so it costs no time and no synchronisation with the device.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._votes = torch.zeros(2, dtype=torch.int32)
        self._work: dist.Work | None = None

    def begin(self, stop: bool, save: bool) -> None:
        """Give this process's votes for the step that begins."""
        self._votes.copy_(torch.tensor([stop, save]))
        if self._world.size > 1:
            with collective():
                self._work = dist.all_reduce(self._votes, group=self._world.control, async_op=True)

    def result(self) -> tuple[bool, bool]:
        """Whether any process has voted to stop, and to save: the same answer on all."""
        if self._work is not None:
            with collective():
                self._work.wait()
            self._work = None
        stop, save = self._votes.tolist()
        return bool(stop), bool(save)
