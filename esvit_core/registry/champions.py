"""The history of a ``champion`` pointer, and the way back to a former one."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

from esvit_core.errors import UserError
from esvit_core.runs.run import name_of_run
from esvit_core.storage import ObjectStore, Pointer, join_uri

HISTORY = 50  # former champions that the pointer remembers
_ATTEMPTS = 20


@dataclass(frozen=True)
class Champion:
    """One that is or was in use.

    Attributes:
        run: ``s3://bucket/runs/<id>``.
        metric, value: with which it was promoted; the value in percent.
        time: when it became champion, ISO 8601.
        reason: why.
        present: whether it is the champion now.
        rolled_back: ``time``, ``who`` and ``why``, where it was taken back.
    """

    run: str
    metric: str
    value: float | None
    time: str
    reason: str
    present: bool = False
    rolled_back: dict[str, str] | None = None

    @property
    def name(self) -> str:
        """The run's name."""
        return name_of_run(self.run)


def pointer_uri(bucket: str, name: str) -> str:
    """Where a pointer lies."""
    return join_uri(f"s3://{bucket}", "pointers", name)


def with_history(value: dict[str, Any], former: dict[str, Any] | None, **mark: Any) -> dict[str, Any]:
    """A pointer's new value, with the former one at the end of its history.

    Args:
        value: without history.
        former: what the pointer said before; None where it was never set.
        mark: further entries of the former one.
    """
    if former is None:
        return value | {"previous": None, "history": []}
    left = {key: entry for key, entry in former.items() if key not in ("history", "previous")}
    history = [*former.get("history", []), left | mark]
    return value | {"previous": former["backbone"], "history": history[-HISTORY:]}


def now() -> str:
    """The time as a pointer tells it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def champions(store: ObjectStore, bucket: str, name: str) -> list[Champion]:
    """The champions of a pointer, the present one first, the oldest last.

    Raises:
        UserError: the pointer was never set.
    """
    present = _present(store, bucket, name).value
    return [_champion(present, present=True), *(_champion(entry) for entry in reversed(present.get("history", [])))]


def roll_back(store: ObjectStore, bucket: str, name: str, to: str | None, who: str, why: str) -> Champion:
    """Make a former champion the present one again, by compare-and-swap, and keep the one that goes in the history.

    Args:
        store: where the pointer is.
        bucket: its bucket.
        name: of the pointer.
        to: run to go back to, or the beginning of its name; None: the newest champion before the present one that was
            not itself taken back.
        who: goes back.
        why: in a sentence; may be empty.

    Returns:
        The champion that is in use now.

    Raises:
        UserError: there is no such champion, its backbone is gone, or the pointer changed in the meantime.
    """
    uri = pointer_uri(bucket, name)
    present = _present(store, bucket, name)
    target = _former(present.value, name) if to is None else _named(present.value, name, to)
    if store.read_manifest(target["backbone"]) is None:
        raise UserError(f"run {target['run']}: its backbone is not there any more; name another one with --to")
    mark = {"time": now(), "who": who, "why": why}
    kept = {key: entry for key, entry in target.items() if key not in ("rolled_back", "compared", "time", "reason")}
    reason = f"back from {present.value['run'].rpartition('/')[2]}, by {who}" + (f": {why}" if why else "")
    value = kept | {"reason": reason, "compared": None, "time": mark["time"]}
    if not store.swap_pointer(uri, with_history(value, present.value, rolled_back=mark), present):
        raise UserError(f"pointer {name}: another run became champion in the meantime; look at `esvit champions` again")
    return _champion(value, present=True)


def _present(store: ObjectStore, bucket: str, name: str) -> Pointer:
    uri = pointer_uri(bucket, name)
    present = store.read_pointer(uri)
    if present is None:
        raise UserError(f"pointer {name}: there is no champion yet (no {uri}); a run has to be promoted first")
    return present


def _former(present: dict[str, Any], name: str) -> dict[str, Any]:
    """The newest before the present one's own first time, those that were taken back left out."""
    history: list[dict[str, Any]] = present.get("history", [])
    own = next((i for i, entry in enumerate(history) if entry["run"] == present["run"]), len(history))
    before = [entry for entry in history[:own] if "rolled_back" not in entry]
    if not before:
        raise UserError(
            f"pointer {name}: {name_of_run(present['run'])} has no predecessor to go back to; "
            "`esvit champions` lists the others"
        )
    return before[-1]


def _named(present: dict[str, Any], name: str, to: str) -> dict[str, Any]:
    history: list[dict[str, Any]] = present.get("history", [])
    wanted = name_of_run(to)
    found = {entry["run"]: entry for entry in history if name_of_run(entry["run"]).startswith(wanted)}
    found.pop(present["run"], None)
    if len(found) == 1:
        return next(iter(found.values()))
    if name_of_run(present["run"]).startswith(wanted) and not found:
        raise UserError(f"--to {to}: it is the {name} now")
    known = ", ".join(dict.fromkeys(name_of_run(entry["run"]) for entry in reversed(history))) or "none"
    which = "more than one former champion begins so" if found else "no former champion of this name"
    raise UserError(f"--to {to}: {which}; pointer {name} remembers {known}")


def _champion(entry: dict[str, Any], present: bool = False) -> Champion:
    return Champion(
        run=entry["run"],
        metric=entry.get("metric", ""),
        value=entry.get("value"),
        time=entry.get("time", ""),
        reason=entry.get("reason", ""),
        present=present,
        rolled_back=entry.get("rolled_back"),
    )
