"""The settings that the command line gives, and the command line itself."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from esvit_core.config import Config
from esvit_core.config.auto import AUTO as AUTO_RECIPE
from esvit_core.config.auto import split_recipe
from esvit_core.config.kubernetes_names import AUTO
from esvit_core.config.parameters import COMPILED_SECTIONS, Parameters, join_items, to_parameters, with_transfer
from esvit_core.data.ingest.source_lists import split_sources
from esvit_core.errors import UserError

DEFAULT_RECIPE = "demo"  # of all commands but those that pre-train
INIT = "init.source"
DEFAULT_OUT = Path("esvit-runs")
DEFAULT_BUCKET = "esvit"
LOG = "run.log"  # below DIR/<run>


@dataclass(frozen=True)
class Settings:
    """The options of a command that runs a pipeline.

    Args:
        data: folder, archive or s3:// prefix.
        recipe: preset, file or s3:// address; None: the default recipe.
        overrides: items ``key=value``.
        transfer: items ``NAME=SOURCE``.
        out: folder for everything that the run writes on this machine.
        bucket: bucket of the runs; None: the one in the configuration.
        hours: time for the run, with the recipe ``auto``; None: the default of the device.
    """

    data: str
    recipe: str | None
    overrides: Sequence[str]
    transfer: Sequence[str]
    out: Path
    bucket: str | None
    hours: float | None = None


@dataclass(frozen=True)
class Resolved:
    """A configuration.

    Attributes:
        config: the configuration.
        explanation: what the recipe ``auto`` chose and why, in lines; empty with another recipe.
    """

    config: Config
    explanation: list[str]


def resolve_run(settings: Settings) -> Resolved:
    """Resolve the settings of a training on this machine, whose default recipe is ``auto``.

    A recipe for a kind of images, such as ``grey``, changes some settings of what ``auto`` chooses.

    Raises:
        UserError: see :func:`resolve`; or the data cannot be read, or are too few; or ``hours`` has no effect.
    """
    auto = split_recipe(settings.recipe or AUTO_RECIPE)
    if auto is None:
        if settings.hours is not None:
            raise UserError(
                f"--hours {settings.hours:g}: no effect with --recipe {settings.recipe}, whose length is "
                "training.epochs; leave out one of them"
            )
        return Resolved(resolve(settings), [])
    from esvit_core.planning.auto_recipe import resolve_auto
    from esvit_core.planning.start_network import needs_store

    if settings.transfer:  # a wrong item is an error before the source is listed
        with_transfer(Config(), settings.transfer, "--transfer")
    with ExitStack() as stack:
        store = None
        if (source := _init_source(settings)) is not None and needs_store(source):
            from esvit_core.storage.session import open_store

            store = stack.enter_context(open_store(store_in(settings.out)))
        domain, hours = auto
        hours = settings.hours or hours
        found = resolve_auto(settings.data, _changes(settings), hours, domain=domain, init_store=store)
    config = with_transfer(found.config, settings.transfer, "--transfer") if settings.transfer else found.config
    return Resolved(config, found.lines())


def resolve(settings: Settings) -> Config:
    """Resolve the settings to a configuration.

    Raises:
        UserError: a recipe, a key, a value, or a transfer set is invalid.
    """
    read = None
    if settings.recipe is not None and settings.recipe.startswith("s3://"):
        from esvit_core.storage import ObjectStore

        read = ObjectStore.from_env().get_bytes
    config = Config.load(settings.recipe or DEFAULT_RECIPE, _changes(settings), read)
    return with_transfer(config, settings.transfer, "--transfer") if settings.transfer else config


@dataclass(frozen=True)
class ClusterRequest:
    """The configuration and the parameters of a run on a cluster.

    Args:
        config: the configuration, as far as it is known on this machine.
        parameters: parameters of the pipeline by name; its first step resolves the configuration from them.
        explicit: the command line sets at least one of the parameters; otherwise all are defaults.
        complete: ``config`` is complete; False: the recipe is read on the cluster.
        pipeline: name of the pipeline.
    """

    config: Config
    parameters: dict[str, str]
    explicit: bool
    complete: bool = True
    pipeline: str = "pretrain"

    @property
    def form(self) -> Parameters | None:
        """Defaults of the pipeline's parameters in the form of Kubeflow's UI; None: those of :attr:`compile_config`."""
        return Parameters(AUTO_RECIPE) if self.pipeline == "pretrain" else None

    @cached_property
    def compile_config(self) -> Config:
        """The configuration that the pipeline is compiled with: the default recipe with this request's pods and launch.

        Raises:
            UserError: the recipe is needed to size the pods, and it is not known on this machine.
        """
        from esvit_core.planning.pod_sizes import with_pod_sizes

        if not self.complete and self.config.cluster.train.memory == AUTO:
            raise UserError(
                f"recipe {self.parameters['recipe']}: it is read on the cluster, so the size of the training pods cannot be "
                "derived from it here; set it, such as --set cluster.train.memory=16Gi"
            )
        sizes = with_pod_sizes(self.config)
        overrides = {section: getattr(sizes, section) for section in COMPILED_SECTIONS}
        return Config.load(DEFAULT_RECIPE).model_copy(update=overrides)


def cluster_request(settings: Settings, pipeline: str = "pretrain") -> ClusterRequest:
    """Resolve the settings for a pipeline on a cluster, whose first step resolves the configuration.

    A recipe at an ``s3://`` address is read on the cluster, and ``auto`` chooses there; pods are then sized for the largest
    network that it may choose; it is the default recipe of the pipeline pretrain. The section ``cluster`` belongs to the
    compiled pipeline.

    Args:
        settings: the options of the command.
        pipeline: name of the pipeline.

    Raises:
        UserError: see :func:`resolve`.
    """
    explicit = bool(settings.recipe or settings.overrides or settings.transfer or settings.bucket)
    recipe = settings.recipe or (AUTO_RECIPE if pipeline == "pretrain" else DEFAULT_RECIPE)
    auto = split_recipe(recipe)
    if not recipe.startswith("s3://") and auto is None:
        config = resolve(settings)
        return ClusterRequest(config, asdict(to_parameters(config, ("cluster",))), explicit, pipeline=pipeline)
    changes = _changes(settings)
    sections = {item: item.partition(".")[0].strip() for item in changes}
    run_changes = [item for item in changes if sections[item] != "cluster"]
    parameters = Parameters(recipe, join_items(run_changes), join_items(settings.transfer))
    known = Config.load("{}", [item for item in changes if sections[item] in COMPILED_SECTIONS])
    if auto is not None:
        from esvit_core.planning.auto_pods import sizing_config

        return ClusterRequest(sizing_config(known, auto[1]), asdict(parameters), explicit, pipeline=pipeline)
    return ClusterRequest(known, asdict(parameters), explicit, complete=False, pipeline=pipeline)


def _init_source(settings: Settings) -> str | None:
    """Return the source of initial weights that the overrides name; the last one counts."""
    named = [item.partition("=")[2].strip() for item in settings.overrides if item.partition("=")[0].strip() == INIT]
    return named[-1] if named else None


def _changes(settings: Settings) -> list[str]:
    return [*settings.overrides, *([] if settings.bucket is None else [f"bucket={settings.bucket}"])]


def sources(config: Config, data: str) -> list[str]:
    """List all sources of images: the data and the transfer sets.

    Sets of the paper in the layout in which they are distributed are left out: some have no image files.
    """
    return [*split_sources(data), *(s.source for s in config.evaluation.transfer if s.layout is None)]


def program() -> str:
    """Return the command that started this program, for use in a shell."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{shlex.quote(sys.executable)} -m esvit_pipelines"
    executable = shutil.which("esvit")
    return "esvit" if executable and called.exists() and Path(executable).samefile(called) else shlex.quote(str(called))


def command() -> str:
    """Return the command line, quoted for use in a shell."""
    return f"{program()} {shlex.join(sys.argv[1:])}"


def store_in(out: Path) -> Path:
    """Return the folder in which the embedded store of ``out`` keeps its data."""
    return out / "store"
