"""What the object store holds of a run. Any piece may be missing; the report then says so, with the reason."""

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
from esvit_core.registry.promotion import foresee
from esvit_core.reporting.result_table import read_results
from esvit_core.runs.environment import versions
from esvit_core.runs.log import read_log
from esvit_core.runs.run import MEASURED
from esvit_core.runs.training_summary import TrainingSummary, read_summary
from esvit_core.storage import NotFound, ObjectStore, StoreRefused, StoreUnavailable, join_uri

T = TypeVar("T")

COMMIT_VARIABLE = "ESVIT_COMMIT"


@dataclass(frozen=True)
class Piece(Generic[T]):
    """Something that may be there.

    Attributes:
        value: None where it is not.
        reason: why not.
    """

    value: T | None
    reason: str = ""


@dataclass(frozen=True)
class BadFile:
    """A file of the source that was left out."""

    name: str
    reason: str


@dataclass(frozen=True)
class Facts:
    """Everything that the report tells, as it is in the store."""

    run_uri: str
    config: Config
    manifest: Piece[Manifest]
    bad_files: list[BadFile]
    log: Piece[list[dict[str, Any]]]
    training: Piece[TrainingSummary]
    backbone: Piece[dict[str, Any]]
    results: list[Result]
    images: Piece[dict[str, Any]]
    promotion: Piece[dict[str, Any]]
    versions: dict[str, str]
    commit: str | None

    @property
    def run_id(self) -> str:
        return self.run_uri.rstrip("/").rsplit("/", 1)[-1]


def read_facts(run_uri: str, store: ObjectStore, config: Config) -> Facts:
    """Read what there is of a run.

    Raises:
        StoreUnavailable, StoreRefused: the store itself cannot be read; a missing piece raises nothing.
    """
    measured = _piece(lambda: store.get_json(join_uri(run_uri, MEASURED)), "").value
    elsewhere = f"this run measures a backbone that was trained before, {measured['backbone']}" if measured else ""
    training = _piece(
        lambda: read_summary(store, run_uri),
        elsewhere or "training is not finished: training/summary.json is missing",
    )
    return Facts(
        run_uri=run_uri,
        config=config,
        manifest=_piece(
            lambda: Manifest.read(store, join_uri(run_uri, "data")),
            "no data were prepared: data/manifest.json is missing",
        ),
        bad_files=_piece(lambda: _bad_files(store, run_uri), "").value or [],
        log=_piece(
            lambda: read_log(store, run_uri) or None,
            elsewhere or "training has written no log: training/log is empty",
        ),
        training=training,
        backbone=_piece(
            lambda: _published(store, run_uri, "backbone", "backbone.json"),
            "no backbone is published: backbone/manifest.json is missing",
        ),
        results=read_results(store, run_uri, config),
        images=_piece(
            lambda: _published(store, run_uri, "visualization", "visualization.json"),
            "no images were drawn: visualization/manifest.json is missing",
        ),
        promotion=Piece(None, f"{elsewhere}; it promotes nothing")
        if elsewhere
        else _piece(lambda: foresee(run_uri, store, config), ""),
        versions=(training.value.versions if training.value else {}) or versions(),
        commit=source_commit(),
    )


def source_commit() -> str | None:
    """The commit of the program: ``ESVIT_COMMIT``, or what git says of the checkout that it runs from."""
    if commit := os.environ.get(COMMIT_VARIABLE):
        return commit
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # an installed package may lie in a checkout of something else
        return None
    try:
        said = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty=, changed since", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip() or None


def _piece(read: Callable[[], T | None], absent: str) -> Piece[T]:
    try:
        value = read()
    except NotFound:
        return Piece(None, absent)
    except (StoreUnavailable, StoreRefused):
        raise
    except UserError as error:
        return Piece(None, str(error))
    return Piece(value, "" if value is not None else absent)


def _published(store: ObjectStore, run_uri: str, folder: str, name: str) -> dict[str, Any] | None:
    prefix = join_uri(run_uri, folder)
    return store.get_json(join_uri(prefix, name)) if store.read_manifest(prefix) is not None else None


def _bad_files(store: ObjectStore, run_uri: str) -> list[BadFile]:
    data = join_uri(run_uri, "data")
    text = store.get_bytes(join_uri(data, Manifest.read(store, data).bad.list)).decode()
    lines = (json.loads(line) for line in text.split("\n") if line)  # names may have other line breaks in them
    return [BadFile(str(line["name"]), str(line["reason"])) for line in lines]
