"""Options and preparations that the cluster commands share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from esvit_core.config import Config
from esvit_core.data.ingest.source_lists import split_sources
from esvit_core.planning.feasibility import require_metric
from esvit_pipelines.settings import DEFAULT_OUT, ClusterRequest, Settings, cluster_request, resolve

if TYPE_CHECKING:
    from esvit_pipelines.cluster.client import Connection
    from esvit_pipelines.cluster.package import Package
    from esvit_pipelines.cluster.registration import Registered

STANDALONE_NAMESPACE = "kubeflow"  # of all runs, where Kubeflow Pipelines is installed without the rest of Kubeflow
DEFAULT_EXPERIMENT = "esvit"

PipelineArgument = Annotated[
    str, typer.Argument(metavar="[PIPELINE]", show_default=False, help="pretrain (the default), evaluate, or retrain.")
]
SentArgument = Annotated[
    str,
    typer.Argument(
        metavar="[PIPELINE|FILE]",
        show_default=False,
        help="pretrain (the default), evaluate, or retrain; or a compiled pipeline, a .yaml file.",
    ),
]
DataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data", metavar="S3", help="Images at s3://bucket/prefix; sets the pipeline's parameter data. Repeatable."
    ),
]
ParameterOption = Annotated[
    list[str] | None,
    typer.Option("-p", "--parameter", metavar="NAME=VALUE", help="Set another parameter of the pipeline. Repeatable."),
]
ExperimentOption = Annotated[
    str,
    typer.Option(
        "--experiment",
        envvar="KF_PIPELINES_DEFAULT_EXPERIMENT_NAME",
        help="KFP experiment; the default, esvit, is created if it does not exist.",
    ),
]
OneExperimentOption = Annotated[
    str | None, typer.Option("--experiment", metavar="NAME", help="Only this experiment; default: all.")
]
NewExperimentOption = Annotated[
    bool, typer.Option("--new-experiment", help="Create the experiment if it does not exist.")
]
AccountOption = Annotated[
    str | None,
    typer.Option(
        "--service-account",
        help="Service account of the steps; default: cluster.service_account. '': the server's default.",
    ),
]
InlineOption = Annotated[
    bool, typer.Option("--inline", help="Send the compiled pipeline instead of registering a version of it.")
]
ScheduleArgument = Annotated[
    str, typer.Argument(metavar="SCHEDULE", show_default=False, help="Name or id of a schedule.")
]

HostOption = Annotated[
    str | None,
    typer.Option(
        "--host",
        envvar="KF_PIPELINES_ENDPOINT",
        metavar="URL",
        help="Address of the Kubeflow Pipelines API; default: inside a cluster, that cluster's.",
    ),
]
NamespaceOption = Annotated[
    str | None,
    typer.Option(
        "--namespace", "-n", envvar="ESVIT_KFP_NAMESPACE", help="Your namespace, if the server has one per user."
    ),
]
TokenOption = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        envvar="KF_PIPELINES_SA_TOKEN_PATH",
        metavar="FILE",
        help="File with the token; default: inside a cluster, the service account's.",
    ),
]
CaOption = Annotated[
    Path | None,
    typer.Option("--ca-file", envvar="ESVIT_KFP_CA_FILE", metavar="FILE", help="CA certificate of the server."),
]
UiOption = Annotated[
    str | None,
    typer.Option(
        "--ui", envvar="KF_PIPELINES_UI_ENDPOINT", metavar="URL", help="Base address of links; default: that of --host."
    ),
]


@contextmanager
def connect(
    host: str | None, namespace: str | None, token_file: Path | None, ca_file: Path | None, ui: str | None
) -> Iterator[Connection]:
    import os

    from esvit_pipelines.cluster.client import Server, connected

    with connected(Server(host, namespace, token_file, ca_file, os.environ.get("ESVIT_KFP_COOKIE"), ui)) as server:
        yield server


def registered_version(server: Connection, pipeline: Package, inline: bool) -> Registered | None:
    """Register the pipeline's version for a run to refer to.

    Returns:
        None: the pipeline is sent with the run, as those of other projects always are.
    """
    from esvit_pipelines.cluster.registration import register

    if inline or not pipeline.own:
        return None
    version = register(server, pipeline)
    print(f"pipeline {version.pipeline}, version {version.version}{' (new)' if version.new else ''}", flush=True)
    return version


@contextmanager
def prepare_submission(
    pipeline: str, request: ClusterRequest, data: str | None, parameter: list[str] | None
) -> Iterator[tuple[Package, dict[str, Any]]]:
    """Compile the pipeline and check its arguments, before any request to a server.

    The recipe and the transfer sets become parameters of the run; only the pods' settings are compiled in. So runs with
    other recipes and transfer sets refer to the same version, as long as their pods have the same sizes.
    """
    from esvit_pipelines.cluster.package import arguments, package

    if pipeline in ("pretrain", "retrain") and request.complete:
        require_metric(request.config)
    compiled = pipeline.endswith((".yaml", ".yml"))
    with package(pipeline, request.config if compiled else request.compile_config, request.form) as made:
        parameters = request.parameters if request.explicit or not compiled else {}
        items = [f"{name}={text}" for name, text in parameters.items() if name in made.parameters]
        items += [*([] if data is None else [f"data={data}"]), *(parameter or [])]
        values = arguments(made, items)
        warn_about_local_sources(request.config, data)
        yield made, values


@contextmanager
def compatible_package(server: Connection, pipeline: str, made: Package, request: ClusterRequest) -> Iterator[Package]:
    """Return the package, or compile another one if the server's retries do not restart lost pods.

    Args:
        pipeline: its name, or the file that it was read from.
        made: the package, compiled from the request or read from the file.
    """
    from esvit_pipelines.cluster.package import package

    retries = request.config.cluster.retry_lost_pods
    if server.restarts_lost_pods or not retries or pipeline.endswith((".yaml", ".yml")):
        yield made
        return
    print(
        f"note: Kubeflow Pipelines {server.release} retries failed steps but not lost pods; the pipeline is compiled "
        "without retries (cluster.retry_lost_pods=false), use `esvit submit --wait --resubmit N` instead"
    )
    config = request.compile_config
    cluster = config.cluster.model_copy(update={"retry_lost_pods": False})
    with package(pipeline, config.model_copy(update={"cluster": cluster}), request.form) as other:
        yield other


def config_of(recipe: str | None, set_: list[str] | None, transfer: list[str] | None, bucket: str | None) -> Config:
    return resolve(Settings("", recipe, tuple(set_ or ()), tuple(transfer or ()), DEFAULT_OUT, bucket))


def request_of(
    pipeline: str, recipe: str | None, set_: list[str] | None, transfer: list[str] | None, bucket: str | None
) -> ClusterRequest:
    settings = Settings("", recipe, tuple(set_ or ()), tuple(transfer or ()), DEFAULT_OUT, bucket)
    return cluster_request(settings, pipeline)


def warn_about_capacity(server: Connection, pipeline: str, request: ClusterRequest) -> None:
    """Warn about pods that do not fit into the cluster, if the Kubernetes API can be reached."""
    from esvit_pipelines.cluster.capacity import capacity_problems

    if not pipeline.endswith((".yaml", ".yml")):
        for line in capacity_problems(request.compile_config, server.namespace or STANDALONE_NAMESPACE):
            print(f"warning: {line}; the pod will stay pending or be rejected", flush=True)


def service_account_of(given: str | None, config: Config) -> str | None:
    return (config.cluster.service_account if given is None else given) or None


def warn_about_local_sources(config: Config, data: str | None = None) -> None:
    """Warn about sources on this machine, which a cluster cannot read."""
    sources = [(f"transfer set {s.name}", s.source) for s in config.evaluation.transfer]
    sources += [] if data is None else [("the images", part) for part in split_sources(data)]
    for name, source in sources:
        if not source.startswith("s3://"):
            print(
                f"note: the steps on the cluster read {name} from the local path {source}; "
                "if it is not mounted in the pods, give an s3://bucket/prefix"
            )
    if config.init.source and Path(config.init.source).exists():
        print(
            f"note: the steps on the cluster read init.source from the local path {config.init.source}; "
            "upload the file to the store and give its s3:// address"
        )
