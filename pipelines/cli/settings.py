"""What the command line asks for, and how it was called."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from esvit_core.config import Config
from esvit_core.config.kubernetes_names import AUTO
from esvit_core.config.parameters import PLACE, Parameters, join_items, parameters_of, with_transfer
from esvit_core.errors import UserError

DEFAULT_RECIPE = "demo"
DEFAULT_OUT = Path("esvit-runs")
LOG = "run.log"  # below DIR/<run>


@dataclass(frozen=True)
class Settings:
    """What the command line says.

    Args:
        data: folder, archive or s3:// prefix.
        recipe: preset, file or s3:// address; None: none was named.
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
    read = None
    if settings.recipe is not None and settings.recipe.startswith("s3://"):
        from esvit_core.storage import ObjectStore

        read = ObjectStore.from_env().get_bytes
    config = Config.load(settings.recipe or DEFAULT_RECIPE, _changes(settings), read)
    return with_transfer(config, settings.transfer, "--transfer") if settings.transfer else config


@dataclass(frozen=True)
class Asked:
    """What the command line asks of a pipeline on a cluster.

    Args:
        config: as far as it is known here.
        whole: all of it is known here.
        parameters: of the pipeline, by name; its first step makes the configuration of them.
        given: the command line says something about them; otherwise they are the defaults.
    """

    config: Config
    parameters: dict[str, str]
    given: bool
    whole: bool = True

    @cached_property
    def pipeline(self) -> Config:
        """What the pipeline is compiled with: where it computes, and nothing of what, except the sizes of its pods.

        Raises:
            UserError: these cannot follow from the recipe.
        """
        from esvit_core.planning.pod_sizes import with_sizes

        if not self.whole and self.config.cluster.train.memory == AUTO:
            raise UserError(
                f"recipe {self.parameters['recipe']}: it is read in the cluster, so that the size of the training's pods "
                "cannot follow from it; say it, such as --set cluster.train.memory=16Gi"
            )
        sizes = with_sizes(self.config)
        place = {section: getattr(sizes, section) for section in PLACE}
        return Config.load(DEFAULT_RECIPE).model_copy(update=place)


def ask(settings: Settings) -> Asked:
    """The same for a pipeline on a cluster, whose first step resolves the configuration.

    A recipe at an ``s3://`` address is read there, not here. The section ``cluster`` is the compiled pipeline's own.

    Raises:
        UserError: see :func:`resolve`.
    """
    given = bool(settings.recipe or settings.overrides or settings.transfer or settings.bucket)
    if settings.recipe is None or not settings.recipe.startswith("s3://"):
        config = resolve(settings)
        return Asked(config, asdict(parameters_of(config, ("cluster",))), given)
    changes = _changes(settings)
    sections = {item: item.partition(".")[0].strip() for item in changes}
    said = [item for item in changes if sections[item] != "cluster"]
    told = Parameters(settings.recipe, join_items(said), join_items(settings.transfer))
    known = Config.load("{}", [item for item in changes if sections[item] in PLACE])
    return Asked(known, asdict(told), given, whole=False)


def _changes(settings: Settings) -> list[str]:
    return [*settings.overrides, *([] if settings.bucket is None else [f"bucket={settings.bucket}"])]


def sources(config: Config, data: str) -> list[str]:
    """Every place that images come from."""
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
