"""The journal of a run: its starts, stops and failures below ``journal/``, an object each, written once.

An object is named ``<UTC time>-<kind>.json``: the listing alone tells how often a run was started, in order. What
happens at every step is in the log (``log.py``), not here.
"""

from __future__ import annotations

import socket
import time
import uuid
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from esvit_core.storage import ObjectStore, join_uri

JOURNAL = "journal"
Kind = Literal["started", "stopped", "failed"]
_TIME = "%Y%m%dT%H%M%S"


@dataclass(frozen=True)
class Entry:
    """Something that happened to a run.

    Attributes:
        kind: ``started`` (a training has begun or goes on), ``stopped`` (on request), ``failed``.
        time: seconds since 1970.
        host: where.
        part: what of the run: the step's name, such as pretrain.
        step: training steps done; None when that is not known.
        reason: in one line, why it stopped or failed.
        rank: of the process that failed first; None when no process is to blame, or it is not known which.
        facts: more, by name.
    """

    kind: Kind
    time: float
    host: str
    part: str = "pretrain"
    step: int | None = None
    reason: str = ""
    rank: int | None = None
    facts: dict[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """By name, without what is not known."""
        return {name: value for name, value in asdict(self).items() if value not in (None, "")}


def note(store: ObjectStore, run_uri: str, kind: Kind, **what: Any) -> Entry:
    """Write an entry with the present time and this machine's name.

    Args:
        store: where the run is.
        run_uri: ``s3://bucket/runs/<id>``.
        kind: of the entry.
        what: ``part``, ``step``, ``reason``, ``rank``, ``facts`` of :class:`Entry`.

    Raises:
        StoreError: it could not be written.
    """
    entry = Entry(kind, time.time(), socket.gethostname(), **what)
    when = _written(entry.time)
    # The mark keeps two machines from writing the same object in the same millisecond.
    name = f"{when}-{uuid.uuid4().hex[:6]}-{kind}.json"
    store.put_json(join_uri(run_uri, JOURNAL, name), entry.as_json())
    return entry


def starts(store: ObjectStore, run_uri: str) -> int:
    """How often the training of this run was started, by the listing."""
    return sum(kind == "started" for kind, _ in _objects(store, run_uri))


def failed_since(store: ObjectStore, run_uri: str, when: float) -> bool:
    """Whether a failure has been noted at or after a time (seconds since 1970), by the listing."""
    return any(kind == "failed" and uri.rpartition("/")[2] >= _written(when) for kind, uri in _objects(store, run_uri))


def read_journal(store: ObjectStore, run_uri: str) -> list[Entry]:
    """The entries of a run in the order of their times."""
    known = {field.name for field in fields(Entry)}
    found = (store.get_json(uri) for _, uri in _objects(store, run_uri))
    return [Entry(**{name: value for name, value in entry.items() if name in known}) for entry in found]


def _written(when: float) -> str:
    """A time as the names of the objects begin with it."""
    return f"{time.strftime(_TIME, time.gmtime(when))}.{int(when * 1000) % 1000:03}Z"


def _objects(store: ObjectStore, run_uri: str) -> list[tuple[str, str]]:
    found = []
    for stat in store.list(join_uri(run_uri, JOURNAL)):
        kind = stat.uri.removesuffix(".json").rpartition("-")[2]
        if kind in get_args(Kind):
            found.append((kind, stat.uri))
    return found
