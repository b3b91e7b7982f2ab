"""Checkpoints in the object store: complete or absent, the newest valid one found again.

A checkpoint is the list of the run's stateful things, a file each, below ``training/checkpoints/<step:08d>/``; its
manifest, with sizes and SHA-256, is written last. It does not depend on the number of processes: they hold the same
state, and everything random is drawn anew at every step from (seed, step, rank).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from esvit_core.errors import UserError
from esvit_core.storage import (
    IntegrityError,
    NotFound,
    ObjectStore,
    StoreFull,
    StoreRefused,
    StoreUnavailable,
    join_uri,
)

CHECKPOINTS = "training/checkpoints"
LATEST = "training/latest"
KIND = "checkpoint"


class Stateful(Protocol):
    """Something that must survive a restart."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


@dataclass(frozen=True)
class Written:
    """A checkpoint that is complete."""

    step: int
    uri: str
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Restored:
    """A checkpoint that was read.

    Attributes:
        step: steps done when it was written.
        uri: its folder.
        states: the state of each stateful thing, by name, on the CPU.
    """

    step: int
    uri: str
    states: dict[str, Any]


class Checkpointer:
    """Writes the checkpoints of a run from one process, beside the training.

    Args:
        store: where the run is.
        run_uri: ``s3://bucket/runs/<id>``.
        keep: complete checkpoints that stay.
        on_written: called from the writing thread when one is complete.

    Attributes:
        last_step: of the newest checkpoint, None when there is none.
        passed_over: what :meth:`restore` could not use, and why.
    """

    def __init__(
        self, store: ObjectStore, run_uri: str, keep: int, on_written: Callable[[Written], None] | None = None
    ) -> None:
        self._store = store
        self._run_uri = run_uri
        self._keep = keep
        self._on_written = on_written
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._damaged: set[int] = set()
        self.last_step: int | None = None
        self.passed_over: list[str] = []

    def save(self, step: int, stateful: Mapping[str, Stateful], *, wait: bool = False) -> None:
        """Write a checkpoint; training goes on as soon as the state has been copied.

        Args:
            step: steps done.
            stateful: the things that must survive, by name.
            wait: return only when it is complete.

        Raises:
            UserError: this or an earlier one could not be written.
        """
        self.wait()
        start = time.monotonic()
        states = {name: _copied(thing.state_dict()) for name, thing in stateful.items()}
        self.last_step = step
        self._pending = self._writer.submit(self._write, step, states, start)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until the checkpoint that is being written is complete."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Wait and stop the writing thread."""
        try:
            self.wait()
        finally:
            self._writer.shutdown(wait=True)

    def restore(self) -> Restored | None:
        """Read the newest valid checkpoint; None when there is none.

        Those that are incomplete or damaged are passed over, and :attr:`passed_over` says why.

        Raises:
            StoreError: the store does not answer, which says nothing about the checkpoints.
            UserError: there are checkpoints, but none is valid.
        """
        self.passed_over = passed_over = []
        for step, uri in sorted(self._folders().items(), reverse=True):
            try:
                states = self._read(uri)
            except (StoreUnavailable, StoreRefused, StoreFull):
                raise
            except NotFound:
                passed_over.append(f"checkpoint {uri} is incomplete: it was being written when the run ended")
            except UserError as error:
                passed_over.append(f"checkpoint {uri} cannot be used: {error}")
            else:
                self.last_step = step
                return Restored(step, uri, states)
            self._damaged.add(step)
        if any("cannot be used" in why for why in passed_over):
            raise UserError(
                f"run {self._run_uri}: none of its checkpoints is valid ({'; '.join(passed_over)}); "
                f"remove {join_uri(self._run_uri, CHECKPOINTS)} to start from the beginning"
            )
        return None

    def _folders(self) -> dict[int, str]:
        root = join_uri(self._run_uri, CHECKPOINTS)
        folders = {}
        for stat in self._store.list(root):  # by their files: some stores list folders that have become empty
            name = stat.uri.removeprefix(root).strip("/").partition("/")[0]
            if name.isdigit():
                folders[int(name)] = join_uri(root, name)
        return folders

    def _read(self, uri: str) -> dict[str, Any]:
        states = {}
        with tempfile.TemporaryDirectory(prefix="esvit-") as folder:
            manifest = self._store.fetch(uri, Path(folder))
            for name in manifest["files"]:
                try:
                    states[name.removesuffix(".pt")] = torch.load(
                        Path(folder) / name, map_location="cpu", weights_only=True
                    )
                except Exception as error:  # torch.load promises no particular one
                    raise IntegrityError(f"{join_uri(uri, name)}: not readable ({error})") from None
        return states

    def _write(self, step: int, states: dict[str, Any], start: float) -> None:
        uri = join_uri(self._run_uri, CHECKPOINTS, f"{step:08d}")
        self._store.remove_prefix(uri)  # what a lost attempt has left there, damaged or not
        self._damaged.discard(step)
        with tempfile.TemporaryDirectory(prefix="esvit-") as folder:
            files = {}
            for name in list(states):
                path = Path(folder) / f"{name}.pt"
                try:
                    torch.save(states.pop(name), path)  # popped: the copy in memory is not needed any longer
                except (OSError, RuntimeError) as error:
                    raise UserError(
                        f"checkpoint of step {step}: cannot be written to {folder} ({error}); "
                        "free some space there or set TMPDIR to a larger disk"
                    ) from None
                files[path.name] = path
            manifest = self._store.publish(uri, files, KIND, {"step": step})
        self._point_to(step)
        self._prune(step)
        if self._on_written:
            size = sum(file["bytes"] for file in manifest["files"].values())
            self._on_written(Written(step, uri, time.monotonic() - start, size))

    def _point_to(self, step: int) -> None:
        uri = join_uri(self._run_uri, LATEST)
        if not self._store.swap_pointer(uri, {"step": step}, self._store.read_pointer(uri)):
            raise UserError(f"run {self._run_uri}: another process writes checkpoints of this run; stop one of the two")

    def _prune(self, step: int) -> None:
        """Keep the newest complete ones up to ``step``; what lies beyond belongs to an attempt that was lost."""
        folders = self._folders()
        kept = sorted(s for s in folders if s <= step and s not in self._damaged)[-self._keep :]
        for other, uri in folders.items():
            if other not in kept:
                self._store.remove_prefix(uri)
                self._damaged.discard(other)


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
