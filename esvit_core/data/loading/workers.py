"""Worker processes that load batches, and what ends a training when one of them dies, falls silent, or lacks memory.

A batch travels from a worker to the training process in shared memory, which on Linux is the file system /dev/shm: 64 MiB in
a container unless it asks for more. PyTorch's ``DataLoader`` shares a batch in a thread of the worker, whose failure nobody
hears of: the training process would wait for ever. Here the worker itself shares the batch, and its failure is an item.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from esvit_core.errors import InfrastructureError, UserError

Crops = list[torch.Tensor]
SHARED_MEMORY = Path("/dev/shm")
PREFETCH = 2  # batches that each worker prepares ahead
SILENCE_SECONDS = 1200  # without a batch, beyond the patience with the store: a worker hangs
MORE_MEMORY = (
    "set training.workers to 0 or lower it, or make /dev/shm larger (cluster.train.shared_memory; in Docker --shm-size)"
)


class WorkerBatches:
    """Batches from worker processes, which outlive an epoch.

    Args:
        batches: loads the batch of a key.
        workers: number of processes.
        patience: seconds that a worker may wait for the object store.
    """

    def __init__(self, batches: Dataset[Crops], workers: int, patience: float) -> None:
        self._keys = _Keys()
        self._limit = SILENCE_SECONDS + patience
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._waiting = False
        self._loader: DataLoader[Any] = DataLoader(
            _Shared(batches),
            sampler=self._keys,
            batch_size=None,  # an item is a whole batch already
            num_workers=workers,
            prefetch_factor=PREFETCH,
            persistent_workers=True,
            pin_memory=torch.cuda.is_available(),
            timeout=self._limit,
            worker_init_fn=_leave_signals_alone,
        )

    def load(self, keys: Sequence[Any]) -> Iterator[Crops]:
        """The batches of the keys, in their order.

        Raises:
            UserError: shared memory is too small.
            InfrastructureError: a worker died, or none has answered for a long time.
            Exception: what a worker raised.
        """
        self._keys.keys = keys
        loaded = self._wait(self._start)
        for _ in keys:
            item = self._wait(lambda: next(loaded))
            if isinstance(item, Exception):
                raise item
            yield item

    def _start(self) -> Iterator[Any]:
        """Start the workers, or have them begin with the present keys."""
        if self._processes:
            return iter(self._loader)
        others = set(multiprocessing.active_children())
        handler = signal.getsignal(signal.SIGCHLD)
        loaded = iter(self._loader)
        self._processes = [process for process in multiprocessing.active_children() if process not in others]
        if threading.current_thread() is threading.main_thread():
            # torch's handler raises the death of a worker wherever the training is at that moment.
            signal.signal(signal.SIGCHLD, functools.partial(self._child_ended, handler))
        return loaded

    def _child_ended(self, other: Any, number: int, frame: FrameType | None) -> None:
        if callable(other):
            other(number, frame)
        if self._waiting and self._dead():
            raise _WorkerDiedError

    def _dead(self) -> list[multiprocessing.process.BaseProcess]:
        return [process for process in self._processes if process.exitcode is not None]

    def _wait(self, answer: Callable[[], Any]) -> Any:
        """What ``answer`` returns, which waits for the workers."""
        start = time.monotonic()
        self._waiting = True
        try:
            if self._dead():
                raise _WorkerDiedError
            return answer()
        except RuntimeError:  # ours or torch's
            dead, seconds = self._dead(), time.monotonic() - start
            if not dead and seconds < self._limit:
                raise
            message = _death(dead[0]) if dead else _silence(seconds)
            self._waiting = False
            self._end()
            raise InfrastructureError(message) from None
        finally:
            self._waiting = False

    def _end(self) -> None:
        """End every worker, also one that hangs: at its exit, a process waits for those it has started."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


class _WorkerDiedError(RuntimeError):
    """A worker has ended; the others may wait for what it has."""


class _Shared(Dataset[Any]):
    """In a worker: the batches in shared memory, and errors as items, which the training process raises."""

    def __init__(self, batches: Dataset[Crops]) -> None:
        self._batches = batches

    def __getitem__(self, key: Any) -> Crops | Exception:
        try:
            crops = self._batches[key]
        except Exception as error:
            return _sendable(error)
        try:
            return [crop.share_memory_() for crop in crops]
        except (RuntimeError, OSError) as error:
            reason = str(error).partition("\n")[0]
            size = sum(crop.nbytes for crop in crops)
            return UserError(
                f"training.workers: no shared memory for a batch of {_bytes(size)} "
                f"({_bytes(free_shared_memory() or 0)} free in {SHARED_MEMORY}; {reason}): {MORE_MEMORY}"
            )


class _Keys(Sampler[Any]):
    """The batches of the present epoch."""

    def __init__(self) -> None:
        self.keys: Sequence[Any] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.keys)


def shared_memory_line(workers: int, batch_bytes: int, processes: int) -> str:
    """Compare the shared memory that the workers of a machine need with what there is, in one line.

    Args:
        workers: of each training process.
        batch_bytes: of a training process's batch of crops.
        processes: training processes of this machine.

    Raises:
        UserError: there is too little.
    """
    # What the workers have prepared, and the batch that is being used while the next one is taken.
    needed = processes * (workers * PREFETCH + 1) * batch_bytes
    free = free_shared_memory()
    if free is None:
        return f"data loading: {workers} workers per process keep up to {_bytes(needed)} in shared memory"
    if needed > free:
        raise UserError(
            f"training.workers {workers}: the batches that the workers prepare need {_bytes(needed)} of shared memory, "
            f"and {_bytes(free)} are free in {SHARED_MEMORY}: {MORE_MEMORY}"
        )
    return (
        f"data loading: {workers} workers per process keep up to {_bytes(needed)} in shared memory; "
        f"{_bytes(free)} are free in {SHARED_MEMORY}"
    )


def free_shared_memory() -> int | None:
    """Free bytes of the file system that holds shared memory; None: this system has no such file system."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def _leave_signals_alone(worker: int) -> None:
    """In a worker: the training process decides what a signal means; the handlers that were copied from it go."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error


def _death(process: multiprocessing.process.BaseProcess) -> str:
    code = process.exitcode or 0
    if code >= 0:
        return f"data loading: worker process {process.pid} ended with exit code {code}; the log has its last words"
    name = signal.Signals(-code).name
    if -code == signal.SIGBUS:
        return f"data loading: worker process {process.pid} was killed by SIGBUS (/dev/shm is full?): {MORE_MEMORY}"
    if -code == signal.SIGKILL:
        name += " (out of memory?)"
    return (
        f"data loading: worker process {process.pid} was killed by {name}: lower training.workers (0: no worker "
        "processes), or give the training more memory"
    )


def _silence(seconds: float) -> str:
    return (
        f"data loading: no batch for {seconds / 60:.0f} minutes, though every worker process is alive: one of them hangs; "
        "training.workers: 0 loads in the training process itself"
    )


def _bytes(number: float) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
