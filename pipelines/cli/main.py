"""The command line: `esvit run`, `plan`, `retrain`, `status`, `logs`, `import`, `export`, `embed`, `search`, and command groups.

Each command imports what it needs when it is called, so that `esvit --help` is fast.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from esvit_core import __version__
from esvit_core.config import Config, DataConfig
from esvit_core.data.ingest.source_lists import join_sources
from esvit_core.errors import USER_ERROR_EXIT_CODE, EsvitError
from esvit_pipelines.cli import cluster_commands, local_commands
from esvit_pipelines.cli.data_commands import data_app
from esvit_pipelines.cli.local_commands import INTERRUPTED_EXIT_CODE
from esvit_pipelines.cli.options import (
    DataOption,
    FollowOption,
    JsonOption,
    ModelHelp,
    OutOption,
    PointerOption,
    RecipeOption,
    RunArgument,
    RunsBucketOption,
    RunsOption,
    SetOption,
)
from esvit_pipelines.cli.store_commands import store_app
from esvit_pipelines.local.process_setup import (
    ensure_home,
    open_closed_streams,
    redirect_to_null,
)
from esvit_pipelines.settings import DEFAULT_BUCKET, DEFAULT_OUT, DEFAULT_RECIPE

# The base class of typer's errors about a wrong command line; it has no public name.
_UsageError: Any = typer.BadParameter.__bases__[0]

app = typer.Typer(
    name="esvit",
    help="Pre-train a vision backbone on your own images without labels (EsViT), evaluate it, and publish it.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
recipe_app = typer.Typer(help="List and print recipes, the complete configurations to start from.")
app.add_typer(store_app, name="store")
app.add_typer(data_app, name="data")
app.add_typer(recipe_app, name="recipe")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"esvit {__version__}")
        raise typer.Exit


@recipe_app.callback(invoke_without_command=True)
def group(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Pre-train a vision backbone on your own images without labels (EsViT), evaluate it, and publish it."""
    group(context)


local_commands.register(app)


