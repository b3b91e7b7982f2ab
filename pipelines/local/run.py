"""`esvit run`: from the user's images to the last words of a finished run."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esvit_core.config import Config
from esvit_core.data.shards.manifest import check_source
from esvit_core.errors import EsvitError, UserError
from esvit_core.monitoring.progress_line import format_duration
from esvit_core.planning.feasibility import require_metric
from esvit_core.runs.events import note, read_journal
from esvit_core.runs.run import CONFIG, PROMOTION, Run, identify_run, run_uri
from esvit_core.storage import ObjectStore
from esvit_core.storage.address import ENDPOINT
from esvit_core.storage.marker import mark
from esvit_core.storage.session import open_store
from esvit_core.storage.store_errors import NotFound
from esvit_core.storage.weed import path_problem
from esvit_core.weights.weight_source import with_source_pinned
from esvit_pipelines.cli.settings import DEFAULT_RECIPE, LOG, Settings, command, program, resolve, sources, store_in
from esvit_pipelines.local.attempt import in_progress, run_attempt

ASKED = "asked.yaml"  # below DIR/<run> of a retraining: what was asked for


def run(settings: Settings) -> None:
    """Run the pipeline on this machine, or go on with it, and show the result.

    Raises:
        UserError: in the settings, the data, or the surroundings; before anything is started where that is possible.
        InfrastructureError: something failed that may work later.
        CrashError: a step failed unexpectedly.
        StoppedError: the run was asked to stop; its state is saved.
    """
    config = resolve(settings)
    require_metric(config)
    with opened(settings, config) as store:
        config = with_source_pinned(config, store)
        name = identify_run(config, settings.data)
        current = Run(run_uri(config.bucket, name), store, config)
        say_if_no_recipe(settings)
        there = store.exists(current.at(CONFIG))
        print(f"run {name}" + (", which was started before: finished steps are found, not repeated" if there else ""))
        carry_out(settings, current)
        if config.recipe == DEFAULT_RECIPE and settings.transfer:
            print(
                f"\nThe same on your own images:\n    {program()} run --data <folder, tar, zip or s3://bucket/prefix>"
            )


@contextmanager
def opened(settings: Settings, config: Config) -> Iterator[ObjectStore]:
    """The store, after a look at the sources and the folder for what the run leaves here.

    Raises:
        UserError: a source, the folder or the store cannot be used.
    """
    local = [s for s in sources(config, settings.data) if not s.startswith("s3://")]
    for source in local:
        check_source(source)
    _make_folder(settings.out)
    with _told_of_the_disk(settings.out), open_store(store_in(settings.out)) as store:
        store.check()
        store.ensure_bucket(config.bucket)
        for source in sources(config, settings.data):
            if source not in local:
                check_source(source)
        yield store


@dataclass(frozen=True)
class Retraining:
    """How a retraining is asked for.

    Attributes:
        owner: who makes it.
        config: as it was asked for; that of the run is made of it.
    """

    owner: str
    config: Config


def carry_out(settings: Settings, current: Run, retraining: Retraining | None = None) -> None:
    """Run every step of a run, and show what came out.

    Args:
        retraining: None: the run is none.

    Raises:
        EsvitError, StoppedError: see :func:`run`.
    """
    here = settings.out / current.name
    here.mkdir(exist_ok=True)
    mark(here)
    (here / CONFIG).write_text(current.config.to_yaml(), encoding="utf-8")
    log = here / LOG
    start = time.monotonic()
    print(f"log {log}", flush=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {command()}\n")
    asked, owner = here / CONFIG, None
    if retraining is not None:
        asked, owner = here / ASKED, retraining.owner
        asked.write_text(retraining.config.to_yaml(), encoding="utf-8")
    with in_progress(here) as lock, _noted(current):
        run_attempt(settings.data, asked, current.uri, log, lock, owner)
    _keep(current, here)
    _say_what_came_out(current, here, time.monotonic() - start)


def say_if_no_recipe(settings: Settings) -> None:
    """Tell which recipe is taken where none was named."""
    if settings.recipe is None:
        print(
            f"recipe {DEFAULT_RECIPE}, for none was named: a tiny network, minutes on a CPU; "
            f"`{program()} recipe list` shows the others"
        )


@contextmanager
def _noted(current: Run) -> Iterator[None]:
    """Leave in the run's journal why a step failed, unless it has done so itself, as the training's launcher does."""
    before = len(read_journal(current.store, current.uri))
    try:
        yield
    except EsvitError as error:
        with suppress(EsvitError):  # the store may be what failed
            if all(entry.kind != "failed" for entry in read_journal(current.store, current.uri)[before:]):
                note(current.store, current.uri, "failed", part=error.step or "the run", reason=error.reason)
        raise


def _keep(current: Run, here: Path) -> None:
    """Copy out of the store what the user takes away: the report and the backbone."""
    current.store.get_file(current.at("report/report.html"), here / "report.html")
    current.store.fetch(current.at("backbone"), here / "backbone")


def _say_what_came_out(current: Run, here: Path, seconds: float) -> None:
    from rich.console import Console

    from esvit_core.reporting.console import read_results, results_table

    print(flush=True)
    Console().print(results_table(read_results(current.store, current.uri, current.config)))
    print(f"report    {here / 'report.html'}")
    print(f"backbone  {here / 'backbone'}")
    print(f"promoted  {_promotion(current)}")
    print(f"finished in {format_duration(seconds)}\n\nUse it:")
    for line in usage((here / "backbone").absolute()):
        print(f"    {line}")


def usage(backbone: Path) -> list[str]:
    """Three lines of Python that load the published backbone in a folder, and use it."""
    description = json.loads((backbone / "backbone.json").read_text(encoding="utf-8"))
    size, width = description["img_size"], description["num_features"]
    return [
        "import esvit_core, torch",
        f"backbone = esvit_core.load_backbone({str(backbone)!r})",
        f"features = backbone(torch.rand(1, 3, {size}, {size}))  # (1, {width}); real images: backbone.backbone_config",
    ]


def _promotion(current: Run) -> str:
    try:
        decision: dict[str, Any] = current.store.get_json(current.at(PROMOTION))
    except NotFound:
        return "no decision was taken"
    return f"{'yes' if decision['promoted'] else 'no'}, {decision['reason']}"


def _make_folder(out: Path) -> None:
    if not os.environ.get(ENDPOINT) and (problem := path_problem(out)):
        raise UserError(f"--out {out}: {problem}; name another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot be made ({error.strerror}); name a folder that can be written to"
        ) from None
    if not os.access(out, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: cannot be written to; name another folder")


@contextmanager
def _told_of_the_disk(out: Path) -> Iterator[None]:
    """A full or write-protected disk is no bug of this program."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        raise UserError(f"--out {out}: {error.strerror}; make room, or name a folder on another disk") from None
