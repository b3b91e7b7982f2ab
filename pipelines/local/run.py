"""`esvit run`: run the pretrain pipeline on this machine and print the results."""

from __future__ import annotations

import errno
import json
import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from esvit_core.config import Config
from esvit_core.data.ingest.source_lists import require_weights, split_sources
from esvit_core.data.ingest.sources import check_source
from esvit_core.errors import EsvitError, UserError
from esvit_core.monitoring.progress_line import format_duration
from esvit_core.planning.feasibility import require_metric
from esvit_core.runs.events import read_events, record_event
from esvit_core.runs.run import CONFIG, PROMOTION, REPORT, Run, identify_run, run_uri
from esvit_core.storage import ObjectStore
from esvit_core.storage.address import ENDPOINT
from esvit_core.storage.marker import mark
from esvit_core.storage.session import open_store
from esvit_core.storage.store_errors import NotFound
from esvit_core.storage.weed import path_problem
from esvit_core.weights.weight_source import pin_source
from esvit_pipelines.local.attempt import in_progress, run_attempt
from esvit_pipelines.settings import DEFAULT_RECIPE, LOG, Settings, command, program, resolve_run, sources, store_in

DEMO_RECIPE = "demo"
REQUESTED = "requested.yaml"  # below DIR/<run> of a retraining or an evaluation: the requested configuration


def run(settings: Settings) -> None:
    """Start or resume the run of these settings on this machine, and print the results.

    Raises:
        UserError: the settings, the data or the environment are invalid; raised before any step starts if possible.
        InfrastructureError: a failure that may not happen again.
        CrashError: a step failed unexpectedly.
        StoppedError: a signal stopped the run; its state is saved.
    """
    resolved = resolve_run(settings)
    config = resolved.config
    require_metric(config)
    with open_run_store(settings, config) as store:
        config = pin_source(config, store)
        name = identify_run(config, settings.data)
        current = Run(run_uri(config.bucket, name), store, config)
        resumed = store.exists(current.at(CONFIG))
        current.record_choice(resolved.explanation)
        print(f"run {name}" + (", resumed: finished steps are reused" if resumed else ""))
        run_pipeline(settings, current)
        if config.recipe == DEMO_RECIPE and settings.transfer:
            print(
                f"\nTo train on your own images:\n    {program()} run --data <folder, tar, zip or s3://bucket/prefix>"
            )


@contextmanager
def open_run_store(settings: Settings, config: Config) -> Iterator[ObjectStore]:
    """Check the sources and the output folder, and open the store.

    Raises:
        UserError: a source, the folder or the store cannot be used.
    """
    local = [s for s in sources(config, settings.data) if not s.startswith("s3://")]
    require_weights(settings.data, config.data)
    for source in local:
        check_source(source)
    _make_folder(settings.out)
    with _explain_disk_errors(settings.out), open_store(store_in(settings.out)) as store:
        store.check()
        store.ensure_bucket(config.bucket)
        for source in sources(config, settings.data):
            if source not in local:
                check_source(source)
        yield store


