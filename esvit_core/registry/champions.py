"""The history of a ``champion`` pointer, and rollback to a former champion."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

from esvit_core.errors import UserError
from esvit_core.runs.run import name_of_run
from esvit_core.storage import ObjectStore, Pointer, join_uri

HISTORY = 50  # former champions in a pointer's history


@dataclass(frozen=True)
class Champion:
    """The current or a former champion.

    Attributes:
        run: ``s3://bucket/runs/<id>``.
        metric, value: metric that decided on its promotion, and its value in percent.
        time: time of the promotion, ISO 8601.
        reason: reason for the promotion.
        current: whether it is the current champion.
        rolled_back: ``time``, ``who`` and ``why`` of the rollback, if there was one.
    """

    run: str
    metric: str
    value: float | None
    time: str
    reason: str
    current: bool = False
    rolled_back: dict[str, str] | None = None

    @property
    def name(self) -> str:
        """The run's name."""
        return name_of_run(self.run)


def pointer_uri(bucket: str, name: str) -> str:
    """Return the address of a pointer."""
    return join_uri(f"s3://{bucket}", "pointers", name)


def with_history(value: dict[str, Any], former: dict[str, Any] | None, **mark: Any) -> dict[str, Any]:
    """Return a pointer's new value, with its former value appended to the history.

    Args:
        value: new value, without history.
        former: former value of the pointer; None if it was never set.
        mark: additional fields of the former value's entry.
    """
    if former is None:
        return value | {"previous": None, "history": []}
    fields = {key: entry for key, entry in former.items() if key not in ("history", "previous")}
    history = [*former.get("history", []), fields | mark]
    return value | {"previous": former["backbone"], "history": history[-HISTORY:]}


def timestamp() -> str:
    """Return the current time as in pointers, ISO 8601 in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def champions(store: ObjectStore, bucket: str, name: str) -> list[Champion]:
    """List the champions of a pointer, the current one first and the oldest last.

    Raises:
        UserError: the pointer was never set.
    """
    current = _current(store, bucket, name).value
    return [_champion(current, current=True), *(_champion(entry) for entry in reversed(current.get("history", [])))]


def roll_back(store: ObjectStore, bucket: str, name: str, to: str | None, who: str, why: str) -> Champion:
    """Make a former champion the current one by compare-and-swap; the replaced champion goes into the history.

    Args:
        store: object store of the pointer.
        bucket: bucket of the pointer.
        name: name of the pointer.
        to: run to roll back to, or a prefix of its name; None: the newest champion before the current one that was not
            itself rolled back.
        who: user who rolls back.
        why: reason in a sentence; may be empty.

    Returns:
        The new current champion.

    Raises:
        UserError: there is no such champion, its backbone was deleted, or the pointer changed in the meantime.
    """
    uri = pointer_uri(bucket, name)
    current = _current(store, bucket, name)
    target = _former(current.value, name) if to is None else _named(current.value, name, to)
    if store.read_manifest(target["backbone"]) is None:
        raise UserError(f"run {target['run']}: its backbone was deleted; name another run with --to")
    mark = {"time": timestamp(), "who": who, "why": why}
    kept = {key: entry for key, entry in target.items() if key not in ("rolled_back", "compared", "time", "reason")}
    reason = f"rolled back from {current.value['run'].rpartition('/')[2]} by {who}" + (f": {why}" if why else "")
    value = kept | {"reason": reason, "compared": None, "time": mark["time"]}
    if not store.swap_pointer(uri, with_history(value, current.value, rolled_back=mark), current):
        raise UserError(
            f"pointer {name}: another run became champion in the meantime; check `esvit champions` and try again"
        )
    return _champion(value, current=True)


def _current(store: ObjectStore, bucket: str, name: str) -> Pointer:
    uri = pointer_uri(bucket, name)
    current = store.read_pointer(uri)
    if current is None:
        raise UserError(f"pointer {name}: there is no champion yet (no {uri}); a run has to be promoted first")
    return current


def _former(current: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the newest champion before the current one's first promotion that was not rolled back."""
    history: list[dict[str, Any]] = current.get("history", [])
    own = next((i for i, entry in enumerate(history) if entry["run"] == current["run"]), len(history))
    before = [entry for entry in history[:own] if "rolled_back" not in entry]
    if not before:
        raise UserError(
            f"pointer {name}: {name_of_run(current['run'])} has no earlier champion to roll back to; "
            "`esvit champions` lists the others"
        )
    return before[-1]


def _named(current: dict[str, Any], name: str, to: str) -> dict[str, Any]:
    history: list[dict[str, Any]] = current.get("history", [])
    wanted = name_of_run(to)
    found = {entry["run"]: entry for entry in history if name_of_run(entry["run"]).startswith(wanted)}
    found.pop(current["run"], None)
    if len(found) == 1:
        return next(iter(found.values()))
    if name_of_run(current["run"]).startswith(wanted) and not found:
        raise UserError(f"--to {to}: this run is the current {name}")
    known = ", ".join(dict.fromkeys(name_of_run(entry["run"]) for entry in reversed(history))) or "none"
    which = "more than one former champion matches" if found else "no former champion matches"
    raise UserError(f"--to {to}: {which}; the history of pointer {name} has {known}")


def _champion(entry: dict[str, Any], current: bool = False) -> Champion:
    return Champion(
        run=entry["run"],
        metric=entry.get("metric", ""),
        value=entry.get("value"),
        time=entry.get("time", ""),
        reason=entry.get("reason", ""),
        current=current,
        rolled_back=entry.get("rolled_back"),
    )
