"""The first step of a retraining: find what is new in the source, and start a run for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from esvit_core.config import Config
from esvit_core.data.ingest.incremental import read_listing
from esvit_core.data.ingest.listing import (
    LISTING,
    Difference,
    FileTable,
    Scan,
    compare,
    hash_touched_files_in,
    listing_file,
    scan_source,
)
from esvit_core.data.ingest.sources import source_fingerprint
from esvit_core.data.shards.manifest import Manifest
from esvit_core.errors import InfrastructureError, UserError
from esvit_core.registry.champions import pointer_uri, timestamp
from esvit_core.registry.lease import Lease, lease_uri, request_digest, require_available
from esvit_core.retraining.continuation import continuation_config
from esvit_core.runs.run import CONFIG, RETRAINING, Run, name_of_run, open_run, run_id, run_uri, start_run
from esvit_core.storage import ObjectStore, join_uri
from esvit_core.storage.json_text import encode_json
from esvit_core.storage.store_errors import NotFound

LISTING_PATH = f"retrain/{LISTING}"  # below the run: the listing of its source
_ATTEMPTS = 20


@dataclass(frozen=True)
class NewData:
    """The outcome of a scan of the source.

    Attributes:
        run: run to execute; if there is nothing to do, the last run, of which every step is complete.
        nothing: whether there is nothing to do.
        images: number of files in the source.
        new, changed, gone: numbers of files since the last retraining.
        message: all this in a sentence.
    """

    run: str
    nothing: bool
    images: int
    new: int
    changed: int
    gone: int
    message: str


@dataclass(frozen=True)
class _Earlier:
    """Data that an earlier run prepared from the source."""

    prefix: str
    manifest: Manifest
    files: FileTable

    @property
    def run(self) -> str:
        """Address of the earlier run."""
        return self.prefix.rpartition("/")[0]


def find_new(config: Config, source: str, owner: str, store: ObjectStore) -> NewData:
    """Compare a source with the images of earlier retrainings, and start or resume a retraining.

    An unfinished retraining of the same request is resumed with the images that it found; images that came later are left
    for the next retraining.

    Args:
        config: configuration of a training from scratch.
        source: source of the images, as for :func:`esvit_core.data.ingest.prepare.prepare`.
        owner: identity of the caller. The same owner resumes its own retraining; another owner is refused while the
            lease is held.
        store: object store of the runs.

    Raises:
        UserError: the source cannot be read, or most of its images are gone; the champion does not match the recipe; or
            another owner holds the lease.
    """
    store.ensure_bucket(config.bucket)
    request = request_digest(config, source)
    for _ in range(_ATTEMPTS):
        pointer = store.read_pointer(lease_uri(config))
        lease = Lease.of(pointer)
        decided = lease is None or lease.is_decided(store)
        if lease is not None and not decided:
            require_available(lease, owner, config, store)
            if lease.request == request and store.exists(join_uri(lease.run, CONFIG)):
                if lease.renewed_by(owner).acquire(store, config, pointer):
                    return _resume(lease.run, config, store)
                continue  # another owner was faster; check again
        champion = store.read_pointer(pointer_uri(config.bucket, config.promotion.pointer))
        known = None if champion is None else champion.value
        scan = scan_source(source, store)
        if not len(scan.files):
            raise UserError(f"{source}: no images in it; expected JPEG, PNG, WebP, GIF, BMP or TIFF files")
        earlier = _of_champion(known, store) if lease is None else _of_lease(lease, decided, store)
        if earlier is not None:
            scan.files.update(hash_touched_files_in(source, store, earlier.files, scan.files))
            if lease is None and not _is_of_this_source(earlier, scan, config):
                earlier = None
        difference = compare(earlier.files if earlier else FileTable(), scan.files)
        if earlier is not None:
            _require_most_of_it(source, earlier, difference, config)
            if difference.to_read < config.retrain.min_new_images:
                return _up_to_date(source, earlier, difference, scan, config)
        run, record = _plan(config, source, known, earlier, difference, scan, store)
        if Lease(run.uri, request, owner, timestamp(), record["base"]).acquire(store, config, pointer):
            _begin(run, record, scan.files)
            return _found(run.uri, record)
    raise InfrastructureError(f"pointer {lease_uri(config)}: changed under {_ATTEMPTS} attempts; run the step again")


def _of_lease(lease: Lease, decided: bool, store: ObjectStore) -> _Earlier | None:
    """Read the data of the last retraining."""
    prefix = join_uri(lease.run, "data") if decided else lease.base
    return None if prefix is None else _read(prefix, store)


def _of_champion(champion: Mapping[str, Any] | None, store: ObjectStore) -> _Earlier | None:
    """Read the data of the champion's run, before the first retraining."""
    return None if champion is None else _read(join_uri(str(champion["run"]), "data"), store)