@app.command()
def plan(
    recipe: RecipeOption = None,
    set_: SetOption = None,
    gpu: Annotated[
        Literal["h200", "h100", "a100", "cpu"], typer.Option("--gpu", help="GPU model, or cpu for this machine.")
    ] = "h200",
    gpus: Annotated[int, typer.Option("--gpus", min=1, metavar="N", help="Number of GPUs.")] = 1,
    images: Annotated[
        int, typer.Option("--images", min=1, metavar="N", help="Number of training images; default: ImageNet-1K.")
    ] = 1_281_167,
    price: Annotated[float | None, typer.Option("--price", min=0, help="Price per GPU-hour, in any currency.")] = None,
    images_per_second: Annotated[
        float | None,
        typer.Option(
            "--images-per-second",
            min=0.001,
            metavar="RATE",
            help="Measured speed of all GPUs together, for time and cost.",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Estimate what a training takes before it starts: FLOPs, memory and checkpoints; with a speed also time and cost.

    For a GPU, the operations and bytes of a step are counted; time and cost need a measured --images-per-second. For the
    CPUs of this machine, a few real steps are measured.
    """
    from esvit_pipelines.cli.plan_command import plan as plan_training

    config = Config.load(recipe or DEFAULT_RECIPE, set_ or ())
    plan_training(config, gpu, gpus, images, price, images_per_second, json)


@app.command()
def status(
    run: RunArgument = None,
    out: OutOption = DEFAULT_OUT,
    bucket: RunsBucketOption = DEFAULT_BUCKET,
    follow: FollowOption = False,
    json: JsonOption = False,
) -> None:
    """Show the state of a run: progress, figures, last checkpoint, restarts, and why it failed.

    This works from another terminal while the run is active, and afterwards. Without RUN, list all runs of the store,
    newest first.
    """
    from esvit_pipelines.cli import status_commands

    location = status_commands.RunLocation(out, bucket)
    if run is None and not follow:
        status_commands.show_runs(location, json)
    else:
        status_commands.show_status(location, run, follow, json)


@app.command()
def logs(
    run: RunArgument = None,
    out: OutOption = DEFAULT_OUT,
    bucket: RunsBucketOption = DEFAULT_BUCKET,
    follow: FollowOption = False,
    json: JsonOption = False,
) -> None:
    """Print the events of a run in order: starts, stops, failures, and the metrics of its training log.

    Without RUN, print those of the newest run.
    """
    from esvit_pipelines.cli import status_commands

    status_commands.show_logs(status_commands.RunLocation(out, bucket), run, follow, json)


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="BACKBONE", help=ModelHelp)],
    format: Annotated[
        str,
        typer.Option(
            "--format", help="safetensors, timm, onnx, torch-export, or published (the published code's checkpoint)."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="File or folder to write.")],
    regions: Annotated[
        bool, typer.Option("--regions", help="Add the region features as a second output (onnx, torch-export).")
    ] = False,
    runs: RunsOption = DEFAULT_OUT,
) -> None:
    """Export a backbone to a format of another tool, and verify the result.

    The export is loaded with that tool, and its features are compared with the backbone's on random images. If they
    differ by more than the format's tolerance, the command fails and leaves no file behind.
    """
    from esvit_pipelines.cli.backbone_commands import export as export_backbone

    export_backbone(model, format, out, regions, runs)


@app.command()
def embed(
    model: Annotated[str, typer.Option("--model", metavar="BACKBONE", help=ModelHelp)],
    data: DataOption,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="File to write, .parquet or .npz.")],
    regions: Annotated[bool, typer.Option("--regions", help="Write the region features too.")] = False,
    dtype: Annotated[
        Literal["float16", "float32"], typer.Option("--dtype", help="Type of the region features.")
    ] = "float16",
    precision: Annotated[
        Literal["float32", "auto", "bfloat16"],
        typer.Option(
            "--precision", help="Arithmetic of the network. auto: bfloat16 where it is native (faster, less exact)."
        ),
    ] = "float32",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images per batch.")] = 64,
    max_bad_fraction: Annotated[
        float,
        typer.Option("--max-bad-fraction", min=0, max=1, help="Fail if a larger share of the images is unreadable."),
    ] = DataConfig().max_bad_fraction,
    max_megapixels: Annotated[
        float, typer.Option("--max-megapixels", min=0.001, help="Skip larger images (decompression bombs).")
    ] = DataConfig().max_megapixels,
    max_aspect_ratio: Annotated[
        float, typer.Option("--max-aspect-ratio", min=1, help="Skip images whose sides differ by a larger factor.")
    ] = DataConfig().max_aspect_ratio,
    runs: RunsOption = DEFAULT_OUT,
) -> None:
    """Write the view features of images, and optionally their region features.

    They are computed as in the evaluation steps. The columns are name, label (if there is one folder per class), view,
    and regions. Unreadable images are listed next to FILE, in a file with the suffix .bad.jsonl.
    """
    from esvit_pipelines.cli.backbone_commands import embed as embed_images

    settings = {"regions": regions, "dtype": dtype, "precision": precision, "batch_size": batch_size}
    limits = {
        "max_bad_fraction": max_bad_fraction,
        "max_megapixels": max_megapixels,
        "max_aspect_ratio": max_aspect_ratio,
    }
    embed_images(model, join_sources(data), out, settings | limits, runs)


@app.command()
def search(
    model: Annotated[str, typer.Option("--model", metavar="BACKBONE", help=ModelHelp)],
    data: DataOption,
    query: Annotated[
        list[str],
        typer.Option("--query", metavar="FILE", help="An image file, or the name of an image of --data. Repeatable."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Contact sheet to write.")] = Path("nearest.png"),
    count: Annotated[int, typer.Option("--count", min=1, max=50, metavar="N", help="Number of images per query.")] = 8,
    runs: RunsOption = DEFAULT_OUT,
) -> None:
    """Find the images that are most similar to a given one; print them, and draw a contact sheet.

    Similarity is the cosine of the view features. The features of all images of --data are computed each time.
    """
    from esvit_pipelines.cli.backbone_commands import search as search_images

    search_images(model, join_sources(data), query, out, count, runs)


cluster_commands.register(app)


@app.command()
def champions(
    pointer: PointerOption = "champion",
    out: OutOption = DEFAULT_OUT,
    bucket: RunsBucketOption = DEFAULT_BUCKET,
    json: JsonOption = False,
    register: Annotated[
        bool,
        typer.Option(
            "--register", help="Register the champions in the Kubeflow Model Registry instead of listing them."
        ),
    ] = False,
    registry: Annotated[
        str | None,
        typer.Option("--registry", metavar="URL", help="Address of its REST API.", envvar="ESVIT_MODEL_REGISTRY_URL"),
    ] = None,
) -> None:
    """List the champions, newest first: when each was promoted, its metric, and the reason."""
    from esvit_pipelines.cli import champion_commands
    from esvit_pipelines.cli.status_commands import RunLocation

    if register:
        champion_commands.register(RunLocation(out, bucket), pointer, registry)
    else:
        champion_commands.show_champions(RunLocation(out, bucket), pointer, json)


@app.command()
def rollback(
    pointer: PointerOption = "champion",
    to: Annotated[
        str | None, typer.Option("--to", metavar="RUN", help="A former champion; default: the previous one.")
    ] = None,
    why: Annotated[str, typer.Option("--why", metavar="TEXT", help="Reason, recorded in the history.")] = "",
    out: OutOption = DEFAULT_OUT,
    bucket: RunsBucketOption = DEFAULT_BUCKET,
) -> None:
    """Make a former champion the current one again. The history records who rolled back, when, and why."""
    from esvit_pipelines.cli.champion_commands import roll_back_champion
    from esvit_pipelines.cli.status_commands import RunLocation

    roll_back_champion(RunLocation(out, bucket), pointer, to, why)


@app.command("import")
def import_(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A local or s3:// .pth or .safetensors file, or timm:<name>.")
    ],
    out: Annotated[str, typer.Option("--out", metavar="DIR|S3", help="Destination: a folder, or s3://bucket/prefix.")],
    arch: Annotated[
        str | None,
        typer.Option("--arch", help="Architecture; default: inferred from the names and shapes of the weights."),
    ] = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    student: Annotated[
        bool, typer.Option("--student", help="Import the student's backbone instead of the teacher's.")
    ] = False,
    checkpoint: Annotated[
        bool,
        typer.Option(
            "--checkpoint", help="Also write a checkpoint for init.source of a run (s3:// destinations only)."
        ),
    ] = False,
) -> None:
    """Convert a checkpoint of the published EsViT, or timm weights, for `esvit_core.load_backbone`.

    No code in the file is executed. An s3:// address refers to the store that ESVIT_S3_ENDPOINT names, or to the
    embedded store in the folder ESVIT_STORE_DIR.
    """
    from esvit_pipelines.cli.import_command import import_file

    import_file(file, out, arch, recipe, tuple(set_ or ()), student, checkpoint)


@recipe_app.command("list")
def recipe_list() -> None:
    """List the recipes."""
    from esvit_pipelines.cli import recipe_commands

    print(recipe_commands.recipe_list())


@recipe_app.command("show")
def recipe_show(
    recipe: Annotated[str, typer.Argument(metavar="NAME|FILE", help="Name of a recipe, or a YAML file.")],
    set_: SetOption = None,
) -> None:
    """Print every setting of a recipe and its meaning, as YAML for `esvit run --recipe FILE`."""
    from esvit_pipelines.cli import recipe_commands

    print(recipe_commands.recipe_text(Config.load(recipe, set_ or ())), end="")


def main() -> None:
    """Run the console script: an expected error is one line on stderr; docs/exit-codes.md lists the exit codes."""
    open_closed_streams()
    try:
        ensure_home()
        code = app(standalone_mode=False)
    except EsvitError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except _UsageError as error:
        message = " ".join(error.format_message().split()).rstrip(".")
        print(f"error: {message}; see `{_command_of(error)} --help`", file=sys.stderr)
        code = USER_ERROR_EXIT_CODE
    except (KeyboardInterrupt, typer.Abort) as error:
        if isinstance(error.__cause__, EOFError):  # which click takes for Ctrl-D at a prompt; there is none here
            raise error.__cause__ from None
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED_EXIT_CODE
    except BrokenPipeError:  # the reader of our output, such as `head`, has exited
        redirect_to_null(sys.stdout)
        code = 1
    sys.exit(code)


def _command_of(error: Any) -> str:
    """Return the command whose arguments are wrong, such as ``esvit run``."""
    words, context = [], error.ctx
    while context is not None and context.parent is not None:
        words.append(context.info_name or "")
        context = context.parent
    return " ".join(["esvit", *reversed(words)])
