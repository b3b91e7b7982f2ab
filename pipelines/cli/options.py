"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

RecipeOption = Annotated[
    str | None, typer.Option("--recipe", metavar="NAME|FILE|S3", help="Preset or YAML file; see `esvit recipe list`.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, such as training.epochs=50. Repeatable."),
]
TransferOption = Annotated[
    list[str] | None,
    typer.Option(
        "--transfer", metavar="NAME=SOURCE", help="A labelled set to measure on, one folder a class. Repeatable."
    ),
]
BucketOption = Annotated[
    str | None, typer.Option("--bucket", help="Bucket in the object store; default: the recipe's, esvit.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="For programs.")]
