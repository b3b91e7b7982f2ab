"""Worker processes that load batches, and errors that end the training when a worker dies, hangs, or lacks memory.

A batch travels from a worker to the training process in shared memory, on Linux the file system /dev/shm, which has 64 MiB
in a container by default. PyTorch's ``DataLoader`` moves a batch to shared memory in a thread of the worker. A failure
there is not reported, and the training process would wait forever. Here the worker itself moves the batch, and sends its
error in place of the batch.
"""

from __future__ import annotations

import contextlib
import functools
import math
import multiprocessing
import multiprocessing.connection
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

from esvit_core.config.training_settings import PREFETCH_FACTOR, WORKERS_PER_GPU
from esvit_core.errors import InfrastructureError, UserError

Crops = list[torch.Tensor]
SHARED_MEMORY = Path("/dev/shm")
TIMEOUT_SECONDS = 1200  # without a batch, in addition to the grace period of the store
_DEATH_SECONDS = 5.0  # that a worker which closed its connection takes to exit
SHARED_MEMORY_HELP = "lower training.workers (0 disables workers), or enlarge /dev/shm (cluster.train.shared_memory; in Docker --shm-size)"


class WorkerBatches:
    """Loads batches in worker processes, which are kept between epochs.

    Args:
        batches: loads the batch of a key.
        workers: number of processes.
        store_grace: seconds that a worker may wait for the object store.
    """

    def __init__(self, batches: Dataset[Crops], workers: int, store_grace: float) -> None:
        self._keys = _Keys()
        self._limit = TIMEOUT_SECONDS + store_grace
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._waiting = self._hung = False
        self._handler: Any = signal.SIG_DFL
        self._loader: DataLoader[Any] = DataLoader(
            _Shared(batches),
            sampler=self._keys,
            batch_size=None,  # an item is already a whole batch
            num_workers=workers,
            prefetch_factor=PREFETCH_FACTOR,
            persistent_workers=True,
            pin_memory=torch.cuda.is_available(),
            timeout=self._limit,
            worker_init_fn=_reset_signal_handlers,
        )

    def load(self, keys: Sequence[Any]) -> Iterator[Crops]:
        """Let the workers begin, and return an iterator over the batches of the keys, in order.

        Raises, as the iterator does:
            UserError: there is too little shared memory.
            InfrastructureError: a worker died, or none has answered for a long time.
            Exception: the exception that a worker raised.
        """
        self._keys.keys = keys
        return self._received(self._wait(self._start), len(keys))

    def _received(self, loaded: Iterator[Any], count: int) -> Iterator[Crops]:
        for _ in range(count):
            with self._limited():
                item = self._wait(lambda: next(loaded))
            if isinstance(item, Exception):
                raise item
            yield item

    def close(self) -> None:
        """End the workers, and restore the signal handler of this process."""
        if self._processes and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, self._handler)
        del self._loader  # which ends its workers, unless the traceback of an exception still refers to it
        self._kill_workers()
        self._processes = []

    @contextlib.contextmanager
    def _limited(self) -> Iterator[None]:
        """Kill the workers if one hangs while it hands over a batch: torch's time limit ends before that."""
        timer = threading.Timer(self._limit + _DEATH_SECONDS, self._end_hanging)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _end_hanging(self) -> None:
        self._hung = True
        for process in self._processes:
            process.kill()

    def _start(self) -> Iterator[Any]:
        """Start the workers, or let the running ones begin with the current keys."""
        if self._processes:
            return iter(self._loader)
        others = set(multiprocessing.active_children())
        handler = self._handler = signal.getsignal(signal.SIGCHLD)
        loaded = iter(self._loader)
        self._processes = [process for process in multiprocessing.active_children() if process not in others]
        if threading.current_thread() is threading.main_thread():
            # torch's handler would raise an error wherever the training happens to be when a worker dies.
            signal.signal(signal.SIGCHLD, functools.partial(self._handle_child_exit, handler))
        return loaded

    def _handle_child_exit(self, other: Any, number: int, frame: FrameType | None) -> None:
        if callable(other):
            other(number, frame)
        if self._waiting and self._exited():
            raise _WorkerDiedError

    def _exited(self) -> list[multiprocessing.process.BaseProcess]:
        return [process for process in self._processes if process.exitcode is not None]

    def _wait(self, answer: Callable[[], Any]) -> Any:
        """Return the result of ``answer``, which waits for the workers."""
        start = time.monotonic()
        try:
            self._waiting = True
            try:
                if self._exited():
                    raise _WorkerDiedError
                return answer()
            finally:
                self._waiting = False  # from here on, our signal handler raises nothing
        except (RuntimeError, ConnectionError, FileNotFoundError, EOFError) as error:
            # From our signal handler, from torch, or because the worker died while it handed over a batch.
            self._waiting = False
            if not isinstance(error, RuntimeError):
                self._wait_for_an_exit()
            dead, seconds = self._exited(), time.monotonic() - start
            if not dead and seconds < self._limit:
                raise
            self._kill_workers()
            hung = self._hung or not dead
            raise InfrastructureError(_timeout_message(seconds) if hung else _exit_message(dead[0])) from None

    def _wait_for_an_exit(self) -> None:
        """Wait until a worker that has closed its connection has exited, too."""
        ended = multiprocessing.connection.wait([process.sentinel for process in self._processes], _DEATH_SECONDS)
        for process in self._processes:
            if process.sentinel in ended:  # which is closed before the exit code can be read
                process.join(_DEATH_SECONDS)

    def _kill_workers(self) -> None:
        """Kill all workers, including hanging ones: otherwise this process would wait for them when it exits."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


class _WorkerDiedError(RuntimeError):
    """A worker has exited; the others may wait for its data."""


class _Shared(Dataset[Any]):
    """In a worker: puts batches into shared memory, and returns exceptions as items for the training process to raise."""

    def __init__(self, batches: Dataset[Crops]) -> None:
        self._batches = batches

    def __getitem__(self, key: Any) -> Crops | Exception:
        try:
            crops = self._batches[key]
        except Exception as error:
            return _picklable(error)
        try:
            return [crop.share_memory_() for crop in crops]
        except (RuntimeError, OSError) as error:
            reason = str(error).partition("\n")[0]
            size = sum(crop.nbytes for crop in crops)
            return UserError(
                f"training.workers: no shared memory for a batch of {_format_bytes(size)} "
                f"({_format_bytes(free_shared_memory() or 0)} free in {SHARED_MEMORY}; {reason}): {SHARED_MEMORY_HELP}"
            )


class _Keys(Sampler[Any]):
    """The keys of the current epoch's batches."""

    def __init__(self) -> None:
        self.keys: Sequence[Any] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.keys)


