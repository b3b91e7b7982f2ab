"""What the command line asks for, and how it was called."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from esvit_core.config import Config
from esvit_core.errors import UserError

DEFAULT_RECIPE = "demo"
DEFAULT_OUT = Path("esvit-runs")
LOG = "run.log"  # below DIR/<run>


@dataclass(frozen=True)
class Settings:
    """What the command line says.

    Args:
        data: folder, archive or s3:// prefix.
        recipe: preset or file; None: none was named.
        overrides: ``key=value`` each.
        transfer: ``NAME=SOURCE`` each.
        out: folder for everything that the run leaves on this machine.
        bucket: None: the configuration's.
    """

    data: str
    recipe: str | None
    overrides: Sequence[str]
    transfer: Sequence[str]
    out: Path
    bucket: str | None


def resolve(settings: Settings) -> Config:
    """The configuration that the settings ask for.

    Raises:
        UserError: a recipe, a key, a value, or a transfer set is wrong.
    """
    config = Config.load(settings.recipe or DEFAULT_RECIPE, settings.overrides)
    if not settings.transfer and settings.bucket is None:
        return config
    values = config.model_dump(mode="json")
    if settings.bucket is not None:
        values["bucket"] = settings.bucket
    sets = {s["name"]: s for s in values["evaluation"]["transfer"]}
    for item in settings.transfer:
        name, equals, source = item.partition("=")
        if not (equals and name and source):
            raise UserError(f"--transfer {item}: expected NAME=SOURCE, such as --transfer digits=digits.zip")
        sets[name] = {**sets.get(name, {}), "name": name, "source": source}
    values["evaluation"]["transfer"] = list(sets.values())
    return Config.from_mapping(values, origin="--transfer" if settings.transfer else "--bucket")


def sources(config: Config, data: str) -> list[str]:
    """Every place that pictures come from."""
    return [data, *(s.source for s in config.evaluation.transfer)]


def program() -> str:
    """How this program is called in the shell that called it."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{shlex.quote(sys.executable)} -m esvit_pipelines"
    found = shutil.which("esvit")
    return "esvit" if found and called.exists() and Path(found).samefile(called) else shlex.quote(str(called))


def command() -> str:
    """The command line as it was given, to be pasted."""
    return f"{program()} {shlex.join(sys.argv[1:])}"


def store_in(out: Path) -> Path:
    """Where the embedded store of ``out`` keeps its data."""
    return out / "store"
