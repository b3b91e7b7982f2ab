"""The commands that run a pipeline on this machine, `esvit run`, `retrain` and `evaluate`; and `esvit compare`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from esvit_core.data.ingest.source_lists import join_sources
from esvit_pipelines.cli.options import (
    BucketOption,
    DataOption,
    JsonOption,
    OutOption,
    RecipeOption,
    RunsBucketOption,
    SetOption,
    TransferOption,
)
from esvit_pipelines.local.process_setup import survive_closed_stdout
from esvit_pipelines.settings import DEFAULT_BUCKET, DEFAULT_OUT, Settings, command

INTERRUPTED_EXIT_CODE = 130


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command()(run)
    app.command()(retrain)
    app.command()(evaluate)
    app.command()(compare)


def run(
    data: DataOption,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    transfer: TransferOption = None,
    out: OutOption = DEFAULT_OUT,
    bucket: BucketOption = None,
    hours: Annotated[
        float | None,
        typer.Option(
            "--hours",
            metavar="H",
            min=0.05,
            help="Time for the run, for recipe auto; default: 1 on a CPU, 8 on a GPU.",
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            "--init",
            metavar="SOURCE",
            help="Start from weights: timm:<name>[:<file>], champion, a run, or a .pth or .safetensors file. "
            "Same as --set init.source=SOURCE.",
        ),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print what recipe auto chooses and why, and exit.")
    ] = False,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Profile the first training steps; the traces go to profile/ of the run."),
    ] = False,
) -> None:
    """Run the whole pipeline on this machine: prepare, pre-train, evaluate, report, promote.

    The default recipe is auto: it chooses network, crops, epochs, batch and the rest from the images, this machine and
    --hours, and says why. Labels are optional; labelled images lie in one folder per class. Ctrl-C stops the run; rerun
    the command to resume. All data are stored in an object store: the one that ESVIT_S3_ENDPOINT names, or else an embedded one in DIR/store.
    """
    from esvit_pipelines.local.run import explain as explain_recipe
    from esvit_pipelines.local.run import run as run_locally

    overrides = [
        *([] if init is None else [f"init.source={json.dumps(init)}"]),
        *(set_ or ()),
        *(["launch.profile_steps=10"] if profile else []),
    ]
    settings = Settings(join_sources(data), recipe, tuple(overrides), tuple(transfer or ()), out, bucket, hours)
    if explain:
        explain_recipe(settings)
        return
    with _report_interruption(), survive_closed_stdout():
        run_locally(settings)


def retrain(
    data: DataOption,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    transfer: TransferOption = None,
    out: OutOption = DEFAULT_OUT,
    bucket: BucketOption = None,
) -> None:
    """Look for new images, continue training the champion on them, and promote the result if it is better.

    Only new images are read. Champion and challenger are evaluated on the same held-out images. The command ends at
    once if there are too few new images; the recipe's section retrain sets that minimum and how training continues.
    Ctrl-C stops the run; rerun the command to resume.
    """
    from esvit_pipelines.local.retrain import retrain as retrain_champion

    settings = Settings(join_sources(data), recipe, tuple(set_ or ()), tuple(transfer or ()), out, bucket)
    with _report_interruption(), survive_closed_stdout():
        retrain_champion(settings)


def evaluate(
    model: Annotated[
        list[str],
        typer.Option(
            "--model",
            metavar="MODEL",
            help="A pointer (champion), a run, a published backbone, a .pth or .safetensors file, timm:<name>, or "
            "timm:<name>:<file>; or features as .parquet, .npz or .npy. Repeatable.",
        ),
    ],
    data: DataOption,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            "--baseline",
            metavar="MODEL",
            help="Backbone to compare each model with; default: the first model. Repeatable.",
        ),
    ] = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    transfer: TransferOption = None,
    out: OutOption = DEFAULT_OUT,
    bucket: BucketOption = None,
) -> None:
    """Evaluate existing backbones on labelled images, compare them, and write a report.

    The steps are those of `esvit run` without training and promotion. Each backbone determines architecture, image size
    and normalization, and is compared with the same network with random weights; recipe and overrides set the protocols
    and the share of held-out images. A file of features, as `esvit embed` writes, takes the place of a backbone. Several backbones are compared on the same held-out images. Ctrl-C stops the
    evaluation; rerun the command to resume.
    """
    from esvit_pipelines.local.evaluate import evaluate as evaluate_backbone

    settings = Settings(join_sources(data), recipe, tuple(set_ or ()), tuple(transfer or ()), out, bucket)
    with _report_interruption(), survive_closed_stdout():
        evaluate_backbone(settings, model, baseline or ())


def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Names of finished runs, or prefixes of them.")],
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            "--baseline", metavar="RUN", help="Run to compare the others with; default: the first. Repeatable."
        ),
    ] = None,
    out: OutOption = DEFAULT_OUT,
    bucket: RunsBucketOption = DEFAULT_BUCKET,
    json: JsonOption = False,
) -> None:
    """Compare the figures of finished runs, with the interval and the test of each difference.

    Two runs are compared image by image if they measured the same held-out images with the same settings; otherwise the
    command prints why a difference was not tested. It writes comparison.html, .md and .json to a folder in DIR.
    """
    from esvit_pipelines.cli.compare_command import compare as compare_runs
    from esvit_pipelines.cli.status_commands import RunLocation

    compare_runs(RunLocation(out, bucket), runs, baseline or (), json)


@contextmanager
def _report_interruption() -> Iterator[None]:
    """Print how to resume an interrupted run, and exit."""
    from esvit_pipelines.local.attempt import StoppedError

    try:
        yield
    except (StoppedError, KeyboardInterrupt):
        print(f"interrupted; rerun the command to resume:\n    {command()}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED_EXIT_CODE) from None