def shared_memory_line(workers: int, batch_bytes: int, processes: int) -> str:
    """Compare the shared memory that the workers of a machine need with what is free, as one line.

    Args:
        workers: number of workers of each training process.
        batch_bytes: size of a training process's batch of crops.
        processes: training processes on this machine.

    Raises:
        UserError: there is too little shared memory.
    """
    # The prepared batches, and the one in use while the next is taken.
    needed = processes * (workers * PREFETCH_FACTOR + 1) * batch_bytes
    free = free_shared_memory()
    if free is None:
        return f"data loading: {workers} workers per process use up to {_format_bytes(needed)} of shared memory"
    if needed > free:
        raise UserError(
            f"training.workers {workers}: the batches that the workers prepare need {_format_bytes(needed)} of shared memory, "
            f"and {_format_bytes(free)} are free in {SHARED_MEMORY}: {SHARED_MEMORY_HELP}"
        )
    return (
        f"data loading: {workers} workers per process use up to {_format_bytes(needed)} of shared memory; "
        f"{_format_bytes(free)} are free in {SHARED_MEMORY}"
    )


def choose_workers(batch_bytes: int, processes: int, cores: int, most: int = WORKERS_PER_GPU) -> int:
    """Return the number of workers per training process on a GPU for ``training.workers: auto``.

    Each training process keeps a core for itself, and the prepared batches must fit into shared memory.

    Args:
        batch_bytes: size of a training process's batch of crops.
        processes: training processes on this machine.
        cores: cores that they may use.
        most: upper limit.
    """
    by_cores = cores // processes - 1
    free = free_shared_memory()
    batches = math.inf if free is None else free // (processes * batch_bytes)
    by_memory = (batches - 1) // PREFETCH_FACTOR
    return int(max(0, min(most, by_cores, by_memory)))


def free_shared_memory() -> int | None:
    """Return the free bytes of the file system for shared memory; None if this system has none."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def _reset_signal_handlers(worker: int) -> None:
    """In a worker: drop the copied signal handlers, because the training process decides how to react to signals."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error


def _exit_message(process: multiprocessing.process.BaseProcess) -> str:
    code = process.exitcode or 0
    if code >= 0:
        return f"data loading: worker process {process.pid} exited with code {code}; see the log for its last output"
    name = signal.Signals(-code).name
    if -code == signal.SIGBUS:
        return (
            f"data loading: worker process {process.pid} was killed by SIGBUS (/dev/shm is full?): {SHARED_MEMORY_HELP}"
        )
    if -code == signal.SIGKILL:
        name += " (out of memory?)"
    return (
        f"data loading: worker process {process.pid} was killed by {name}: lower training.workers (0 disables workers), "
        "or give the training more memory"
    )


def _timeout_message(seconds: float) -> str:
    return (
        f"data loading: no batch for {seconds / 60:.0f} minutes although every worker process is alive: a worker hangs; "
        "set training.workers to 0 to load in the training process"
    )


def _format_bytes(number: float) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
