"""The first step of a retraining: what is new in the source, and which run that makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from esvit_core.config import Config
from esvit_core.data.ingest.incremental import read_listing
from esvit_core.data.ingest.listing import (
    LISTING,
    Difference,
    File,
    Scan,
    compare,
    encode_listing,
    hash_touched_files_in,
    scan_source,
)
from esvit_core.data.ingest.sources import source_fingerprint
from esvit_core.data.shards.manifest import Manifest
from esvit_core.errors import InfrastructureError, UserError
from esvit_core.registry.champions import now, pointer_uri
from esvit_core.registry.lease import Claim, claim_uri, request_of, require_free
from esvit_core.retraining.continuation import continued
from esvit_core.runs.run import CONFIG, RETRAINING, Run, name_of_run, open_run, run_id, run_uri, start_run
from esvit_core.storage import ObjectStore, join_uri
from esvit_core.storage.json_text import encode_json
from esvit_core.storage.store_errors import NotFound

SEEN = f"retrain/{LISTING}"  # of a run: the source as it was looked at
_ATTEMPTS = 20


@dataclass(frozen=True)
class Found:
    """What a look at the source has brought.

    Attributes:
        run: the run to carry out; where nothing is new the last one, which is finished, so that every step finds its
            work done.
        nothing: there is nothing to do.
        images: files in the source.
        new, changed, gone: since the last retraining.
        told: all this in a sentence.
    """

    run: str
    nothing: bool
    images: int
    new: int
    changed: int
    gone: int
    told: str


@dataclass(frozen=True)
class _Earlier:
    """Data that were prepared of the source before."""

    prefix: str
    manifest: Manifest
    files: list[File]

    @property
    def run(self) -> str:
        """Address of the run that they belong to."""
        return self.prefix.rpartition("/")[0]


def find_new(config: Config, source: str, owner: str, store: ObjectStore) -> Found:
    """Compare a source with what earlier retrainings have taken, and begin or go on with a retraining.

    A retraining that was begun with the same request and is not finished goes on, whatever has come since: that is for
    the next one.

    Args:
        config: as the user wants it.
        source: of the images, as for :func:`esvit_core.data.ingest.prepare.prepare`.
        owner: who asks. The same owner finds its own retraining again; another one is told that it is under way.
        store: where everything is.

    Raises:
        UserError: the source cannot be read, or most of it is gone; the champion does not fit the recipe; or another
            owner is at it.
    """
    store.ensure_bucket(config.bucket)
    request = request_of(config, source)
    for _ in range(_ATTEMPTS):
        pointer = store.read_pointer(claim_uri(config))
        claim = Claim.of(pointer)
        decided = claim is None or claim.is_decided(store)
        if claim is not None and not decided:
            require_free(claim, owner, config, store)
            if claim.request == request and store.exists(join_uri(claim.run, CONFIG)):
                if claim.taken_by(owner).put(store, config, pointer):
                    return _going_on(claim.run, config, store)
                continue  # another was quicker: see who
        champion = store.read_pointer(pointer_uri(config.bucket, config.promotion.pointer))
        known = None if champion is None else champion.value
        seen = scan_source(source, store)
        if not seen.files:
            raise UserError(f"{source}: no images in it; expected JPEG, PNG, WebP, GIF, BMP or TIFF files")
        earlier = _of_champion(known, store) if claim is None else _of_claim(claim, decided, store)
        if earlier is not None:
            seen = replace(seen, files=hash_touched_files_in(source, store, earlier.files, seen.files))
            if claim is None and not _is_of_this_source(earlier, seen, config):
                earlier = None
        difference = compare(earlier.files if earlier else [], seen.files)
        if earlier is not None:
            _require_most_of_it(source, earlier, difference, config)
            if difference.to_read < config.retrain.min_new_images:
                return _nothing(source, earlier, difference, seen, config)
        run, record = _planned(config, source, known, earlier, difference, seen, store)
        if Claim(run.uri, request, owner, now(), record["base"]).put(store, config, pointer):
            _begin(run, record, seen.files)
            return _found(run.uri, record)
    raise InfrastructureError(f"pointer {claim_uri(config)}: changed under {_ATTEMPTS} attempts; run the step again")


def _of_claim(claim: Claim, decided: bool, store: ObjectStore) -> _Earlier | None:
    """What the last finished retraining took."""
    prefix = join_uri(claim.run, "data") if decided else claim.base
    return None if prefix is None else _read(prefix, store)


def _of_champion(champion: Mapping[str, Any] | None, store: ObjectStore) -> _Earlier | None:
    """Before the first retraining: what the run of the champion took."""
    return None if champion is None else _read(join_uri(str(champion["run"]), "data"), store)


def _is_of_this_source(earlier: _Earlier, seen: Scan, config: Config) -> bool:
    """Whether most of the earlier data are in the source."""
    difference = compare(earlier.files, seen.files)
    others = len(difference.removed) + len(difference.changed)
    return others <= config.retrain.max_gone_fraction * earlier.manifest.samples


def _read(prefix: str, store: ObjectStore) -> _Earlier | None:
    try:
        manifest = Manifest.read(store, prefix)
    except NotFound:
        return None
    if manifest.listing is None:  # of a version that kept none
        return None
    return _Earlier(prefix, manifest, read_listing(store, prefix, manifest))


def _require_most_of_it(source: str, earlier: _Earlier, difference: Difference, config: Config) -> None:
    gone, before = len(difference.removed), earlier.manifest.samples
    if gone > config.retrain.max_gone_fraction * before:
        raise UserError(
            f"{source}: {gone:,} of the {before:,} images that were taken before are not there any more; name the "
            "right source, or, if they are to go, set retrain.max_gone_fraction=1"
        )


def _nothing(source: str, earlier: _Earlier, difference: Difference, seen: Scan, config: Config) -> Found:
    few = ""
    if difference.to_read:
        few = f", fewer than retrain.min_new_images={config.retrain.min_new_images}"
    told = f"nothing to do: {source} has {_counts(difference)} since {name_of_run(earlier.run)}{few}"
    counts = len(difference.new), len(difference.changed), len(difference.removed)
    return Found(earlier.run, True, len(seen.files), *counts, told)


def _planned(
    config: Config,
    source: str,
    champion: Mapping[str, Any] | None,
    earlier: _Earlier | None,
    difference: Difference,
    seen: Scan,
    store: ObjectStore,
) -> tuple[Run, dict[str, Any]]:
    """The run that the new images make, and what is to be known of it."""
    made = continued(config, champion, store)
    # Images that were prepared with other settings are not what is wanted now: all are read again.
    base = earlier if earlier and earlier.manifest.settings == made.data.identity_values() else None
    content = seen.fingerprint + (base.manifest.fingerprint if base else "")
    sets = {s.name: source_fingerprint(s.source, store) for s in made.evaluation.transfer}
    run = Run(run_uri(made.bucket, run_id(made, content, sets)), store, made)
    start = f"starts from {made.init.source}" if made.init.source else "starts from nothing"
    since = f"since {name_of_run(earlier.run)}" if earlier else "and is looked at for the first time"
    record = {
        "source": source,
        "base": base.prefix if base else None,
        "images": len(seen.files),
        "fingerprint": seen.fingerprint,
        "new": len(difference.new),
        "changed": len(difference.changed),
        "gone": len(difference.removed),
        "champion": champion["run"] if champion else None,
        "time": now(),
        "told": f"{source} has {_counts(difference)} {since}; {run.name} {start}",
    }
    return run, record


def _begin(run: Run, record: dict[str, Any], files: list[File]) -> None:
    """Write what the run is made of; the configuration last, which says that all is there."""
    run.store.put_bytes(run.at(SEEN), encode_listing(files))
    run.store.put_if_absent(run.at(RETRAINING), encode_json(record))
    start_run(run.config, record["source"], run.uri, run.store)


def _going_on(uri: str, config: Config, store: ObjectStore) -> Found:
    run = open_run(uri, store)
    record = store.get_json(run.at(RETRAINING))
    here = run.config.executed_as(config.execution_values())
    start_run(here, record["source"], uri, store)
    return _found(uri, {**record, "told": f"going on: {record['told']}"})


def _found(uri: str, record: dict[str, Any]) -> Found:
    return Found(uri, False, **{name: record[name] for name in ("images", "new", "changed", "gone", "told")})


def _counts(difference: Difference) -> str:
    new = len(difference.new)
    parts = [f"{new:,} new {'file' if new == 1 else 'files'}"]
    parts += [f"{len(difference.changed):,} changed"] if difference.changed else []
    parts += [f"{len(difference.removed):,} gone"] if difference.removed else []
    return ", ".join(parts)
