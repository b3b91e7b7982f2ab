"""Checkpoints in the object store: each is complete or absent, and a run resumes from the newest valid one.

A checkpoint has one file per stateful object of the run, below ``training/checkpoints/<step:08d>/``; its manifest, with
sizes and SHA-256, is written last. It does not depend on the number of processes: all hold the same state, and random
numbers are drawn from (seed, step, rank) in every step.

Training waits only for the copy from the device. One thread writes the copy to the local disk, another uploads it to
the store (:mod:`esvit_core.storage.upload_queue`). While the store does not answer, the newest checkpoint stays on the
local disk, and a run that is restarted on this machine resumes from it if it is newer than those in the store.
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
from esvit_core.storage.store_errors import LocalDiskError, PathError
from esvit_core.storage.upload_queue import PENDING_VARIABLE, UploadQueue

CHECKPOINTS = "training/checkpoints"
KIND = "checkpoint"


class Stateful(Protocol):
    """An object whose state a checkpoint contains."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


@dataclass(frozen=True)
class WrittenCheckpoint:
    """A checkpoint that is complete in the store.

    Attributes:
        step: steps done.
        uri: its folder.
        seconds: time from the start of the copy to the end of the upload.
        bytes: size of all its files.
    """

    step: int
    uri: str
    seconds: float
    bytes: int


@dataclass(frozen=True)
class RestoredCheckpoint:
    """A checkpoint that was read.

    Attributes:
        step: steps done when it was written.
        location: its folder, in the store or on this machine.
        states: the state of each stateful object, by name, on the CPU.
    """

    step: int
    location: str
    states: dict[str, Any]


@dataclass(frozen=True)
class RetentionPolicy:
    """Which complete checkpoints are kept.

    Attributes:
        last: number of newest checkpoints to keep.
        every_steps: also keep checkpoints whose step is a multiple of this; 0: disabled.
        best: also keep the checkpoint with the lowest loss.
    """

    last: int = 3
    every_steps: int = 0
    best: bool = False

    def kept(self, losses: Mapping[int, float | None]) -> set[int]:
        """Return the steps to keep, given the loss of each checkpoint by step."""
        steps = sorted(losses)
        kept = set(steps[-self.last :])
        if self.every_steps:
            kept |= {step for step in steps if step % self.every_steps == 0}
        known = {step: loss for step, loss in losses.items() if loss is not None}
        if self.best and known:
            kept.add(min(known, key=lambda step: (known[step], step)))
        return kept


