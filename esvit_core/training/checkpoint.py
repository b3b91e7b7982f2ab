"""Checkpoints in the object store: complete or absent, the newest valid one found again.

A checkpoint is the list of the run's stateful things, a file each, below ``training/checkpoints/<step:08d>/``; its
manifest, with sizes and SHA-256, is written last. It does not depend on the number of processes: they hold the same
state, and everything random is drawn anew at every step from (seed, step, rank).

Training waits for the copy from the device alone. A thread writes the copy to this machine's disk, another brings it
into the store (:mod:`esvit_core.storage.upload_queue`); as long as the store does not answer the newest one waits there,
and a run that is started again on this machine goes on from it if it is newer than what the store has.
"""

from __future__ import annotations

import io
import pickle
import time
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch

from esvit_core.errors import InfrastructureError, UserError
from esvit_core.runs.training_summary import LATEST
from esvit_core.storage import IntegrityError, NotFound, ObjectStore, Pointer, join_uri
from esvit_core.storage.disk import disk_error_class
from esvit_core.storage.publication import check_set, describe, put_set
from esvit_core.storage.store_errors import LocalDiskError
from esvit_core.storage.upload_queue import PENDING_VARIABLE, UploadQueue

CHECKPOINTS = "training/checkpoints"
KIND = "checkpoint"


