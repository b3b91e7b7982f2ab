"""Read what the object store holds of a run. Any record may be missing; the report then states the reason."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from esvit_core.config import Config
from esvit_core.data.shards.manifest import Manifest
from esvit_core.errors import UserError
from esvit_core.evaluation.results import Result
from esvit_core.registry.promotion import preview_promotion
from esvit_core.reporting.result_rows import read_results
from esvit_core.runs.environment import versions
from esvit_core.runs.log import read_log
from esvit_core.runs.run import CHOICE, INITIAL, MEASURED
from esvit_core.runs.training_summary import TrainingSummary, read_summary
from esvit_core.storage import NotFound, ObjectStore, StoreRefused, StoreUnavailable, join_uri

T = TypeVar("T")

COMMIT_VARIABLE = "ESVIT_COMMIT"


@dataclass(frozen=True)
class Record(Generic[T]):
    """A record of a run that may be missing.

    Attributes:
        value: its content; None if it is missing.
        reason: why it is missing.
    """

    value: T | None
    reason: str = ""


@dataclass(frozen=True)
class BadFile:
    """A file of the source that could not be used."""

    name: str
    reason: str


@dataclass(frozen=True)
class RunRecords:
    """The records of a run that the report shows.

    Attributes:
        existing: address of the existing backbone, or of the features, that the run evaluates; None if it trains one.
        of_features: it evaluates a file of features, without a network and without a baseline.
        statistics: of the images, see :mod:`esvit_core.data.ingest.statistics`; None: an older version prepared them.
        choice: what the recipe ``auto`` chose and why, in lines; empty with another recipe.
        initial: what was taken from ``init.source``; None: nothing.
    """

    run_uri: str
    config: Config
    manifest: Record[Manifest]
    bad_files: list[BadFile]
    log: Record[list[dict[str, Any]]]
    training: Record[TrainingSummary]
    backbone: Record[dict[str, Any]]
    results: list[Result]
    images: Record[dict[str, Any]]
    promotion: Record[dict[str, Any]]
    versions: dict[str, str]
    commit: str | None
    existing: str | None = None
    of_features: bool = False
    statistics: dict[str, Any] | None = None
    choice: tuple[str, ...] = ()
    initial: dict[str, Any] | None = None

    @property
    def run_id(self) -> str:
        return self.run_uri.rstrip("/").rsplit("/", 1)[-1]


def read_run_records(run_uri: str, store: ObjectStore, config: Config) -> RunRecords:
    """Read the records of a run; a missing record is not an error.

    Raises:
        StoreUnavailable, StoreRefused: the store cannot be read.
    """
    measured = _record(lambda: store.get_json(join_uri(run_uri, MEASURED)), "").value
    of_features = bool(measured and measured.get("features"))
    evaluated = "a file of features" if of_features else "an existing backbone"
    elsewhere = f"this run evaluates {evaluated}, {measured['backbone']}" if measured else ""
    training = _record(
        lambda: read_summary(store, run_uri),
        elsewhere or "training is not finished: training/summary.json is missing",
    )
    return RunRecords(
        run_uri=run_uri,
        config=config,
        manifest=_record(
            lambda: Manifest.read(store, join_uri(run_uri, "data")),
            "no data were prepared: data/manifest.json is missing",
        ),
        bad_files=_record(lambda: _bad_files(store, run_uri), "").value or [],
        log=_record(
            lambda: read_log(store, run_uri) or None,
            elsewhere or "training has written no log: training/log is empty",
        ),
        training=training,
        backbone=_record(
            lambda: _published(store, run_uri, "backbone", "backbone.json"),
            elsewhere if of_features else "no backbone is published: backbone/manifest.json is missing",
        ),
        results=read_results(store, run_uri, config),
        images=_record(
            lambda: _published(store, run_uri, "visualization", "visualization.json"),
            "no figures were drawn: visualization/manifest.json is missing",
        ),
        promotion=Record(None, f"{elsewhere}; it does not promote")
        if elsewhere
        else _record(lambda: preview_promotion(run_uri, store, config), ""),
        versions=(training.value.versions if training.value else {}) or versions(),
        commit=source_commit(),
        existing=str(measured["backbone"]) if measured else None,
        of_features=of_features,
        statistics=_record(lambda: _statistics(store, run_uri), "").value,
        choice=tuple(_record(lambda: store.get_json(join_uri(run_uri, CHOICE)), "").value or ()),
        initial=_record(lambda: store.get_json(join_uri(run_uri, INITIAL)), "").value,
    )


def source_commit() -> str | None:
    """Return the commit of the program: ``ESVIT_COMMIT``, or that of the git checkout that it runs from."""
    if commit := os.environ.get(COMMIT_VARIABLE):
        return commit
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # an installed package may be inside another project's checkout
        return None
    try:
        described = subprocess.run(
            [
                "git",
                "-C",
                str(root),
                "describe",
                "--always",
                "--abbrev=40",
                "--dirty=, with local changes",
                "--exclude=*",
            ],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None


def _record(read: Callable[[], T | None], absent: str) -> Record[T]:
    try:
        value = read()
    except NotFound:
        return Record(None, absent)
    except (StoreUnavailable, StoreRefused):
        raise
    except UserError as error:
        return Record(None, str(error))
    return Record(value, "" if value is not None else absent)


def _published(store: ObjectStore, run_uri: str, folder: str, name: str) -> dict[str, Any] | None:
    prefix = join_uri(run_uri, folder)
    return store.get_json(join_uri(prefix, name)) if store.read_manifest(prefix) is not None else None


def _statistics(store: ObjectStore, run_uri: str) -> dict[str, Any] | None:
    data = join_uri(run_uri, "data")
    name = Manifest.read(store, data).statistics
    return None if name is None else dict(store.get_json(join_uri(data, name)))


def _bad_files(store: ObjectStore, run_uri: str) -> list[BadFile]:
    data = join_uri(run_uri, "data")
    text = store.get_bytes(join_uri(data, Manifest.read(store, data).bad.list)).decode()
    lines = (json.loads(line) for line in text.split("\n") if line)  # names may contain other line breaks
    return [BadFile(str(line["name"]), str(line["reason"])) for line in lines]