class Checkpointer:
    """Writes the checkpoints of a run from one process, in background threads.

    Args:
        uploads: the run's upload queue.
        retention: which complete checkpoints are kept.
        on_written: called from another thread when a checkpoint is complete.

    Attributes:
        last_step: step of the newest checkpoint; None if there is none.
        skipped: one message per checkpoint that :meth:`restore` could not use, with the reason.
    """

    def __init__(
        self,
        uploads: UploadQueue,
        retention: RetentionPolicy | None = None,
        on_written: Callable[[WrittenCheckpoint], None] | None = None,
    ) -> None:
        self._uploads, self._store, self._run_uri = uploads, uploads.store, uploads.uri
        self._retention = retention or RetentionPolicy()
        self._on_written = on_written
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._damaged: set[int] = set()
        self._losses: dict[int, float | None] = {}
        self._latest: Pointer | None = None
        self._latest_known = False
        self.last_step: int | None = None
        self.skipped: list[str] = []

    def save(self, step: int, stateful: Mapping[str, Stateful], loss: float | None = None) -> None:
        """Write a checkpoint; training continues as soon as the state has been copied.

        Args:
            step: steps done.
            stateful: the objects to save, by name.
            loss: mean of the last steps, by which the best checkpoint is chosen.

        Raises:
            UserError: an earlier checkpoint could not be written.
        """
        self._wait_for_disk()  # no more than one copy in memory
        self._uploads.check()
        start = time.monotonic()
        states = {name: _copy_to_cpu(thing.state_dict()) for name, thing in stateful.items()}
        self.last_step = step
        self._writing = self._writer.submit(self._write, step, loss, states, start)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until everything is in the store, at most ``seconds``; return whether it is.

        Raises:
            UserError: a checkpoint could not be written.
        """
        self._wait_for_disk()
        return self._uploads.wait(seconds)

    def restore(self) -> RestoredCheckpoint | None:
        """Read the newest valid checkpoint, in the store or on this machine; None if there is none.

        Incomplete and damaged checkpoints are skipped; :attr:`skipped` has the reasons.

        Raises:
            as :func:`newest_checkpoint`.
        """
        self._wait_for_disk()
        pending = {int(name): path for name, path in self._uploads.pending_sets().items() if name.isdigit()}
        self.skipped = []
        # Read first, so that a checkpoint which another process writes from now on is detected.
        self._latest, self._latest_known = self._store.read_pointer(join_uri(self._run_uri, LATEST)), True
        restored = newest_checkpoint(self._store, self._run_uri, pending, self._skip)
        if restored is not None:
            self._requeue_or_drop(restored, pending)
            self.last_step = restored.step
        return restored

    def _skip(self, step: int, location: str | Path, reason: str) -> None:
        self.skipped.append(reason)
        if isinstance(location, str):
            self._damaged.add(step)

    def _requeue_or_drop(self, restored: RestoredCheckpoint, pending: Mapping[int, Path]) -> None:
        """Of the checkpoints pending on this machine, upload the one that was restored and delete the others."""
        for step, path in pending.items():
            if restored.location == str(path):
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
            for key in list(states):
                torch.save(states.pop(key), folder / f"{key}.pt")  # pop frees the copy
            manifest = describe(folder, KIND, {"step": step, "loss": loss})
        except (OSError, RuntimeError) as error:
            if not folder.exists():
                raise PathError(f"checkpoint of step {step}: {folder} was deleted while in use; start again") from None
            error_class = disk_error_class(error) if isinstance(error, OSError) else LocalDiskError
            raise error_class(
                f"checkpoint of step {step}: cannot be written to {folder.parent} ({error}); "
                f"free some space there, or set {PENDING_VARIABLE} to a larger disk"
            ) from None
        self._uploads.enqueue_set(name, manifest, partial(self._deliver, step, start, manifest))

    def _deliver(self, step: int, start: float, manifest: dict[str, Any], folder: Path) -> None:
        """Upload a checkpoint; called again if the store did not answer."""
        uri = join_uri(self._run_uri, CHECKPOINTS, folder.name)
        put_set(self._uploads.quick_store, uri, folder, manifest, damaged=step in self._damaged)
        self._damaged.discard(step)
        self._losses[step] = manifest.get("loss")
        self._point_to(step)
        self._prune(step)
        if self._on_written:
            size = sum(file["bytes"] for file in manifest["files"].values())
            self._on_written(WrittenCheckpoint(step, uri, time.monotonic() - start, size))

    def _point_to(self, step: int) -> None:
        """Set the pointer, if it still has the value that this process read or set last.

        Of two processes that write checkpoints of the same run only one continues.

        Raises:
            InfrastructureError: another process has set the pointer in the meantime.
        """
        uri = join_uri(self._run_uri, LATEST)
        store = self._uploads.quick_store
        if not self._latest_known:
            self._latest, self._latest_known = store.read_pointer(uri), True
        store.swap_pointer(uri, {"step": step}, self._latest)
        there = store.read_pointer(uri)
        # If the answer to an earlier attempt was lost, this swap failed although the pointer has the value.
        if there is None or there.value != {"step": step}:
            raise InfrastructureError(
                f"run {self._run_uri}: another process writes checkpoints of this run; stop one of the two"
            )
        self._latest = there

    def _prune(self, step: int) -> None:
        """Remove checkpoints that the policy does not keep, and those after ``step``, which belong to a lost attempt."""
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
    pending: Mapping[int, Path] | None = None,
    on_skip: Callable[[int, str | Path, str], None] = lambda step, location, reason: None,
) -> RestoredCheckpoint | None:
    """Read the newest valid checkpoint of a run; None if there is none.

    Args:
        store: object store of the run.
        run_uri: ``s3://bucket/runs/<id>``.
        pending: folders on this machine with checkpoints that have not been uploaded, by step.
        on_skip: called with the step, the location and the one-line reason for each checkpoint that cannot be used.

    Raises:
        UserError: there are checkpoints, but none is valid.
        Exception: any other failure while reading (store, disk, memory, a bug) is raised unchanged, because it does
            not show that the checkpoint is damaged.
    """
    candidates: list[tuple[int, str | Path]] = [*_folders(store, run_uri).items(), *(pending or {}).items()]
    damaged = []
    # For the same step, the checkpoint in the store comes first.
    for step, location in sorted(candidates, key=lambda c: (c[0], isinstance(c[1], str)), reverse=True):
        try:
            states = _load(location, check_set(location)) if isinstance(location, Path) else _read(store, location)
        except NotFound:
            on_skip(step, location, f"checkpoint {location} is incomplete: it was being written when the run ended")
        except IntegrityError as error:
            damaged.append(f"checkpoint {location} cannot be used: {error}")
            on_skip(step, location, damaged[-1])
        else:
            return RestoredCheckpoint(step, str(location), states)
    if damaged:
        raise UserError(
            f"run {run_uri}: none of its checkpoints is valid ({'; '.join(damaged)}); "
            f"remove {join_uri(run_uri, CHECKPOINTS)} to start from the beginning"
        )
    return None


def _folders(store: ObjectStore, run_uri: str) -> dict[int, str]:
    root = join_uri(run_uri, CHECKPOINTS)
    folders = {}
    for stat in store.list(root):  # files, because some stores list folders that have become empty
        name = stat.uri.removeprefix(root).strip("/").partition("/")[0]
        if name.isdigit():
            folders[int(name)] = join_uri(root, name)
    return folders


def _read(store: ObjectStore, uri: str) -> dict[str, Any]:
    with TemporaryDirectory(prefix="esvit-") as folder:
        return _load(Path(folder), store.fetch(uri, Path(folder)), uri)


def _load(folder: Path, manifest: Mapping[str, Any], location: str | None = None) -> dict[str, Any]:
    """Read the states in a folder, by name.

    Raises:
        IntegrityError: a file matches the manifest, but ``torch.save`` did not write it.
    """
    states = {}
    for name in manifest["files"]:
        try:
            states[name.removesuffix(".pt")] = torch.load(folder / name, map_location="cpu", weights_only=True)
        except Exception as error:
            if isinstance(error, pickle.UnpicklingError) or not _is_archive(folder / name):
                raise IntegrityError(f"{location or folder}/{name}: not a saved state ({error})") from None
            raise
    return states


def _is_archive(path: Path) -> bool:
    """Return whether the file is a zip archive, as ``torch.save`` writes."""
    try:
        zipfile.ZipFile(
            io.BytesIO(path.read_bytes())
        ).close()  # from memory, so that a disk error is not taken for damage
    except zipfile.BadZipFile:
        return False
    return True


def _copy_to_cpu(state: Any) -> Any:
    """Copy the state with every tensor to the CPU, because training changes tensors in place while the copy is written."""
    match state:
        case torch.Tensor():
            return state.detach().to("cpu", copy=True)
        case Mapping():
            return {key: _copy_to_cpu(value) for key, value in state.items()}
        case list() | tuple():
            return type(state)(_copy_to_cpu(value) for value in state)
        case _:
            return state
