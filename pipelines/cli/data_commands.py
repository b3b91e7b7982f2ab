"""`esvit data`: how a source of images would be read."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from esvit_core.config import Config
from esvit_core.data.ingest.source_lists import join_sources
from esvit_pipelines.cli.options import DataOption, JsonOption, RecipeOption, SetOption
from esvit_pipelines.settings import DEFAULT_OUT, DEFAULT_RECIPE, Settings, resolve_run

data_app = typer.Typer(help="Inspect images before a run.")


@data_app.callback(invoke_without_command=True)
def group(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@data_app.command()
def inspect(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A folder, tar, zip, or s3://bucket/prefix.")],
    recipe: RecipeOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Say how a source would be read: splits, classes, ignored and bad files, and what looks odd.

    Only the listing and a sample of the images are read, which takes seconds. --set data.labels=... and
    --set data.splits=... show how other settings would read it. With --json the last line is the summary as JSON.
    """
    from esvit_core.data.ingest.inspect_source import inspect_source

    found = inspect_source(source, Config.load(recipe or DEFAULT_RECIPE, set_ or ()).data)
    print(source, *(f"  {line}" for line in found.lines), sep="\n")
    if json:
        print(json_module.dumps(found.summary(), ensure_ascii=False))


@data_app.command()
def augment(
    data: DataOption,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Image to write, such as sheet.png.")],
    recipe: RecipeOption = None,
    set_: SetOption = None,
    images: Annotated[int, typer.Option("--images", min=1, max=100, metavar="N", help="Number of images.")] = 8,
) -> None:
    """Draw a contact sheet of the augmentation: images, each beside its crops as the training would see them.

    The recipe is that of `esvit run`: auto, one for a kind of images such as grey, or any other; --set changes a setting.
    """
    from esvit_core.data.image_sheet import augmentation_sheet, save_sheet

    source = join_sources(data)
    settings = Settings(source, recipe, tuple(set_ or ()), (), DEFAULT_OUT, None)
    save_sheet(augmentation_sheet(source, resolve_run(settings).config, images), out)
    print(out)
