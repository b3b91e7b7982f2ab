"""The event log of a run: its starts, stops, failures and verdict below ``events/``, one object per event, written once.

An object is named ``<UTC time>-<random>-<kind>.json``, so a listing alone shows how often a run was started, in order.
What happens at every step is in the training log (``log.py``), not here.
"""

from __future__ import annotations

import socket
import time
import uuid
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from esvit_core.storage import ObjectStore, join_uri

EVENTS = "events"
Kind = Literal["started", "stopped", "failed", "evaluated"]
_TIME = "%Y%m%dT%H%M%S"


@dataclass(frozen=True)
class Event:
    """An event of a run.

    Attributes:
        kind: ``started`` (a training has started or resumed), ``stopped`` (on request), ``failed``,
            ``evaluated`` (the report with the verdict is written).
        time: seconds since 1970.
        host: host name of the machine.
        component: the pipeline step, such as pretrain.
        step: training steps done; None if not known.
        reason: why the run stopped or failed, or the verdict, in one line.
        rank: rank of the process that failed first; None if no process is to blame, or it is not known which.
        facts: further values, by name.
    """

    kind: Kind
    time: float
    host: str
    component: str = "pretrain"
    step: int | None = None
    reason: str = ""
    rank: int | None = None
    facts: dict[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the known values by name."""
        return {name: value for name, value in asdict(self).items() if value not in (None, "")}


def record_event(store: ObjectStore, run_uri: str, kind: Kind, **values: Any) -> Event:
    """Record an event with the current time and this machine's host name.

    Args:
        store: object store of the run.
        run_uri: ``s3://bucket/runs/<id>``.
        kind: of the event.
        values: ``component``, ``step``, ``reason``, ``rank``, ``facts`` of :class:`Event`.

    Raises:
        StoreError: the event could not be written.
    """
    event = Event(kind, time.time(), socket.gethostname(), **values)
    # The random part keeps two machines from writing the same object in the same millisecond.
    name = f"{_timestamp(event.time)}-{uuid.uuid4().hex[:6]}-{kind}.json"
    store.put_json(join_uri(run_uri, EVENTS, name), event.as_json())
    return event


def count_starts(store: ObjectStore, run_uri: str) -> int:
    """Count the starts of this run's training, from the listing alone."""
    return sum(kind == "started" for kind, _ in _list_events(store, run_uri))


def failed_since(store: ObjectStore, run_uri: str, when: float) -> bool:
    """Return whether a failure was recorded at or after a time (seconds since 1970), from the listing alone."""
    events = _list_events(store, run_uri)
    return any(kind == "failed" and uri.rpartition("/")[2] >= _timestamp(when) for kind, uri in events)


def read_events(store: ObjectStore, run_uri: str) -> list[Event]:
    """Read the events of a run in the order of their times."""
    known = {field.name for field in fields(Event)}
    objects = (store.get_json(uri) for _, uri in _list_events(store, run_uri))
    return [Event(**{name: value for name, value in values.items() if name in known}) for values in objects]


def _timestamp(when: float) -> str:
    """Format a time as object names begin with it."""
    return f"{time.strftime(_TIME, time.gmtime(when))}.{int(when * 1000) % 1000:03}Z"


def _list_events(store: ObjectStore, run_uri: str) -> list[tuple[str, str]]:
    """List the kind and the address of each event."""
    events = []
    for stat in store.list(join_uri(run_uri, EVENTS)):
        kind = stat.uri.removesuffix(".json").rpartition("-")[2]
        if kind in get_args(Kind):
            events.append((kind, stat.uri))
    return events
