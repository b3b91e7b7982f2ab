"""The command line: `esvit run`, `plan`, `retrain`, `status`, `logs`, `import`, `export`, `embed`, and groups of others.

What it needs to do its work is imported when the work begins: `esvit --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from esvit_core import __version__
from esvit_core.config import Config
from esvit_core.errors import USER_ERROR_EXIT_CODE, EsvitError, UserError
from esvit_pipelines.cli import cluster_commands, store_commands
from esvit_pipelines.cli.options import BucketOption, JsonOption, RecipeOption, SetOption, TransferOption
from esvit_pipelines.cli.settings import DEFAULT_OUT, DEFAULT_RECIPE, Settings, command, store_in
from esvit_pipelines.local.surroundings import going_on_unread, lead_nowhere, open_closed_streams, require_home

INTERRUPTED_EXIT_CODE = 130
DEFAULT_BUCKET = "esvit"
DEFAULT_PREFIX = f"s3://{DEFAULT_BUCKET}"
# The root of what typer says of a wrong command line; it has no public name.
_UsageError: Any = typer.BadParameter.__bases__[0]

app = typer.Typer(
    name="esvit",
    help="Pre-train a vision backbone on your own images, without labels (EsViT), measure it, and publish it.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
store_app = typer.Typer(help="The object store of this machine, which keeps everything of a run.")
recipe_app = typer.Typer(help="Recipes: complete configurations to start from.")
app.add_typer(store_app, name="store")
app.add_typer(recipe_app, name="recipe")

DataOption = Annotated[
    str, typer.Option("--data", metavar="SOURCE", help="The images: a folder, a tar, a zip, or s3://bucket/prefix.")
]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the store, the reports, the backbones.")]
RunArgument = Annotated[
    str | None, typer.Argument(metavar="RUN", show_default=False, help="Name of a run, or the beginning of it.")
]
RunsBucketOption = Annotated[str, typer.Option("--bucket", help="Bucket in the object store.")]
FollowOption = Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")]
PointerOption = Annotated[str, typer.Option("--pointer", metavar="NAME", help="Which; the recipe's promotion.pointer.")]


ModelHelp = "A published backbone: champion, s3://bucket/prefix, a folder; or a file that `esvit import` takes."
RunsOption = Annotated[
    Path, typer.Option("--runs", metavar="DIR", help="Folder of the runs of this machine, in whose store it is found.")
]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"esvit {__version__}")
        raise typer.Exit


@store_app.callback(invoke_without_command=True)
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
    """Pre-train a vision backbone on your own images, without labels (EsViT), measure it, and publish it."""
    group(context)


@app.command()
def run(
    data: DataOption,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    transfer: TransferOption = None,
    out: Out = DEFAULT_OUT,
    bucket: BucketOption = None,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Time the first steps by part and trace them, into profile/ of the run."),
    ] = False,
) -> None:
    """Do the whole job on this machine: prepare, pre-train, measure, report, promote.

    Labels are optional: one folder a class where there are any. Ctrl-C stops the run, and the same command goes on
    with it. Everything is kept in an object store, in DIR/store, or in the one that ESVIT_S3_ENDPOINT names.
    """
    from esvit_pipelines.local.run import run as run_pipeline

    asked = [*(set_ or ()), *(["launch.profile_steps=10"] if profile else [])]
    settings = Settings(data, recipe, tuple(asked), tuple(transfer or ()), out, bucket)
    with _told(), going_on_unread():
        run_pipeline(settings)


@app.command()
def retrain(
    data: DataOption,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    transfer: TransferOption = None,
    out: Out = DEFAULT_OUT,
    bucket: BucketOption = None,
) -> None:
    """Look for new images, go on from the champion with them, and promote what is better.

    Reads only what is new, and measures the champion on the same held-out images as its challenger. Where too little
    is new it says so and ends. The section retrain of the recipe says when there is reason to, and how the training
    goes on. Ctrl-C stops it, and the same command goes on with it.
    """
    from esvit_pipelines.local.retrain import retrain as retrain_champion

    settings = Settings(data, recipe, tuple(set_ or ()), tuple(transfer or ()), out, bucket)
    with _told(), going_on_unread():
        retrain_champion(settings)


@contextmanager
def _told() -> Iterator[None]:
    """Say how a run was interrupted, and exit."""
    from esvit_pipelines.local.attempt import StoppedError

    try:
        yield
    except (StoppedError, KeyboardInterrupt):
        print(f"interrupted; the same command goes on from here:\n    {command()}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED_EXIT_CODE) from None


@app.command()
def plan(
    recipe: RecipeOption = None,
    set_: SetOption = None,
    gpu: Annotated[
        Literal["h200", "h100", "a100", "cpu"], typer.Option("--gpu", help="What it runs on; cpu: this machine.")
    ] = "h200",
    gpus: Annotated[int, typer.Option("--gpus", min=1, metavar="N", help="How many.")] = 1,
    images: Annotated[
        int, typer.Option("--images", min=1, metavar="N", help="Training images; default: those of ImageNet-1K.")
    ] = 1_281_167,
    price: Annotated[
        float | None, typer.Option("--price", min=0, help="Of a device and hour, in any currency, for the cost.")
    ] = None,
    utilisation: Annotated[
        float, typer.Option("--utilisation", min=0.01, max=1, help="Share of a GPU's peak that a step reaches.")
    ] = 0.1,
    json: JsonOption = False,
) -> None:
    """Say what a training will take before it starts: memory, images a second, days, cost; and whether it fits.

    For a GPU the operations and bytes of a step are counted, and its speed follows from its data sheet and an assumed
    share of its peak. For the processors of this machine a few real steps are taken.
    """
    from esvit_pipelines.cli.plan_command import plan as plan_training

    config = Config.load(recipe or DEFAULT_RECIPE, set_ or ())
    plan_training(config, gpu, gpus, images, price, utilisation, json)


@app.command()
def status(
    run: RunArgument = None,
    out: Out = DEFAULT_OUT,
    bucket: RunsBucketOption = DEFAULT_BUCKET,
    follow: FollowOption = False,
    json: JsonOption = False,
) -> None:
    """Say how a run is doing: progress, curves, last checkpoint, restarts, and why it failed.

    While it is under way, from another terminal, and afterwards. Without RUN: the runs of the store, the newest first.
    """
    from esvit_pipelines.cli import status_commands

    place = status_commands.Place(out, bucket)
    if run is None and not follow:
        status_commands.show_runs(place, json)
    else:
        status_commands.show_status(place, run, follow, json)


@app.command()
def logs(
    run: RunArgument = None,
    out: Out = DEFAULT_OUT,
    bucket: RunsBucketOption = DEFAULT_BUCKET,
    follow: FollowOption = False,
    json: JsonOption = False,
) -> None:
    """Print what happened to a run, in order: its starts, stops and failures, and the figures of its log.

    Without RUN: of the newest.
    """
    from esvit_pipelines.cli import status_commands

    status_commands.show_logs(status_commands.Place(out, bucket), run, follow, json)


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="BACKBONE", help=ModelHelp)],
    format: Annotated[
        str, typer.Option("--format", help="safetensors, timm, onnx, torch-export, or published (of a run).")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="File or folder to make.")],
    regions: Annotated[
        bool, typer.Option("--regions", help="onnx and torch-export: give the regions as a second output.")
    ] = False,
    runs: RunsOption = DEFAULT_OUT,
) -> None:
    """Write a backbone for other tools, and compare what they make of it.

    It is read back by the tool it is for, and its features are compared with the network's on random images. What
    differs by more than the format allows leaves no file behind.
    """
    from esvit_pipelines.cli.backbone_commands import export as export_backbone

    export_backbone(model, format, out, regions, runs)


@app.command()
def embed(
    model: Annotated[str, typer.Option("--model", metavar="BACKBONE", help=ModelHelp)],
    data: DataOption,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The file to make, .parquet or .npz.")],
    regions: Annotated[bool, typer.Option("--regions", help="Write the map of regions too.")] = False,
    dtype: Annotated[Literal["float16", "float32"], typer.Option("--dtype", help="Of the regions.")] = "float16",
    precision: Annotated[
        Literal["float32", "auto", "bfloat16"],
        typer.Option("--precision", help="Of the network; auto: bfloat16 where it is native, faster and coarser."),
    ] = "float32",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images at a time.")] = 64,
    max_bad_fraction: Annotated[
        float, typer.Option("--max-bad-fraction", min=0, max=1, help="Share of unreadable images that is an error.")
    ] = 0.05,
    runs: RunsOption = DEFAULT_OUT,
) -> None:
    """Write the view features of images, and their regions' if wanted.

    They are those of the measured steps. The rows have the columns name, label (where there is one folder a class),
    view and regions. Images that cannot be read are listed in FILE's name with .bad.jsonl.
    """
    from esvit_pipelines.cli.backbone_commands import embed as embed_images

    settings = {"regions": regions, "dtype": dtype, "precision": precision, "batch_size": batch_size}
    embed_images(model, data, out, {**settings, "max_bad_fraction": max_bad_fraction}, runs)


cluster_commands.register(app)


@app.command()
def champions(
    pointer: PointerOption = "champion",
    out: Out = DEFAULT_OUT,
    bucket: RunsBucketOption = DEFAULT_BUCKET,
    json: JsonOption = False,
    register: Annotated[
        bool, typer.Option("--register", help="Register them in the Kubeflow Model Registry instead of listing them.")
    ] = False,
    registry: Annotated[
        str | None,
        typer.Option("--registry", metavar="URL", help="Of its REST API.", envvar="ESVIT_MODEL_REGISTRY_URL"),
    ] = None,
) -> None:
    """List the champions, the present one first: since when, with which figure, and why."""
    from esvit_pipelines.cli import champion_commands
    from esvit_pipelines.cli.status_commands import Place

    if register:
        champion_commands.register(Place(out, bucket), pointer, registry)
    else:
        champion_commands.show_champions(Place(out, bucket), pointer, json)


@app.command()
def rollback(
    pointer: PointerOption = "champion",
    to: Annotated[
        str | None, typer.Option("--to", metavar="RUN", help="A former champion; default: the one before this one.")
    ] = None,
    why: Annotated[str, typer.Option("--why", metavar="TEXT", help="For the history.")] = "",
    out: Out = DEFAULT_OUT,
    bucket: RunsBucketOption = DEFAULT_BUCKET,
) -> None:
    """Go back to a former champion. The one that goes stays in the history, with who took it back, when, and why."""
    from esvit_pipelines.cli.champion_commands import go_back
    from esvit_pipelines.cli.status_commands import Place

    go_back(Place(out, bucket), pointer, to, why)


@app.command("import")
def import_(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A .pth or .safetensors file, here or at s3://, or timm:<name>.")
    ],
    out: Annotated[str, typer.Option("--out", metavar="DIR|S3", help="Folder, or s3://bucket/prefix.")],
    arch: Annotated[
        str | None, typer.Option("--arch", help="Architecture; default: found by the names and shapes of the weights.")
    ] = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    student: Annotated[bool, typer.Option("--student", help="The student's backbone, not the teacher's.")] = False,
    checkpoint: Annotated[
        bool, typer.Option("--checkpoint", help="Also a checkpoint for init.source of a run; into the store only.")
    ] = False,
) -> None:
    """Bring a checkpoint of the published EsViT, or weights of timm, into the format of `esvit_core.load_backbone`.

    Nothing that may be hidden in the file is run. What lies at s3:// is in the store that ESVIT_S3_ENDPOINT names, or
    in the folder ESVIT_STORE_DIR of a run on this machine.
    """
    from esvit_pipelines.cli.import_command import import_file

    import_file(file, out, arch, recipe, tuple(set_ or ()), student, checkpoint)


@store_app.command("start")
def store_start(out: Out = DEFAULT_OUT) -> None:
    """Start the store of DIR, or find the one that runs; it stays until `esvit store stop`."""
    from esvit_core.storage.embedded import EmbeddedStore

    store = EmbeddedStore(store_in(out))
    address = store.start()
    print(f"running at {address.url}, data in {store_in(out)}")


@store_app.command("stop")
def store_stop(out: Out = DEFAULT_OUT) -> None:
    """Stop the store of DIR."""
    from esvit_core.storage.embedded import EmbeddedStore

    print("stopped" if EmbeddedStore(store_in(out)).stop() else f"no store runs in {store_in(out)}")


@store_app.command("status")
def store_status(out: Out = DEFAULT_OUT) -> None:
    """Say whether the store of DIR runs, and where."""
    from esvit_core.storage.embedded import EmbeddedStore

    status = EmbeddedStore(store_in(out)).status()
    if status is None:
        print(f"no store runs in {store_in(out)}")
    else:
        print(f"running at {status.address.url} (process {status.pid}), data in {status.directory}")


@store_app.command("ls")
def store_ls(
    prefix: Annotated[str, typer.Argument(help="s3://bucket or s3://bucket/prefix.")] = DEFAULT_PREFIX,
    out: Out = DEFAULT_OUT,
) -> None:
    """List the objects below a prefix, of the store of DIR or of the one that ESVIT_S3_ENDPOINT names."""
    from esvit_core.storage.session import open_store

    if not os.environ.get("ESVIT_S3_ENDPOINT") and not store_in(out).is_dir():
        raise UserError(f"--out {out}: there is no store; name the folder of a run, or set ESVIT_S3_ENDPOINT")
    with open_store(store_in(out)) as store:
        number = size = 0
        if prefix == DEFAULT_PREFIX:
            store.ensure_bucket(DEFAULT_PREFIX.removeprefix("s3://"))
        for found in store.list(prefix):
            print(f"{found.size:>13,}  {found.uri}")
            number, size = number + 1, size + found.size
        print(f"{size:>13,}  bytes in {number} objects")


store_app.command("bucket")(store_commands.bucket)
store_app.command("keys")(store_commands.keys)
store_app.command("policies")(store_commands.policies)
store_app.command("prune")(store_commands.prune)


@recipe_app.command("list")
def recipe_list() -> None:
    """Name the recipes."""
    from esvit_pipelines.cli import recipe_commands

    print(recipe_commands.recipe_list())


@recipe_app.command("show")
def recipe_show(
    recipe: Annotated[str, typer.Argument(metavar="NAME|FILE", help="Preset or YAML file.")],
    set_: SetOption = None,
) -> None:
    """Print every setting of a recipe with what it means, as YAML that `esvit run --recipe FILE` takes."""
    from esvit_pipelines.cli import recipe_commands

    print(recipe_commands.recipe_text(Config.load(recipe, set_ or ())), end="")


def main() -> None:
    """The console script: an error that can be explained is one line on stderr; docs/exit-codes.md has the codes."""
    open_closed_streams()
    try:
        require_home()
        code = app(standalone_mode=False)
    except EsvitError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except _UsageError as error:
        print(f"error: {' '.join(error.format_message().split()).rstrip('.')}; see `esvit --help`", file=sys.stderr)
        code = USER_ERROR_EXIT_CODE
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED_EXIT_CODE
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        lead_nowhere(sys.stdout)
        code = 1
    sys.exit(code)
