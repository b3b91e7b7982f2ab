"""Which runs may be removed from the object store, and their removal.

A run stays if anything was written to it lately, if it is one of the newest, if a pointer or the history of one names
it, or if a run that stays has started from it or has taken over its images. When in doubt it stays.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from typing import Any

import yaml

from esvit_core.data.shards.manifest import MANIFEST
from esvit_core.runs.run import CONFIG, LEASES, run_uri
from esvit_core.storage import ObjectStore, join_uri
from esvit_core.storage.store_errors import NotFound

POINTERS = "pointers"
DAY = 86_400.0
# Parts of uploads whose writers were killed; nobody works on one object for so long.
UNFINISHED = timedelta(days=7)


@dataclass(frozen=True)
class StoredRun:
    """A run as its objects show it.

    Attributes:
        name: run id.
        uri: ``s3://bucket/runs/<id>``.
        objects: how many it has.
        bytes: of all of them.
        touched: when the last of them was written, seconds since 1970.
        kept: why it stays; empty: it may go.
    """

    name: str
    uri: str
    objects: int
    bytes: int
    touched: float
    kept: str = ""


def judge_runs(
    store: ObjectStore, bucket: str, keep_days: float, keep_last: int = 3, now: float | None = None
) -> list[StoredRun]:
    """Every run of a bucket, and why it stays or that it may go, the newest first.

    Args:
        store: where they are.
        bucket: likewise.
        keep_days: a run to which something was written within so many days stays.
        keep_last: the newest ones, so many, stay whatever their age.
        now: seconds since 1970.
    """
    now = time.time() if now is None else now
    runs = sorted(_runs(store, bucket), key=lambda run: (-run.touched, run.name))
    named = named_by_pointers(store, bucket)
    why: dict[str, str] = {}
    for place, run in enumerate(runs):
        if run.uri in named:
            why[run.uri] = f"pointer {named[run.uri]} names it"
        elif place < keep_last:
            why[run.uri] = f"among the newest {keep_last}"
        elif now - run.touched < keep_days * DAY:
            why[run.uri] = f"written to within {keep_days:g} days"
    waiting = list(why)
    while waiting:
        follower = waiting.pop()
        source, data = _started_from(store, follower), _built_on(store, follower)
        for run in runs:
            if run.uri not in why and (_names(source, run.uri) or _names(data, run.uri)):
                how = "started from it" if _names(source, run.uri) else "has taken over its images"
                why[run.uri] = f"run {follower.rsplit('/', 1)[-1]} {how}"
                waiting.append(run.uri)
    return [StoredRun(**{**vars(run), "kept": why.get(run.uri, "")}) for run in runs]


def remove_run(store: ObjectStore, run: StoredRun) -> bool:
    """Remove a run unless it has been written to, or a pointer has come to name it, since it was judged.

    Called again after an interruption it removes the rest.

    Returns:
        Whether it was removed.
    """
    bucket = run.uri.removeprefix("s3://").partition("/")[0]
    if run.uri in named_by_pointers(store, bucket):
        return False
    if _look_at(store, run.name, run.uri).touched > run.touched:
        return False
    store.remove_prefix(run.uri)
    return True


def named_by_pointers(store: ObjectStore, bucket: str) -> dict[str, str]:
    """The runs that pointers and their histories name: the run's address, and the pointer's name.

    So does the lease of a retraining: the next one compares the source with what that one took.
    """
    root = f"s3://{bucket}/runs/"
    named = {}
    place = f"s3://{bucket}/"
    for stat in chain(store.list(place + POINTERS), store.list(place + LEASES)):
        pointer = store.read_pointer(stat.uri)
        for text in _texts(pointer.value if pointer else None):
            if text.startswith(root):
                named[root + text.removeprefix(root).partition("/")[0]] = stat.uri.removeprefix(place).removeprefix(
                    f"{POINTERS}/"
                )
    return named


def _runs(store: ObjectStore, bucket: str) -> Iterator[StoredRun]:
    for folder in store.list(f"s3://{bucket}/runs", recursive=False):
        if folder.uri.endswith("/"):
            name = folder.uri.rstrip("/").rsplit("/", 1)[-1]
            found = _look_at(store, name, run_uri(bucket, name))
            if found.objects:  # some stores list folders that have become empty
                yield found


def _look_at(store: ObjectStore, name: str, uri: str) -> StoredRun:
    objects = list(store.list(uri))
    # One of unknown age counts as new.
    times = [stat.modified.timestamp() if stat.modified else time.time() for stat in objects]
    return StoredRun(name, uri, len(objects), sum(stat.size for stat in objects), max(times, default=0.0))


def _started_from(store: ObjectStore, uri: str) -> str:
    """What the run's configuration names as its beginning; empty where it names nothing."""
    try:
        config = yaml.safe_load(store.get_bytes(join_uri(uri, CONFIG)))
    except (NotFound, yaml.YAMLError, UnicodeDecodeError):
        return ""
    init = config.get("init") if isinstance(config, dict) else None
    return str((init or {}).get("source") or "") if isinstance(init, dict | None) else ""


def _built_on(store: ObjectStore, uri: str) -> str:
    """The earlier data in whose shards images of the run lie; empty where there are none."""
    try:
        manifest = store.get_json(join_uri(uri, "data", MANIFEST))
    except NotFound:
        return ""
    return str(manifest.get("base") or "")


def _names(address: str, uri: str) -> bool:
    return address == uri or address.startswith(f"{uri}/")


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value, at whatever depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)
