"""Prepare the images of a retraining: read the new ones, and reuse the shards of the earlier run for the rest."""

from __future__ import annotations

from esvit_core.config import DataConfig
from esvit_core.data.ingest.listing import Scan, get_listing
from esvit_core.data.ingest.parts import Share
from esvit_core.data.ingest.prepare import prepare, prepare_share
from esvit_core.data.shards.manifest import MANIFEST, Manifest
from esvit_core.retraining.find_new_data import LISTING_PATH
from esvit_core.runs.run import RETRAINING, Run
from esvit_core.storage import join_uri
from esvit_core.storage.store_errors import NotFound


def prepare_new(run: Run, share: Share | None = None) -> Manifest | None:
    """Prepare the images that :func:`~esvit_core.retraining.find_new_data.find_new` found.

    A run that is not a retraining (nothing was new, and the champion's data are the latest) has its data already.

    Args:
        run: the run.
        share: prepare only this share, and return None; None: prepare what is missing and publish the manifest.

    Raises:
        UserError: see :func:`esvit_core.data.ingest.prepare.prepare`.
    """
    if run.store.exists(run.at("data", MANIFEST)):  # the listing is fixed, so the data cannot have changed
        print(f"already done: found data/{MANIFEST}", flush=True)
        return Manifest.read(run.store, run.at("data"))
    record = run.store.get_json(run.at(RETRAINING))
    scan = Scan(get_listing(run.store, run.at(LISTING_PATH)), record["fingerprint"])
    source, destination = record["source"], run.at("data")
    if share is not None:
        prepare_share(source, run.store, destination, run.config.data, share, scan=scan, base=record["base"])
        return None
    return prepare(source, run.store, destination, run.config.data, scan=scan, base=record["base"])


def earlier_set(run: Run, name: str, settings: DataConfig) -> str | None:
    """Return the prefix of a transfer set in the earlier run whose images this run reuses; None if it cannot be reused.

    Args:
        settings: settings with which the set is to be prepared now.
    """
    try:
        base = run.store.get_json(run.at(RETRAINING))["base"]
        prefix = join_uri(base.rpartition("/")[0], "transfer", name) if base else None
        manifest = Manifest.read(run.store, prefix) if prefix else None
    except NotFound:
        return None
    fits = manifest and manifest.listing and manifest.settings == settings.identity_values()
    return prefix if fits else None