def run_pipeline(
    settings: Settings,
    current: Run,
    requested: Config | None = None,
    *,
    owner: str | None = None,
    backbone: str | None = None,
) -> None:
    """Run all steps of a run, copy the report and the new backbone out of the store, and print the results.

    Args:
        requested: of a retraining or an evaluation the requested configuration, from which that of the run is derived.
        owner: owner of the retraining's lease; None: the run is not a retraining.
        backbone: address of the existing backbone that the run evaluates; None: it trains one.

    Raises:
        EsvitError, StoppedError: see :func:`run`.
    """
    folder = settings.out / current.name
    folder.mkdir(exist_ok=True)
    mark(folder)
    (folder / CONFIG).write_text(current.config.to_yaml(), encoding="utf-8")
    log = folder / LOG
    start = time.monotonic()
    print(f"log {log}", flush=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {command()}\n")
    config_file = folder / CONFIG
    if requested is not None:
        config_file = folder / REQUESTED
        config_file.write_text(requested.to_yaml(), encoding="utf-8")
    with in_progress(folder) as lock, _record_failure(current):
        finished = current.store.exists(current.at(REPORT))
        run_attempt(settings.data, config_file, current.uri, log, lock, owner, backbone, finished)
    current.store.get_file(current.at(REPORT), folder / "report.html")
    _copy(current, "report/report.md", folder / "report.md")
    _copy(current, "report/report.json", folder / "report.json")
    _print_results(current, folder, backbone is not None)
    if backbone is None:
        current.store.fetch(current.at("backbone"), folder / "backbone")
        _copy(current, "report/model-card.md", folder / "backbone" / "README.md")
        print(f"backbone  {folder / 'backbone'}")
        print(f"promoted  {_promotion(current)}")
    print(f"finished in {format_duration(time.monotonic() - start)}")
    if backbone is None:
        place = (folder / "backbone").absolute()
        print("\nUse it:", *(f"    {line}" for line in usage(place)), sep="\n")
        print("\nFind similar images:", f"    {search_command(place, settings.data)}", sep="\n")


def explain(settings: Settings) -> None:
    """Print what the recipe ``auto`` chooses for these settings, and why; nothing is started.

    Raises:
        UserError: see :func:`run`; or another recipe is named.
    """
    resolved = resolve_run(settings)
    if not resolved.explanation:
        raise UserError(
            f"--explain: it explains the choices of the recipe auto, not those of {settings.recipe}; "
            f"`{program()} recipe show {settings.recipe}` prints every setting of it"
        )
    print(*resolved.explanation, sep="\n")


def print_default_recipe(settings: Settings) -> None:
    """Print the name of the default recipe if the settings name none."""
    if settings.recipe is None:
        print(
            f"recipe {DEFAULT_RECIPE} (the default): a tiny network, minutes on a CPU; "
            f"`{program()} recipe list` shows other recipes"
        )


@contextmanager
def _record_failure(current: Run) -> Iterator[None]:
    """Record the failure of a step in the event log, unless the step has recorded it, as the training launcher does."""
    before = len(read_events(current.store, current.uri))
    try:
        yield
    except EsvitError as error:
        with suppress(EsvitError):  # the store may be what failed
            if all(entry.kind != "failed" for entry in read_events(current.store, current.uri)[before:]):
                record_event(
                    current.store, current.uri, "failed", component=error.step or "the run", reason=error.reason
                )
        raise


def _print_results(current: Run, folder: Path, existing: bool) -> None:
    from rich.console import Console

    from esvit_core.reporting.result_rows import read_results
    from esvit_core.reporting.result_table import results_table
    from esvit_core.reporting.verdict import judge_results, plain_text

    print(flush=True)
    results = read_results(current.store, current.uri, current.config)
    Console().print(results_table(results))
    if verdict := judge_results(results, current.config, existing):
        for number, line in enumerate([verdict.sentence, *verdict.details]):
            print(f"{'' if number else 'verdict':<10}{plain_text(line)}")
    print(f"report    {folder / 'report.html'}")


def _copy(current: Run, name: str, path: Path) -> None:
    """Copy an object of the run to a file; a run that an older version reported lacks some."""
    with suppress(NotFound):
        current.store.get_file(current.at(name), path)


def usage(backbone: Path) -> list[str]:
    """Return lines of Python that load the published backbone in a folder and use it."""
    description = json.loads((backbone / "backbone.json").read_text(encoding="utf-8"))
    size, width = description["img_size"], description["num_features"]
    return [
        "import esvit_core, torch",
        f"backbone = esvit_core.load_backbone({str(backbone)!r})",
        f"features = backbone(torch.rand(1, 3, {size}, {size}))  # (1, {width}); real images: backbone.backbone_config",
    ]


def search_command(backbone: Path, data: str) -> str:
    """Return the command that finds similar images with the published backbone in a folder."""
    sources = " ".join(f"--data {shlex.quote(source)}" for source in split_sources(data))
    return f"{program()} search --model {shlex.quote(str(backbone))} {sources} --query IMAGE"


def _promotion(current: Run) -> str:
    try:
        decision: dict[str, Any] = current.store.get_json(current.at(PROMOTION))
    except NotFound:
        return "no decision was made"
    return f"{'yes' if decision['promoted'] else 'no'}, {decision['reason']}"


def _make_folder(out: Path) -> None:
    if not os.environ.get(ENDPOINT) and (problem := path_problem(out)):
        raise UserError(f"--out {out}: {problem}; name another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be created ({error.strerror}); name a writable folder") from None
    if not os.access(out, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: it is not writable; name another folder")


@contextmanager
def _explain_disk_errors(out: Path) -> Iterator[None]:
    """Turn the error of a full or write-protected disk into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        raise UserError(f"--out {out}: {error.strerror}; free some space, or name a folder on another disk") from None
