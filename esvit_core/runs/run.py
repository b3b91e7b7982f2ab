"""A run: its id, its configuration, and its objects in the store.

All objects of a run are below ``s3://<bucket>/runs/<run id>/``. The id depends on everything that determines the result,
so the same command finds the same run and continues it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from esvit_core.config import Config, TransferSet
from esvit_core.errors import UserError
from esvit_core.storage import ObjectStore, join_uri
from esvit_core.storage.store_errors import NotFound, StoreRefused
from esvit_core.weights.weight_source import pin_source

CONFIG = "config.yaml"
RUNTIME = "runtime"  # pointer: execution settings of the latest start of the run
MEASURED = "measured.json"  # which backbone is measured, in a run that measures one trained elsewhere
CHOICE = "auto.json"  # what the recipe auto chose and why, in lines
INITIAL = "training/initial.json"  # what was taken from init.source
RETRAINING = "retrain.json"  # new images found, in a retraining
PROMOTION = "promotion.json"  # whether the run was promoted, and why
REPORT = "report/report.html"  # the last of the report's files: with it the report is complete
FEATURE_ENTRIES = "features"  # folder beside the runs: which run has the features of a network and images
LEASES = "leases"  # folder beside the runs: the lease on the retraining of each champion


def name_of_run(uri: str) -> str:
    """Return the id of the run at ``uri``."""
    return uri.rstrip("/").rpartition("/")[2]


@dataclass(frozen=True)
class Run:
    """A run that has been started.

    Attributes:
        uri: ``s3://<bucket>/runs/<run id>``.
        store: object store of the run.
        config: identity settings of the run, and execution settings of its latest start.
    """

    uri: str
    store: ObjectStore
    config: Config

    @property
    def name(self) -> str:
        """The run's id."""
        return name_of_run(self.uri)

    def at(self, *parts: str) -> str:
        """Return the address of an object of this run."""
        return join_uri(self.uri, *parts)

    def record_choice(self, lines: list[str]) -> None:
        """Print and store what the recipe ``auto`` chose and why, in lines; nothing with another recipe."""
        if not lines:
            return
        print(*lines, sep="\n", flush=True)
        try:
            self.store.put_if_absent(self.at(CHOICE), json.dumps(lines, ensure_ascii=False).encode())
        except StoreRefused:  # keys that were made before there was this object
            print(
                f"note: this key may not write {CHOICE}, so the report lacks these lines; make the keys again",
                flush=True,
            )

    def transfer_set(self, name: str) -> TransferSet:
        """Return the transfer set of that name.

        Raises:
            UserError: the run's configuration has none.
        """
        for transfer_set in self.config.evaluation.transfer:
            if transfer_set.name == name:
                return transfer_set
        known = ", ".join(s.name for s in self.config.evaluation.transfer) or "none"
        raise UserError(f"transfer set {name}: not in the run's configuration; it has {known}")

    def once(self, name: str, make: Callable[[], Any]) -> dict[str, Any]:
        """Return the JSON object ``name`` of this run; call ``make`` to write it if it does not exist.

        A step that was done before costs one request, and no import of the modules that ``make`` needs.
        """
        if self.store.exists(self.at(name)):
            print(f"already done: found {name}", flush=True)
        else:
            make()
        return self.store.get_json(self.at(name))


def run_id(config: Config, fingerprint: str, transfer_fingerprints: Mapping[str, str] | None = None) -> str:
    """Return the id of the run that ``config`` describes on this data.

    Args:
        config: the resolved configuration. Execution settings do not count (see
            :data:`esvit_core.config.section.EXECUTION`), nor do the locations of transfer sets and initial weights;
            their content does.
        fingerprint: of the images, see :func:`esvit_core.data.ingest.sources.source_fingerprint`.
        transfer_fingerprints: the same of the transfer sets, by name.
    """
    prints = transfer_fingerprints or {}
    sets = tuple(s.model_copy(update={"source": prints.get(s.name, s.source)}) for s in config.evaluation.transfer)
    evaluation = config.evaluation.model_copy(update={"transfer": sets})
    init = config.init.model_copy(update={"source": config.init.sha256 or config.init.source})
    counted = config.model_copy(update={"evaluation": evaluation, "init": init})
    digest = hashlib.sha256(f"{counted.digest()}\n{fingerprint}".encode()).hexdigest()
    recipe = re.sub(r"[^a-z0-9]+", "-", config.recipe.lower()).strip("-") or "run"
    return f"{recipe[:40]}-{digest[:10]}"


