"""Decide which runs may be removed from the object store, and remove them.

A run is kept if it was written to recently, if it is among the newest, if a pointer or a pointer's history names it, or
if a run that is kept started from it or reuses its images. When in doubt a run is kept.
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
from esvit_core.errors import UserError
from esvit_core.runs.run import CONFIG, FEATURE_ENTRIES, LEASES, run_uri
from esvit_core.storage import ObjectStore, join_uri
from esvit_core.storage.store_errors import NotFound

POINTERS = "pointers"
DAY = 86_400.0
# Age after which incomplete multipart uploads are removed: no upload of one object takes so long.
UNFINISHED = timedelta(days=7)


@dataclass(frozen=True)
class StoredRun:
    """A run as found in the object store.

    Attributes:
        name: run id.
        uri: ``s3://bucket/runs/<id>``.
        objects: number of objects.
        bytes: total size of the objects.
        modified: time of the last write, seconds since 1970.
        kept_because: why the run is kept; empty if it may be removed.
    """

    name: str
    uri: str
    objects: int
    bytes: int
    modified: float
    kept_because: str = ""


def plan_retention(
    store: ObjectStore, bucket: str, keep_days: float, keep_last: int = 3, now: float | None = None
) -> list[StoredRun]:
    """List every run of a bucket, the newest first, with the reason why it is kept.

    Args:
        store: object store.
        bucket: its bucket.
        keep_days: runs written to within this many days are kept.
        keep_last: number of newest runs that are kept whatever their age.
        now: current time, seconds since 1970; for tests.
    """
    now = time.time() if now is None else now
    runs = sorted(_runs(store, bucket), key=lambda run: (-run.modified, run.name))
    named = runs_named_by_pointers(store, bucket)
    reasons: dict[str, str] = {}
    for rank, run in enumerate(runs):
        if run.uri in named:
            reasons[run.uri] = f"pointer {named[run.uri]} names it"
        elif rank < keep_last:
            reasons[run.uri] = f"among the newest {keep_last}"
        elif now - run.modified < keep_days * DAY:
            reasons[run.uri] = f"written to within {keep_days:g} days"
    queue = list(reasons)
    while queue:
        follower = queue.pop()
        source, data = _init_source(store, follower), _base_data(store, follower)
        for run in runs:
            if run.uri not in reasons and (_names(source, run.uri) or _names(data, run.uri)):
                how = "started from it" if _names(source, run.uri) else "reuses its images"
                reasons[run.uri] = f"run {follower.rsplit('/', 1)[-1]} {how}"
                queue.append(run.uri)
    return [StoredRun(**{**vars(run), "kept_because": reasons.get(run.uri, "")}) for run in runs]


def remove_run(store: ObjectStore, run: StoredRun) -> bool:
    """Remove a run, unless it has been written to since it was listed, or a pointer names it now.

    After an interruption, calling this again removes the rest.

    Returns:
        Whether the run was removed.
    """
    bucket = run.uri.removeprefix("s3://").partition("/")[0]
    if run.uri in runs_named_by_pointers(store, bucket):
        return False
    if _scan_run(store, run.name, run.uri).modified > run.modified:
        return False
    store.remove_prefix(run.uri)
    return True


def remove_feature_entries(store: ObjectStore, bucket: str, runs: set[str]) -> None:
    """Remove the entries of features (:mod:`esvit_core.evaluation.stored_features`) that name one of these runs."""
    stale = []
    for stat in store.list(join_uri(f"s3://{bucket}", FEATURE_ENTRIES)):
        try:
            prefix = str(store.get_json(stat.uri)["prefix"])
        except (UserError, KeyError, TypeError):  # removed meanwhile, or no entry
            continue
        if any(_names(prefix, run) for run in runs):
            stale.append(stat.uri)
    store.remove_all(stale)


def runs_named_by_pointers(store: ObjectStore, bucket: str) -> dict[str, str]:
    """Return the runs that pointers and their histories name, and the name of the pointer.

    The lease of a retraining counts as a pointer, because the next retraining compares its source with that run's.
    """
    root = f"s3://{bucket}/runs/"
    named = {}
    prefix = f"s3://{bucket}/"
    for stat in chain(store.list(prefix + POINTERS), store.list(prefix + LEASES)):
        pointer = store.read_pointer(stat.uri)
        for text in _texts(pointer.value if pointer else None):
            if text.startswith(root):
                named[root + text.removeprefix(root).partition("/")[0]] = stat.uri.removeprefix(prefix).removeprefix(
                    f"{POINTERS}/"
                )
    return named


def _runs(store: ObjectStore, bucket: str) -> Iterator[StoredRun]:
    for folder in store.list(f"s3://{bucket}/runs", recursive=False):
        if folder.uri.endswith("/"):
            name = folder.uri.rstrip("/").rsplit("/", 1)[-1]
            run = _scan_run(store, name, run_uri(bucket, name))
            if run.objects:  # some stores list folders that have become empty
                yield run


def _scan_run(store: ObjectStore, name: str, uri: str) -> StoredRun:
    objects = list(store.list(uri))
    # An object of unknown age counts as new.
    times = [stat.modified.timestamp() if stat.modified else time.time() for stat in objects]
    return StoredRun(name, uri, len(objects), sum(stat.size for stat in objects), max(times, default=0.0))


def _init_source(store: ObjectStore, uri: str) -> str:
    """Return ``init.source`` of the run's configuration; empty if there is none."""
    try:
        config = yaml.safe_load(store.get_bytes(join_uri(uri, CONFIG)))
    except (NotFound, yaml.YAMLError, UnicodeDecodeError):
        return ""
    init = config.get("init") if isinstance(config, dict) else None
    return str((init or {}).get("source") or "") if isinstance(init, dict | None) else ""


def _base_data(store: ObjectStore, uri: str) -> str:
    """Return the earlier data set whose shards the run reuses; empty if there is none."""
    try:
        manifest = store.get_json(join_uri(uri, "data", MANIFEST))
    except NotFound:
        return ""
    return str(manifest.get("base") or "")


def _names(address: str, uri: str) -> bool:
    return address == uri or address.startswith(f"{uri}/")


def _texts(value: Any) -> Iterator[str]:
    """Yield every string in a JSON value, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
