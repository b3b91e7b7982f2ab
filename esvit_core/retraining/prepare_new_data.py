"""The images of a retraining: what is new is read, the rest is taken over from the run before."""

from __future__ import annotations

from esvit_core.config import DataConfig
from esvit_core.data.ingest.listing import Scan, decode_listing
from esvit_core.data.ingest.prepare import prepare
from esvit_core.data.shards.manifest import MANIFEST, Manifest
from esvit_core.retraining.find_new_data import SEEN
from esvit_core.runs.run import RETRAINING, Run
from esvit_core.storage import join_uri
from esvit_core.storage.store_errors import NotFound


def prepare_new(run: Run) -> Manifest:
    """Prepare the images that were found.

    Of a run that is no retraining (nothing was new, and the champion's data are the last) they are there.

    Raises:
        UserError: see :func:`esvit_core.data.ingest.prepare.prepare`.
    """
    if run.store.exists(run.at("data", MANIFEST)):  # what was found is held fast: it cannot have changed
        print(f"already done: found data/{MANIFEST}", flush=True)
        return Manifest.read(run.store, run.at("data"))
    record = run.store.get_json(run.at(RETRAINING))
    scan = Scan(list(decode_listing(run.store.get_bytes(run.at(SEEN)))), record["fingerprint"])
    return prepare(record["source"], run.store, run.at("data"), run.config.data, scan=scan, base=record["base"])


def earlier_set(run: Run, name: str, settings: DataConfig) -> str | None:
    """The transfer set of that name in the run whose images this one takes over, if it can be built on.

    Args:
        settings: with which it is to be prepared now.
    """
    try:
        base = run.store.get_json(run.at(RETRAINING))["base"]
        place = join_uri(base.rpartition("/")[0], "transfer", name) if base else None
        manifest = Manifest.read(run.store, place) if place else None
    except NotFound:
        return None
    fits = manifest and manifest.listing and manifest.settings == settings.identity_values()
    return place if fits else None
