"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeOption = Annotated[
    str | None,
    typer.Option("--recipe", metavar="NAME|FILE|S3", help="Name of a recipe, or a YAML file; see `esvit recipe list`."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, such as training.epochs=50. Repeatable."),
]
TransferOption = Annotated[
    list[str] | None,
    typer.Option(
        "--transfer", metavar="NAME=SOURCE", help="Labelled set to evaluate on, one folder per class. Repeatable."
    ),
]
BucketOption = Annotated[
    str | None, typer.Option("--bucket", help="Bucket in the object store; default: the recipe's, esvit.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DataOption = Annotated[
    list[str],
    typer.Option(
        "--data", metavar="SOURCE", help="The images: a folder, tar, zip, table, or s3://bucket/prefix. Repeatable."
    ),
]
OutOption = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="Folder for the embedded store, the reports and the backbones.")
]
RunArgument = Annotated[
    str | None, typer.Argument(metavar="RUN", show_default=False, help="Name of a run, or a prefix of it.")
]
RunsBucketOption = Annotated[str, typer.Option("--bucket", help="Bucket in the object store.")]
FollowOption = Annotated[bool, typer.Option("--follow", "-f", help="Continue until the run ends.")]
PointerOption = Annotated[
    str, typer.Option("--pointer", metavar="NAME", help="Name of the pointer: promotion.pointer of the recipe.")
]
ModelHelp = "A published backbone (champion, s3://bucket/prefix, or a folder), or a file that `esvit import` accepts."
RunsOption = Annotated[
    Path,
    typer.Option("--runs", metavar="DIR", help="Folder of the runs on this machine, whose store holds the backbone."),
]
