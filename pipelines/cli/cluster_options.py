"""Options and first steps that the commands about a cluster share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from esvit_core.config import Config
from esvit_core.planning.feasibility import require_metric
from esvit_pipelines.cli.settings import DEFAULT_OUT, Asked, Settings, ask, resolve

if TYPE_CHECKING:
    from esvit_pipelines.cluster.client import Connection
    from esvit_pipelines.cluster.registration import Registered
    from esvit_pipelines.cluster.submit import Package

STANDALONE_NAMESPACE = "kubeflow"  # where Kubeflow Pipelines by itself runs the pods of all runs
DEFAULT_EXPERIMENT = "esvit"

PipelineArgument = Annotated[
    str, typer.Argument(metavar="[PIPELINE]", show_default=False, help="pretrain (the default), evaluate, or retrain.")
]
SentArgument = Annotated[
    str,
    typer.Argument(
        metavar="[PIPELINE|FILE]",
        show_default=False,
        help="pretrain (the default), evaluate, or retrain; or a .yaml that was compiled before.",
    ),
]
DataOption = Annotated[
    str | None,
    typer.Option("--data", metavar="S3", help="The images, s3://bucket/prefix: the pipeline's parameter `data`."),
]
ParameterOption = Annotated[
    list[str] | None,
    typer.Option("-p", "--parameter", metavar="NAME=VALUE", help="Another of its parameters. Repeatable."),
]
ExperimentOption = Annotated[
    str,
    typer.Option(
        "--experiment",
        envvar="KF_PIPELINES_DEFAULT_EXPERIMENT_NAME",
        help="KFP's folder of runs; `esvit` is made if it is not there.",
    ),
]
OneExperimentOption = Annotated[
    str | None, typer.Option("--experiment", metavar="NAME", help="Only of this one; default: all.")
]
NewExperimentOption = Annotated[bool, typer.Option("--new-experiment", help="Make the experiment if it is not there.")]
AccountOption = Annotated[
    str | None,
    typer.Option("--service-account", help="Of the steps; default: cluster.service_account. '': the server's."),
]
InlineOption = Annotated[
    bool, typer.Option("--inline", help="Send the pipeline along; default: refer to its version on the Pipelines page.")
]
ScheduleArgument = Annotated[str, typer.Argument(metavar="SCHEDULE", show_default=False, help="Its name or its id.")]

HostOption = Annotated[
    str | None,
    typer.Option(
        "--host",
        envvar="KF_PIPELINES_ENDPOINT",
        metavar="URL",
        help="Kubeflow Pipelines' API; default: in a cluster, the one there.",
    ),
]
NamespaceOption = Annotated[
    str | None,
    typer.Option(
        "--namespace", "-n", envvar="ESVIT_KFP_NAMESPACE", help="Yours, where the server has one for each user."
    ),
]
TokenOption = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        envvar="KF_PIPELINES_SA_TOKEN_PATH",
        metavar="FILE",
        help="Holds the token; default: in a cluster, the service account's.",
    ),
]
CaOption = Annotated[
    Path | None,
    typer.Option("--ca-file", envvar="ESVIT_KFP_CA_FILE", metavar="FILE", help="The authority of its certificate."),
]
UiOption = Annotated[
    str | None,
    typer.Option("--ui", envvar="KF_PIPELINES_UI_ENDPOINT", metavar="URL", help="What links begin with; default: URL."),
]


@contextmanager
def server_at(
    host: str | None, namespace: str | None, token_file: Path | None, ca_file: Path | None, ui: str | None
) -> Iterator[Connection]:
    import os

    from esvit_pipelines.cluster.client import Server, connected

    with connected(Server(host, namespace, token_file, ca_file, os.environ.get("ESVIT_KFP_COOKIE"), ui)) as server:
        yield server


def version_of(server: Connection, pipeline: Package, inline: bool) -> Registered | None:
    """The version on the server that a run refers to; None: the pipeline is sent along, as a foreign one always is."""
    from esvit_pipelines.cluster.registration import register

    if inline or not pipeline.own:
        return None
    found = register(server, pipeline)
    print(f"pipeline {found.pipeline}, version {found.version}{' (new)' if found.new else ''}", flush=True)
    return found


@contextmanager
def sent(
    pipeline: str, asked: Asked, data: str | None, parameter: list[str] | None
) -> Iterator[tuple[Package, dict[str, Any]]]:
    """The pipeline and its arguments, looked at before a server is asked.

    What the options say about the run goes into its parameters, and only where it computes into the pipeline: runs with
    other recipes and transfer sets refer to the same version, as long as their pods have the same sizes.
    """
    from esvit_pipelines.cluster.submit import arguments, package

    if pipeline in ("pretrain", "retrain") and asked.whole:
        require_metric(asked.config)
    compiled = pipeline.endswith((".yaml", ".yml"))
    with package(pipeline, asked.config if compiled else asked.pipeline) as ready:
        said = asked.parameters if asked.given or not compiled else {}
        given = [f"{name}={text}" for name, text in said.items() if name in ready.parameters]
        given += [*([] if data is None else [f"data={data}"]), *(parameter or [])]
        values = arguments(ready, given)
        note_local_places(asked.config, data)
        yield ready, values


@contextmanager
def suited(server: Connection, pipeline: str, ready: Package, asked: Asked) -> Iterator[Package]:
    """The package that was made, or for a server that needs it another one.

    Args:
        pipeline: its name, or the file that it was read from.
        ready: compiled from what is asked, or read.
    """
    from esvit_pipelines.cluster.submit import package

    if server.restarts_lost_pods or not asked.config.cluster.retry_lost_pods or pipeline.endswith((".yaml", ".yml")):
        yield ready
        return
    print(
        f"note: the retries of Kubeflow Pipelines {server.release} repeat mistakes and not lost pods: the pipeline is "
        "compiled without them (cluster.retry_lost_pods=false); `esvit submit --wait --resubmit N` stands in for them"
    )
    config = asked.pipeline
    cluster = config.cluster.model_copy(update={"retry_lost_pods": False})
    with package(pipeline, config.model_copy(update={"cluster": cluster})) as made:
        yield made


def config_of(recipe: str | None, set_: list[str] | None, transfer: list[str] | None, bucket: str | None) -> Config:
    return resolve(Settings("", recipe, tuple(set_ or ()), tuple(transfer or ()), DEFAULT_OUT, bucket))


def asked_of(recipe: str | None, set_: list[str] | None, transfer: list[str] | None, bucket: str | None) -> Asked:
    return ask(Settings("", recipe, tuple(set_ or ()), tuple(transfer or ()), DEFAULT_OUT, bucket))


def note_misfits(server: Connection, pipeline: str, asked: Asked) -> None:
    """Warn of pods that do not fit into the cluster, where that can be asked."""
    from esvit_pipelines.cluster.capacity import misfits

    if not pipeline.endswith((".yaml", ".yml")):
        for line in misfits(asked.pipeline, server.namespace or STANDALONE_NAMESPACE):
            print(f"warning: {line}; it will wait, or be refused", flush=True)


def account_of(given: str | None, config: Config) -> str | None:
    return (config.cluster.service_account if given is None else given) or None


def note_local_places(config: Config, data: str | None = None) -> None:
    """Name the sources that a cluster will look for where it cannot find them."""
    places = [(f"transfer set {s.name}", s.source) for s in config.evaluation.transfer]
    places += [] if data is None else [("the images", data)]
    for what, place in places:
        if not place.startswith("s3://"):
            print(
                f"note: the steps on the cluster look for {what} at {place}; "
                "an s3://bucket/prefix is found from everywhere"
            )
    if config.init.source and Path(config.init.source).exists():
        print(
            f"note: the steps on the cluster look for init.source at {config.init.source}; "
            "put the file into the store and give its s3:// address"
        )