class Stateful(Protocol):
    """Something that must survive a restart."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


@dataclass(frozen=True)
class Written:
    """A checkpoint that is complete in the store.

    Attributes:
        seconds: from the beginning of the copy to the end of the upload.
    """

    step: int
    uri: str
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Restored:
    """A checkpoint that was read.

    Attributes:
        step: steps done when it was written.
        place: its folder, in the store or on this machine.
        states: the state of each stateful thing, by name, on the CPU.
    """

    step: int
    place: str
    states: dict[str, Any]


@dataclass(frozen=True)
class Retention:
    """Which complete checkpoints stay.

    Attributes:
        last: the newest ones, so many.
        every_steps: those whose step is a multiple of it; 0: none for that reason.
        best: the one with the lowest loss.
    """

    last: int = 3
    every_steps: int = 0
    best: bool = False

    def kept(self, losses: Mapping[int, float | None]) -> set[int]:
        """Of the checkpoints with these steps and losses, those that stay."""
        steps = sorted(losses)
        kept = set(steps[-self.last :])
        if self.every_steps:
            kept |= {step for step in steps if step % self.every_steps == 0}
        known = {step: loss for step, loss in losses.items() if loss is not None}
        if self.best and known:
            kept.add(min(known, key=lambda step: (known[step], step)))
        return kept


class Checkpointer:
    """Writes the checkpoints of a run from one process, beside the training.

    Args:
        uploads: the run's upload queue.
        retention: which complete checkpoints stay.
        on_written: called from another thread when one is complete.

    Attributes:
        last_step: of the newest checkpoint, None when there is none.
        passed_over: what :meth:`restore` could not use, and why.
    """

    def __init__(
        self,
        uploads: UploadQueue,
        retention: Retention | None = None,
        on_written: Callable[[Written], None] | None = None,
    ) -> None:
        self._uploads, self._store, self._run_uri = uploads, uploads.store, uploads.uri
        self._retention = retention or Retention()
        self._on_written = on_written
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._damaged: set[int] = set()
        self._losses: dict[int, float | None] = {}
        self._latest: Pointer | None = None
        self._knows_latest = False
        self.last_step: int | None = None
        self.passed_over: list[str] = []

    def save(self, step: int, stateful: Mapping[str, Stateful], loss: float | None = None) -> None:
        """Write a checkpoint; training goes on as soon as the state has been copied.

        Args:
            step: steps done.
            stateful: the things that must survive, by name.
            loss: of the last steps, to tell the best one by.

        Raises:
            UserError: an earlier one could not be written.
        """
        self._wait_for_disk()  # no more than one copy in memory
        self._uploads.check()
        start = time.monotonic()
        states = {name: _copied(thing.state_dict()) for name, thing in stateful.items()}
        self.last_step = step
        self._writing = self._writer.submit(self._write, step, loss, states, start)

    def wait(self, seconds: float | None = None) -> bool:
        """Until all is in the store, but not longer than ``seconds``; whether it is.

        Raises:
            UserError: a checkpoint could not be written.
        """
        self._wait_for_disk()
        return self._uploads.wait(seconds)

    def restore(self) -> Restored | None:
        """Read the newest valid checkpoint, in the store or on this machine; None when there is none.

        Those that are incomplete or damaged are passed over, and :attr:`passed_over` says why.

        Raises:
            as :func:`newest_checkpoint`.
        """
        self._wait_for_disk()
        waiting = {int(name): path for name, path in self._uploads.pending_sets().items() if name.isdigit()}
        self.passed_over = []
        # Before anything is read: what another process writes from now on is found out.
        self._latest, self._knows_latest = self._store.read_pointer(join_uri(self._run_uri, LATEST)), True
        restored = newest_checkpoint(self._store, self._run_uri, waiting, self._pass_over)
        if restored is not None:
            self._settle(restored, waiting)
            self.last_step = restored.step
        return restored

    def _pass_over(self, step: int, place: str | Path, why: str) -> None:
        self.passed_over.append(why)
        if isinstance(place, str):
            self._damaged.add(step)

    def _settle(self, restored: Restored, waiting: Mapping[int, Path]) -> None:
        """Of what waits on this machine, send the one that is gone on from; the others are of no use any more."""
        for step, path in waiting.items():
            if restored.place == str(path):
                self._uploads.requeue_set(path.name, partial(self._deliver, step, time.monotonic(), check_set(path)))
            else:
                self._uploads.drop_set(path.name)

    def _wait_for_disk(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write(self, step: int, loss: float | None, states: dict[str, Any], start: float) -> None:
        name = f"{step:08d}"
        folder = self._uploads.begin_set(name)
        try:
            for thing in list(states):
                torch.save(states.pop(thing), folder / f"{thing}.pt")  # popped: the copy is not needed any longer
            manifest = describe(folder, KIND, {"step": step, "loss": loss})
        except (OSError, RuntimeError) as error:
            family = disk_error_class(error) if isinstance(error, OSError) else LocalDiskError
            raise family(
                f"checkpoint of step {step}: cannot be written to {folder.parent} ({error}); "
                f"free some space there, or set {PENDING_VARIABLE} to a larger disk"
            ) from None
        self._uploads.enqueue_set(name, manifest, partial(self._deliver, step, start, manifest))

    def _deliver(self, step: int, start: float, manifest: dict[str, Any], folder: Path) -> None:
        """Bring it into the store; called again where the store did not answer."""
        uri = join_uri(self._run_uri, CHECKPOINTS, folder.name)
        put_set(self._uploads.quick_store, uri, folder, manifest, damaged=step in self._damaged)
        self._damaged.discard(step)
        self._losses[step] = manifest.get("loss")
        self._point_to(step)
        self._prune(step)
        if self._on_written:
            size = sum(file["bytes"] for file in manifest["files"].values())
            self._on_written(Written(step, uri, time.monotonic() - start, size))

    def _point_to(self, step: int) -> None:
        """Set the pointer from what this process found or set last, so that of two processes only one goes on.

        Raises:
            InfrastructureError: another process has set it since.
        """
        uri = join_uri(self._run_uri, LATEST)
        store = self._uploads.quick_store
        if not self._knows_latest:
            self._latest, self._knows_latest = store.read_pointer(uri), True
        store.swap_pointer(uri, {"step": step}, self._latest)
        there = store.read_pointer(uri)
        # Where the answer to an earlier attempt was lost it was not swapped now, and yet it says the same.
        if there is None or there.value != {"step": step}:
            raise InfrastructureError(
                f"run {self._run_uri}: another process writes checkpoints of this run; stop one of the two"
            )
        self._latest = there

    def _prune(self, step: int) -> None:
        """Keep the complete ones up to ``step`` that are to stay; what lies beyond is of an attempt that was lost."""
        folders = _folders(self._store, self._run_uri)
        losses = {s: self._loss(s, uri) for s, uri in folders.items() if s <= step and s not in self._damaged}
        kept = self._retention.kept(losses)
        for other, uri in folders.items():
            if other not in kept:
                self._store.remove_prefix(uri)
                self._damaged.discard(other)
                self._losses.pop(other, None)

    def _loss(self, step: int, uri: str) -> float | None:
        if self._retention.best and step not in self._losses:
            self._losses[step] = (self._store.read_manifest(uri) or {}).get("loss")
        return self._losses.get(step)


def newest_checkpoint(
    store: ObjectStore,
    run_uri: str,
    waiting: Mapping[int, Path] | None = None,
    pass_over: Callable[[int, str | Path, str], None] = lambda step, place, why: None,
) -> Restored | None:
    """Read the newest valid checkpoint of a run; None when there is none.

    Args:
        store: where the run is.
        run_uri: ``s3://bucket/runs/<id>``.
        waiting: folders on this machine with checkpoints that have not arrived in the store, by step.
        pass_over: called with each that cannot be used: its step, its place, and why in a line.

    Raises:
        UserError: there are checkpoints, but none is valid.
        Whatever else goes wrong while one is read (the store, the disk, memory, a bug) is raised as it is: it says
        nothing about the checkpoint.
    """
    candidates: list[tuple[int, str | Path]] = [*_folders(store, run_uri).items(), *(waiting or {}).items()]
    damaged = []
    # Of the same step the one in the store first.
    for step, place in sorted(candidates, key=lambda c: (c[0], isinstance(c[1], str)), reverse=True):
        try:
            states = _load(place, check_set(place)) if isinstance(place, Path) else _read(store, place)
        except NotFound:
            pass_over(step, place, f"checkpoint {place} is incomplete: it was being written when the run ended")
        except IntegrityError as error:
            damaged.append(f"checkpoint {place} cannot be used: {error}")
            pass_over(step, place, damaged[-1])
        else:
            return Restored(step, str(place), states)
    if damaged:
        raise UserError(
            f"run {run_uri}: none of its checkpoints is valid ({'; '.join(damaged)}); "
            f"remove {join_uri(run_uri, CHECKPOINTS)} to start from the beginning"
        )
    return None


def _folders(store: ObjectStore, run_uri: str) -> dict[int, str]:
    root = join_uri(run_uri, CHECKPOINTS)
    folders = {}
    for stat in store.list(root):  # by their files: some stores list folders that have become empty
        name = stat.uri.removeprefix(root).strip("/").partition("/")[0]
        if name.isdigit():
            folders[int(name)] = join_uri(root, name)
    return folders


def _read(store: ObjectStore, uri: str) -> dict[str, Any]:
    with TemporaryDirectory(prefix="esvit-") as folder:
        return _load(Path(folder), store.fetch(uri, Path(folder)), uri)


def _load(folder: Path, manifest: Mapping[str, Any], place: str | None = None) -> dict[str, Any]:
    """
    Raises:
        IntegrityError: the bytes are those of the manifest, but no state that ``torch.save`` wrote.
    """
    states = {}
    for name in manifest["files"]:
        try:
            states[name.removesuffix(".pt")] = torch.load(folder / name, map_location="cpu", weights_only=True)
        except Exception as error:
            if isinstance(error, pickle.UnpicklingError) or not _is_archive(folder / name):
                raise IntegrityError(f"{place or folder}/{name}: not a saved state ({error})") from None
            raise
    return states


def _is_archive(path: Path) -> bool:
    """Whether the file is what ``torch.save`` writes, a zip archive."""
    try:
        zipfile.ZipFile(io.BytesIO(path.read_bytes())).close()  # from memory: what the disk fails with is no damage
    except zipfile.BadZipFile:
        return False
    return True


def _copied(state: Any) -> Any:
    """The state with every tensor copied to the CPU: training changes them in place while this one is written."""
    match state:
        case torch.Tensor():
            return state.detach().to("cpu", copy=True)
        case Mapping():
            return {key: _copied(value) for key, value in state.items()}
        case list() | tuple():
            return type(state)(_copied(value) for value in state)
        case _:
            return state