def identify_run(config: Config, source: str) -> str:
    """Return the id of the run, from the listings of the images and of the transfer sets.

    Raises:
        UserError: one of them does not exist or cannot be read.
    """
    from esvit_core.data.ingest.sources import source_fingerprint

    prints = {s.name: source_fingerprint(s.source) for s in config.evaluation.transfer}
    return run_id(config, source_fingerprint(source), prints)


def run_uri(bucket: str, name: str) -> str:
    return f"s3://{bucket}/runs/{name}"


def start_run(
    config: Config,
    source: str,
    uri: str = "",
    store: ObjectStore | None = None,
    check: Callable[[Config], None] | None = None,
) -> Run:
    """Create a run, or find the run that was started with the same configuration.

    Args:
        config: requested configuration.
        source: location of the images.
        uri: address of the run; empty: derived from its content.
        store: default: the store of the ``ESVIT_S3_*`` variables.
        check: validates a new run's configuration before anything is written; raises UserError.

    Raises:
        UserError: the run exists and has another configuration.
    """
    store = store or ObjectStore.from_env()
    config = pin_source(config, store)
    uri = (uri or run_uri(config.bucket, identify_run(config, source))).rstrip("/")
    store.ensure_bucket(uri.removeprefix("s3://").partition("/")[0])
    if check is not None and not store.exists(join_uri(uri, CONFIG)):
        check(config)
    if not store.put_if_absent(join_uri(uri, CONFIG), config.to_yaml().encode()):
        there = _read_config(uri, store)
        if difference := _difference(there, config):
            raise UserError(
                f"run {uri}: it was started with another configuration ({difference}); choose another run name"
            )
        _store_execution(uri, there, config, store)
        config = there.with_execution(config.execution_values())
    return Run(uri, store, config)


def _store_execution(uri: str, there: Config, wanted: Config, store: ObjectStore) -> None:
    """Store the execution settings of this start, for all later and repeated steps."""
    pointer = store.read_pointer(join_uri(uri, RUNTIME))
    if wanted.execution_values() != (there.execution_values() if pointer is None else pointer.value):
        store.swap_pointer(join_uri(uri, RUNTIME), wanted.execution_values(), pointer)


def open_run(uri: str, store: ObjectStore | None = None) -> Run:
    """Open the run at ``uri``, with the execution settings of its latest start.

    Args:
        uri: ``s3://bucket/runs/<run id>``.
        store: default: the store of the ``ESVIT_S3_*`` variables.

    Raises:
        UserError: there is no run.
    """
    store = store or ObjectStore.from_env()
    config, pointer = _read_config(uri, store), store.read_pointer(join_uri(uri, RUNTIME))
    return Run(uri.rstrip("/"), store, config if pointer is None else config.with_execution(pointer.value))


def _read_config(uri: str, store: ObjectStore) -> Config:
    try:
        text = store.get_bytes(join_uri(uri, CONFIG)).decode()
    except NotFound:
        raise UserError(f"run {uri}: no such run ({CONFIG} is missing); prepare the data first") from None
    return Config.from_yaml(text, origin=join_uri(uri, CONFIG))


def _difference(there: Config, here: Config) -> str:
    """Describe the first identity setting that differs; the locations of transfer sets and weights do not count."""

    def differs(a: Any, b: Any, key: str) -> str:
        if isinstance(a, dict) and isinstance(b, dict):
            return next((d for k in a if (d := differs(a[k], b.get(k), f"{key}.{k}" if key else k))), "")
        return "" if a == b else f"{key}: {a} there, {b} here"

    def counted(config: Config) -> dict[str, Any]:
        values = config.identity_values()
        for transfer_set in values["evaluation"]["transfer"]:
            del transfer_set["source"]
        if values["init"]["sha256"]:
            del values["init"]["source"]
        return values

    return differs(counted(there), counted(here), "")
