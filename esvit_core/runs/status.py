"""How a run is doing, from what lies in the object store: while it is under way, and after its end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from esvit_core.runs.events import Entry, read_journal
from esvit_core.runs.log import read_last_line, read_log
from esvit_core.runs.run import CONFIG
from esvit_core.runs.training_summary import LATEST, read_summary
from esvit_core.storage import NotFound, ObjectStat, ObjectStore, join_uri

State = Literal["preparing", "training", "measuring", "finished", "stopped", "failed", "silent"]
UNDER_WAY: tuple[State, ...] = ("preparing", "training", "measuring")
# A run that works writes a piece of its log at least every 10 s or hundredth of its age (log.py).
QUIET_SECONDS = 120.0
QUIET_SHARE_OF_AGE = 0.05
PACE_LINES = 10


@dataclass(frozen=True)
class Checkpoint:
    """The newest checkpoint: steps done, and seconds since 1970 when it was complete."""

    step: int
    time: float


@dataclass(frozen=True)
class RunStatus:
    """A run as the store shows it.

    Attributes:
        name: run id.
        uri: ``s3://bucket/runs/<id>``.
        state: preparing, training, measuring (the steps after it), finished, stopped (on request), failed, or silent:
            no end was written down, but there is no sign of life either.
        begun: when it was first started, seconds since 1970.
        seen: the last sign of life, likewise.
        step, steps: done and planned; None before the training.
        seconds_left: of training, at the pace of the last lines of the log; None when it does not train.
        restarts: times that the training was started again.
        line: the last line of the log.
        checkpoint: None when there is none.
        journal: starts, stops and failures.
        lines: of the log; only the last when the run was looked at briefly.
    """

    name: str
    uri: str
    state: State
    begun: float
    seen: float
    step: int | None
    steps: int | None
    seconds_left: float | None
    restarts: int
    line: dict[str, Any]
    checkpoint: Checkpoint | None
    journal: tuple[Entry, ...]
    lines: tuple[dict[str, Any], ...]

    @property
    def failure(self) -> Entry | None:
        """The failure that the run has ended with."""
        return self.journal[-1] if self.state == "failed" else None

    def as_json(self) -> dict[str, Any]:
        """For programs; the log is left out."""
        values = {name: value for name, value in asdict(self).items() if name not in ("lines", "journal")}
        return {**values, "journal": [entry.as_json() for entry in self.journal]}


def run_names(store: ObjectStore, bucket: str) -> list[str]:
    """The runs of a bucket, the newest first."""
    root = f"s3://{bucket}/runs"
    begun = {}
    for folder in store.list(root, recursive=False):
        if folder.uri.endswith("/"):
            name = folder.uri.rstrip("/").rsplit("/", 1)[-1]
            begun[name] = _begun(list(store.list(folder.uri, recursive=False)))
    return sorted(begun, key=lambda name: -begun[name])


def read_status(
    store: ObjectStore,
    run_uri: str,
    *,
    brief: bool = False,
    alive: bool | None = None,
    known: dict[str, bytes] | None = None,
) -> RunStatus:
    """Look at a run.

    Args:
        store: where it is.
        run_uri: ``s3://bucket/runs/<id>``.
        brief: read only the end of its log.
        alive: whether its command is known to be under way (True) or not (False); None: only the store is there to tell.
        known: pieces of the log read before, see :func:`read_log`.
    """
    objects = list(store.list(run_uri, recursive=False))
    there = {stat.uri.removeprefix(run_uri).strip("/") for stat in objects}
    journal = read_journal(store, run_uri) if "journal" in there else []
    summary = read_summary(store, run_uri) if "training" in there else None
    lines: list[dict[str, Any]] = []
    if "training" in there:
        lines = _last_line(store, run_uri) if brief else read_log(store, run_uri, known)
    line = lines[-1] if lines else {}
    checkpoint = _checkpoint(store, run_uri) if "training" in there else None
    starts = [entry for entry in journal if entry.kind == "started"]
    begun = _begun(objects)
    times = (begun, line.get("time", 0.0), journal[-1].time if journal else 0.0, checkpoint.time if checkpoint else 0.0)
    step, steps = _progress(line, starts, checkpoint)
    if summary:
        step = steps = summary.steps
    state = _state("report" in there, summary is not None, journal, max(times), alive)
    return RunStatus(
        name=run_uri.rstrip("/").rsplit("/", 1)[-1],
        uri=run_uri,
        state=state,
        begun=begun,
        seen=max(times),
        step=step,
        steps=steps,
        seconds_left=_seconds_left(lines, step, steps) if state == "training" else None,
        restarts=max(0, len(starts) - 1),
        line=line,
        checkpoint=checkpoint,
        journal=tuple(journal),
        lines=tuple(lines),
    )


def _state(reported: bool, trained: bool, journal: Sequence[Entry], seen: float, alive: bool | None) -> State:
    if reported:
        return "finished"
    last = journal[-1] if journal else None
    if alive is None:
        age = time.time() - (last.time if last else seen)
        alive = time.time() - seen < max(QUIET_SECONDS, QUIET_SHARE_OF_AGE * age)
        if last and last.kind != "started":
            alive = False
    if alive:
        if trained:
            return "measuring"
        return "training" if last and last.kind == "started" else "preparing"
    if last and last.kind == "failed":
        return "failed"
    if last and last.kind == "stopped" and not trained:
        return "stopped"
    return "silent"


def _progress(
    line: dict[str, Any], starts: Sequence[Entry], checkpoint: Checkpoint | None
) -> tuple[int | None, int | None]:
    """Steps done and planned, as far as is known."""
    if not starts:
        return line.get("step"), None
    known = [starts[-1].step or 0, line.get("step", 0), checkpoint.step if checkpoint else 0]
    return max(known), (starts[-1].facts or {}).get("steps")


def _seconds_left(lines: Sequence[dict[str, Any]], step: int | None, steps: int | None) -> float | None:
    recent = [line for line in lines[-PACE_LINES:] if "time" in line]
    if step is None or steps is None or len(recent) < 2 or recent[-1]["step"] <= recent[0]["step"]:
        return None
    pace = (recent[-1]["time"] - recent[0]["time"]) / (recent[-1]["step"] - recent[0]["step"])
    return max(0.0, pace * (steps - step))


def _last_line(store: ObjectStore, run_uri: str) -> list[dict[str, Any]]:
    last = read_last_line(store, run_uri)
    return [last] if last else []


def _checkpoint(store: ObjectStore, run_uri: str) -> Checkpoint | None:
    uri = join_uri(run_uri, LATEST)
    pointer = store.read_pointer(uri)
    if pointer is None:
        return None
    try:
        return Checkpoint(int(pointer.value["step"]), _seconds(store.stat(uri)))
    except NotFound:
        return None


def _begun(objects: Sequence[ObjectStat]) -> float:
    """When the run's configuration was written, which is the first thing that is."""
    times = {stat.uri.rsplit("/", 1)[-1]: _seconds(stat) for stat in objects if not stat.uri.endswith("/")}
    return times.get(CONFIG, max(times.values(), default=0.0))


def _seconds(stat: ObjectStat) -> float:
    return stat.modified.timestamp() if stat.modified else 0.0
