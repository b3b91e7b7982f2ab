"""The processes that train together, and their collective operations."""

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
from esvit_core.launch.signals import RENDEZVOUS_VARIABLE
from esvit_core.training.distributed.lost_peers import detect_lost_nodes, tcp_connections

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
BUCKET_BYTES = 16 << 20


@dataclass(frozen=True)
class World:
    """The process group, as seen by this process.

    Attributes:
        rank: number of this process.
        size: number of processes.
        device: device of this process's networks.
        control: gloo group for control messages on the CPU; None if there is only one process.
        sockets: file descriptors of the connections of ``control`` to the other processes.
    """

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup | None
    sockets: tuple[int, ...] = ()

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints, logs and writes checkpoints."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """Whether this is the first process of its node, which serves metrics."""
        return int(os.environ.get("LOCAL_RANK", 0)) == 0

    @property
    def node_share(self) -> float:
        """Share of the processes that run on this node, above 0 and at most 1."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size)) / self.size

    @property
    def node_processes(self) -> int:
        """Number of training processes on this node."""
        return round(self.node_share * self.size)

    def all_reduce_mean_(self, value: Tensor) -> Tensor:
        """Average ``value`` over the processes, in place."""
        if self.size > 1:
            with collective():
                dist.all_reduce(value, _mean_of(value))
            _finish_mean_(value, self.size)
        return value

    def all_gather_rows(self, rows: Tensor) -> Tensor:
        """Concatenate the rows of all processes by rank; each process passes the same number of rows."""
        if self.size == 1:
            return rows
        gathered = [torch.empty_like(rows) for _ in range(self.size)]
        with collective():
            dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    def broadcast_object(self, value: Any) -> Any:
        """Return rank 0's value on every rank; tensors arrive on the CPU."""
        if self.size == 1:
            return value
        values = [value]
        with collective():
            dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def gather_object(self, value: Any) -> list[Any] | None:
        """Return the values of all ranks on rank 0, None on the others."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.is_main else None
        with collective():
            dist.gather_object(value, values, dst=0, group=self.control)
        return values

    def barrier(self, seconds: float = 600.0) -> None:
        """Wait until every process has come here, at most ``seconds``."""
        if self.size > 1:
            with collective():
                dist.monitored_barrier(group=self.control, timeout=timedelta(seconds=seconds))

    def close(self) -> None:
        """Destroy the process group."""
        if self.size > 1:
            dist.destroy_process_group()


def init_world(patience: float = 0.0, use_gpus: bool = True) -> World:
    """Initialize the process group of the processes that torchrun has started; without torchrun, of this one alone.

    The backend is NCCL between GPUs and gloo between CPUs. The rendezvous is at ``MASTER_ADDR``, or in a file on a
    single machine.

    Args:
        patience: seconds added to the time limit of collectives, because rank 0 may wait for the store.
        use_gpus: whether each process computes on a GPU if torch can use one.
    """
    timeout = COLLECTIVE_TIMEOUT + timedelta(seconds=patience)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if use_gpus and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if size == 1:
        return World(0, 1, device, None)
    store = None
    if folder := os.environ.get(RENDEZVOUS_VARIABLE):
        # On one machine a file replaces the TCP server, which would listen on a network interface.
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
        before = tcp_connections()
        control = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(control, dist.ProcessGroup)
    sockets = tuple(tcp_connections() - before)
    detect_lost_nodes(tcp_connections())
    return World(rank, size, device, control, sockets)


class GradientReducer:
    """Averages gradients over the processes while the backward pass runs.

    It differs from DistributedDataParallel in one point that exact resume needs: DDP regroups its buckets after the
    first backward pass, so a resumed run groups its sums differently, and with three or more processes rounds them
    differently, from an uninterrupted run. Here buckets always follow the order of the parameters.

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
        """Reset the gradients.

        Args:
            passes: backward passes whose gradients are summed before they are averaged.
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
        while self._next < len(self._buckets):  # buckets with a parameter that had no gradient
            self._launch()
        with collective():
            for work in self._work:
                work.wait()
        self._work.clear()
        for bucket in self._buckets:
            _finish_mean_(bucket.flat, self._world.size)

    def _ready(self, bucket: _Bucket) -> None:
        bucket.missing -= 1
        # Launch in a fixed order, because it has to be the same in all processes.
        while self._next < len(self._buckets) and self._buckets[self._next].missing == 0:
            self._launch()

    def _launch(self) -> None:
        with collective():
            flat = self._buckets[self._next].flat
            work = dist.all_reduce(flat, _mean_of(flat), async_op=True)
        assert work is not None
        self._work.append(work)
        self._next += 1


class _Bucket:
    """Gradients that are reduced together, as views of one tensor."""

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
            p.grad = view  # set again: freeze_last_layer_ removes the gradients of a frozen layer


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


def _mean_of(value: Tensor) -> dist.ReduceOp.RedOpType:
    """Return the reduction that leads to a mean: NCCL divides itself, gloo cannot; see :func:`_finish_mean_`."""
    return dist.ReduceOp.AVG if value.is_cuda else dist.ReduceOp.SUM


def _finish_mean_(value: Tensor, processes: int) -> None:
    """Divide a sum over the processes by their number, unless the reduction has done so."""
    if not value.is_cuda:
        value.div_(processes)


class StopSaveConsensus:
    """Makes all processes stop, or save, after the same step, although signals and clocks differ between them.

    The requests of all processes are reduced while the step runs, which costs no time and no device synchronization.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._requests = torch.zeros(2, dtype=torch.int32)
        self._work: dist.Work | None = None

    def begin(self, stop: bool, save: bool) -> None:
        """Submit this process's requests for the step that begins."""
        self._requests.copy_(torch.tensor([stop, save]))
        if self._world.size > 1:
            with collective():
                self._work = dist.all_reduce(self._requests, group=self._world.control, async_op=True)

    def result(self) -> tuple[bool, bool]:
        """Return whether any process requested to stop, and to save; the same in all processes."""
        if self._work is not None:
            with collective():
                self._work.wait()
            self._work = None
        stop, save = self._requests.tolist()
        return bool(stop), bool(save)