def _is_of_this_source(earlier: _Earlier, scan: Scan, config: Config) -> bool:
    """Whether the source still has most of the earlier data."""
    difference = compare(earlier.files, scan.files)
    others = difference.removed + difference.changed
    return others <= config.retrain.max_removed_fraction * earlier.manifest.samples


def _read(prefix: str, store: ObjectStore) -> _Earlier | None:
    try:
        manifest = Manifest.read(store, prefix)
    except NotFound:
        return None
    if manifest.listing is None:  # prepared without a listing
        return None
    return _Earlier(prefix, manifest, read_listing(store, prefix, manifest))


def _require_most_of_it(source: str, earlier: _Earlier, difference: Difference, config: Config) -> None:
    gone, before = difference.removed, earlier.manifest.samples
    if gone > config.retrain.max_removed_fraction * before:
        raise UserError(
            f"{source}: {gone:,} of the {before:,} earlier images are gone; correct --data, or, if they were "
            "removed on purpose, set retrain.max_removed_fraction=1"
        )


def _up_to_date(source: str, earlier: _Earlier, difference: Difference, scan: Scan, config: Config) -> NewData:
    few = ""
    if difference.to_read:
        few = f", fewer than retrain.min_new_images={config.retrain.min_new_images}"
    message = f"nothing to do: {source} has {_counts(difference)} since {name_of_run(earlier.run)}{few}"
    counts = difference.new, difference.changed, difference.removed
    return NewData(earlier.run, True, len(scan.files), *counts, message)


def _plan(
    config: Config,
    source: str,
    champion: Mapping[str, Any] | None,
    earlier: _Earlier | None,
    difference: Difference,
    scan: Scan,
    store: ObjectStore,
) -> tuple[Run, dict[str, Any]]:
    """Return the run for the new images, and its record."""
    continuation = continuation_config(config, champion, store)
    # Images that were prepared with other settings cannot be reused: all are read again.
    base = earlier if earlier and earlier.manifest.settings == continuation.data.identity_values() else None
    content = scan.fingerprint + (base.manifest.fingerprint if base else "")
    sets = {s.name: source_fingerprint(s.source, store) for s in continuation.evaluation.transfer}
    run = Run(run_uri(continuation.bucket, run_id(continuation, content, sets)), store, continuation)
    start = f"starts from {continuation.init.source}" if continuation.init.source else "starts from scratch"
    since = f"since {name_of_run(earlier.run)}" if earlier else "in its first scan"
    record = {
        "source": source,
        "base": base.prefix if base else None,
        "images": len(scan.files),
        "fingerprint": scan.fingerprint,
        "new": difference.new,
        "changed": difference.changed,
        "gone": difference.removed,
        "champion": champion["run"] if champion else None,
        "time": timestamp(),
        "message": f"{source} has {_counts(difference)} {since}; {run.name} {start}",
    }
    return run, record


def _begin(run: Run, record: dict[str, Any], files: FileTable) -> None:
    """Write the inputs of the run; the configuration comes last and marks them complete."""
    with listing_file(files) as path:
        run.store.put_file(run.at(LISTING_PATH), path)
    run.store.put_if_absent(run.at(RETRAINING), encode_json(record))
    start_run(run.config, record["source"], run.uri, run.store)


def _resume(uri: str, config: Config, store: ObjectStore) -> NewData:
    run = open_run(uri, store)
    record = store.get_json(run.at(RETRAINING))
    current = run.config.with_execution(config.execution_values())
    start_run(current, record["source"], uri, store)
    return _found(uri, {**record, "message": f"resumed: {record['message']}"})


def _found(uri: str, record: dict[str, Any]) -> NewData:
    return NewData(uri, False, **{name: record[name] for name in ("images", "new", "changed", "gone", "message")})


def _counts(difference: Difference) -> str:
    new = difference.new
    parts = [f"{new:,} new {'file' if new == 1 else 'files'}"]
    parts += [f"{difference.changed:,} changed"] if difference.changed else []
    parts += [f"{difference.removed:,} gone"] if difference.removed else []
    return ", ".join(parts)
