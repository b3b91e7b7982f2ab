"""The status of a run, from its objects in the store."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from esvit_core.runs.events import Event, read_events
from esvit_core.runs.log import read_last_line, read_log
from esvit_core.runs.run import CONFIG
from esvit_core.runs.training_summary import LATEST, read_summary
from esvit_core.storage import NotFound, ObjectStat, ObjectStore, join_uri

State = Literal["preparing", "training", "measuring", "finished", "stopped", "failed", "silent"]
ACTIVE_STATES: tuple[State, ...] = ("preparing", "training", "measuring")
# A live run writes a chunk of its log at least every 10 s, or every hundredth of its age (log.py).
QUIET_SECONDS = 120.0
QUIET_SHARE_OF_AGE = 0.05
PACE_LINES = 10  # lines of the log over which the pace is measured


@dataclass(frozen=True)
class Checkpoint:
    """The newest checkpoint: steps done, and the time of its completion in seconds since 1970."""

    step: int
    time: float


@dataclass(frozen=True)
class RunStatus:
    """The status of a run.

    Attributes:
        name: run id.
        uri: ``s3://bucket/runs/<id>``.
        state: preparing, training, measuring (the steps after training), finished, stopped (on request), failed, or
            silent (no end was recorded, but there is no recent activity).
        created: time when the run was created, seconds since 1970.
        last_activity: time of the last activity, likewise.
        step, steps: training steps done and planned; None before the training.
        seconds_left: of training, at the pace of the last lines of the log; None if it is not training.
        restarts: number of times that the training was restarted.
        line: last line of the log.
        checkpoint: newest checkpoint; None if there is none.
        events: starts, stops and failures.
        lines: of the log; only the last if the status was read briefly.
    """

    name: str
    uri: str
    state: State
    created: float
    last_activity: float
    step: int | None
    steps: int | None
    seconds_left: float | None
    restarts: int
    line: dict[str, Any]
    checkpoint: Checkpoint | None
    events: tuple[Event, ...]
    lines: tuple[dict[str, Any], ...]

    @property
    def failure(self) -> Event | None:
        """The failure with which the run ended, if its state is failed."""
        return self.events[-1] if self.state == "failed" else None

    def as_json(self) -> dict[str, Any]:
        """Return the status as JSON values, without the log."""
        values = {name: value for name, value in asdict(self).items() if name not in ("lines", "events")}
        return {**values, "events": [event.as_json() for event in self.events]}


def run_names(store: ObjectStore, bucket: str) -> list[str]:
    """List the runs of a bucket, the newest first."""
    root = f"s3://{bucket}/runs"
    created = {}
    for folder in store.list(root, recursive=False):
        if folder.uri.endswith("/"):
            name = folder.uri.rstrip("/").rsplit("/", 1)[-1]
            created[name] = _created(list(store.list(folder.uri, recursive=False)))
    return sorted(created, key=lambda name: -created[name])


def read_status(
    store: ObjectStore,
    run_uri: str,
    *,
    brief: bool = False,
    alive: bool | None = None,
    known: dict[str, bytes] | None = None,
) -> RunStatus:
    """Read the status of a run.

    Args:
        store: object store of the run.
        run_uri: ``s3://bucket/runs/<id>``.
        brief: read only the end of its log.
        alive: whether its command is known to be running (True) or not (False); None: infer it from the store.
        known: cache of chunks of the log, see :func:`read_log`.
    """
    objects = list(store.list(run_uri, recursive=False))
    names = {stat.uri.removeprefix(run_uri).strip("/") for stat in objects}
    events = read_events(store, run_uri) if "events" in names else []
    summary = read_summary(store, run_uri) if "training" in names else None
    lines: list[dict[str, Any]] = []
    if "training" in names:
        lines = _last_line(store, run_uri) if brief else read_log(store, run_uri, known)
    line = lines[-1] if lines else {}
    checkpoint = _checkpoint(store, run_uri) if "training" in names else None
    starts = [event for event in events if event.kind == "started"]
    created = _created(objects)
    times = (created, line.get("time", 0.0), events[-1].time if events else 0.0, checkpoint.time if checkpoint else 0.0)
    step, steps = _progress(line, starts, checkpoint)
    if summary:
        step = steps = summary.steps
    state = _state("report" in names, summary is not None, events, max(times), alive)
    return RunStatus(
        name=run_uri.rstrip("/").rsplit("/", 1)[-1],
        uri=run_uri,
        state=state,
        created=created,
        last_activity=max(times),
        step=step,
        steps=steps,
        seconds_left=_seconds_left(lines, step, steps) if state == "training" else None,
        restarts=max(0, len(starts) - 1),
        line=line,
        checkpoint=checkpoint,
        events=tuple(events),
        lines=tuple(lines),
    )


def _state(reported: bool, trained: bool, events: Sequence[Event], last_activity: float, alive: bool | None) -> State:
    if reported:
        return "finished"
    last = events[-1] if events else None
    if alive is None:
        age = time.time() - (last.time if last else last_activity)
        alive = time.time() - last_activity < max(QUIET_SECONDS, QUIET_SHARE_OF_AGE * age)
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
    line: dict[str, Any], starts: Sequence[Event], checkpoint: Checkpoint | None
) -> tuple[int | None, int | None]:
    """Return the steps done and planned, as far as they are known."""
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


def _created(objects: Sequence[ObjectStat]) -> float:
    """Return when the run's configuration was written, which is its first object."""
    times = {stat.uri.rsplit("/", 1)[-1]: _seconds(stat) for stat in objects if not stat.uri.endswith("/")}
    return times.get(CONFIG, max(times.values(), default=0.0))


def _seconds(stat: ObjectStat) -> float:
    return stat.modified.timestamp() if stat.modified else 0.0
