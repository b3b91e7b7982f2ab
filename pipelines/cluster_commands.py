"""The commands that are about a cluster: `esvit compile`, `submit`, `runs`, `schedule`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from esvit_core.config import Config
from esvit_core.errors import UserError
from esvit_pipelines.options import BucketOption, JsonOption, RecipeOption, SetOption, TransferOption
from esvit_pipelines.settings import DEFAULT_OUT, Settings, resolve

if TYPE_CHECKING:
    from esvit_pipelines.kubeflow import Connection
    from esvit_pipelines.submit import Package

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
    typer.Option("--data", metavar="S3", help="The pictures, s3://bucket/prefix: the pipeline's parameter `data`."),
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

schedule_app = typer.Typer(help="Runs that start by themselves on a cluster, at times or at intervals.")


def register(app: typer.Typer) -> None:
    """Add the commands to the program's."""
    app.command("compile")(compile_)
    app.command("submit")(submit)
    app.command("runs")(runs)
    app.add_typer(schedule_app, name="schedule")


def compile_(
    pipeline: PipelineArgument = "pretrain",
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Where to write; default: esvit-<pipeline>.yaml."),
    ] = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    transfer: TransferOption = None,
    bucket: BucketOption = None,
) -> None:
    """Write a pipeline as YAML for Kubeflow Pipelines.

    The steps run in the image cluster.image, take the object store's address and keys from Kubernetes secrets, one for
    each kind of step unless cluster.secret names one for all, and get the resources, nodes and volumes that the section
    cluster says. What is in the recipe is the default of the pipeline's parameter `configuration`.
    """
    from esvit_pipelines.compile import compile_pipeline

    config = _config(recipe, set_, transfer, bucket)
    output = output or Path(f"esvit-{pipeline}.yaml")
    steps = compile_pipeline(pipeline, config, output)
    print(f"{output}: {len(steps)} steps")
    for number, name in enumerate(steps, 1):
        print(f"  {number:2} {name}")
    _tell_what_is_only_here(config)


def submit(
    pipeline: SentArgument = "pretrain",
    data: DataOption = None,
    parameter: ParameterOption = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Of the run; default: the pipeline's and the time.")
    ] = None,
    experiment: ExperimentOption = DEFAULT_EXPERIMENT,
    new_experiment: NewExperimentOption = False,
    service_account: AccountOption = None,
    caching: Annotated[
        bool | None, typer.Option("--caching/--no-caching", help="Of all steps; default: as compiled.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Until it has ended; exit code 1 if it failed.")] = False,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    transfer: TransferOption = None,
    bucket: BucketOption = None,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    ui: UiOption = None,
) -> None:
    """Run a pipeline on a cluster, once. It is compiled first, as `esvit compile` does.

    Does what `kfp run create` does. A session's cookie, where a login page stands before the server, is taken from
    ESVIT_KFP_COOKIE.
    """
    from esvit_pipelines import submit as work
    from esvit_pipelines.kubeflow import experiment_id

    config = _config(recipe, set_, transfer, bucket)
    with (
        _sent(pipeline, config, data, parameter) as (package, values),
        _server(host, namespace, token_file, ca_file, ui) as server,
    ):
        folder = experiment_id(server, experiment, new_experiment or experiment == DEFAULT_EXPERIMENT)
        account = _account(service_account, config)
        run = work.submit(server, package, values, name, folder, account, caching)
        print(f"submitted {run.display_name}\n{server.link('runs', run.run_id)}", flush=True)
        if wait and work.wait(server, run.run_id).state not in work.GOOD:
            raise typer.Exit(1)


def runs(
    experiment: OneExperimentOption = None,
    number: Annotated[int, typer.Option("--number", min=1, help="The newest so many.")] = 20,
    json: JsonOption = False,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    ui: UiOption = None,
) -> None:
    """List the runs of a cluster: state, duration, link. (`esvit status` shows the curves of one.)"""
    from esvit_pipelines import submit as work
    from esvit_pipelines.kubeflow import experiment_id

    with _server(host, namespace, token_file, ca_file, ui) as server:
        folder = experiment_id(server, experiment, create=False) if experiment else None
        work.show_runs(server, work.runs(server, folder, number), json)


@schedule_app.callback(invoke_without_command=True)
def group(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@schedule_app.command("create")
def schedule_create(
    name: Annotated[str, typer.Option("--name", help="Of the schedule.")],
    pipeline: SentArgument = "pretrain",
    cron: Annotated[
        str | None,
        typer.Option("--cron", metavar="'S M H DAY MONTH WEEKDAY'", help="Six fields: '0 0 3 * * 1' is Mondays at 3."),
    ] = None,
    every: Annotated[str | None, typer.Option("--every", metavar="TIME", help="Instead: 12h, 7d.")] = None,
    paused: Annotated[bool, typer.Option("--paused", help="Make it, but do not start it.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="In place of the one of that name.")] = False,
    data: DataOption = None,
    parameter: ParameterOption = None,
    experiment: ExperimentOption = DEFAULT_EXPERIMENT,
    new_experiment: NewExperimentOption = False,
    service_account: AccountOption = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    transfer: TransferOption = None,
    bucket: BucketOption = None,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    ui: UiOption = None,
) -> None:
    """Run a pipeline again and again: one run at a time, and none for times that were missed.

    Does what `kfp recurring-run create` does. Times are those of the server, UTC unless it says otherwise.
    """
    from esvit_pipelines import schedule as work
    from esvit_pipelines.kubeflow import experiment_id

    trigger = _trigger(cron, every)
    config = _config(recipe, set_, transfer, bucket)
    with (
        _sent(pipeline, config, data, parameter) as (package, values),
        _server(host, namespace, token_file, ca_file, ui) as server,
    ):
        folder = experiment_id(server, experiment, new_experiment or experiment == DEFAULT_EXPERIMENT)
        account = _account(service_account, config)
        made = work.create(server, package, values, name, folder, trigger, account, paused, replace)
        print(f"scheduled {name}, {work.when(made)}{', paused' if paused else ''}")
        print(server.link("recurringrun", made.recurring_run_id))


@schedule_app.command("list")
def schedule_list(
    experiment: OneExperimentOption = None,
    json: JsonOption = False,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    ui: UiOption = None,
) -> None:
    """List the schedules: state, times, link."""
    from esvit_pipelines import schedule as work
    from esvit_pipelines.kubeflow import experiment_id

    with _server(host, namespace, token_file, ca_file, ui) as server:
        folder = experiment_id(server, experiment, create=False) if experiment else None
        work.show(server, work.schedules(server, folder), json)


@schedule_app.command("pause")
def schedule_pause(
    schedule: ScheduleArgument,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
) -> None:
    """Start no more runs until it is resumed; one that is under way goes on."""
    _turn("disable", "paused", schedule, host, namespace, token_file, ca_file)


@schedule_app.command("resume")
def schedule_resume(
    schedule: ScheduleArgument,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
) -> None:
    """Start runs again, from the next time on."""
    _turn("enable", "resumed", schedule, host, namespace, token_file, ca_file)


@schedule_app.command("delete")
def schedule_delete(
    schedule: ScheduleArgument,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
) -> None:
    """Take a schedule away; its runs stay."""
    _turn("delete", "deleted", schedule, host, namespace, token_file, ca_file)


def _turn(
    verb: str,
    done: str,
    schedule: str,
    host: str | None,
    namespace: str | None,
    token_file: Path | None,
    ca_file: Path | None,
) -> None:
    from esvit_pipelines import schedule as work

    with _server(host, namespace, token_file, ca_file, None) as server:
        found = work.find(server, schedule)
        getattr(server.client, f"{verb}_recurring_run")(found.recurring_run_id)
        print(f"{done} {found.display_name}")


@contextmanager
def _server(
    host: str | None, namespace: str | None, token_file: Path | None, ca_file: Path | None, ui: str | None
) -> Iterator[Connection]:
    import os

    from esvit_pipelines.kubeflow import Server, connected

    with connected(Server(host, namespace, token_file, ca_file, os.environ.get("ESVIT_KFP_COOKIE"), ui)) as server:
        yield server


@contextmanager
def _sent(
    pipeline: str, config: Config, data: str | None, parameter: list[str] | None
) -> Iterator[tuple[Package, dict[str, Any]]]:
    """The pipeline and its arguments, looked at before a server is asked."""
    from esvit_pipelines.submit import arguments, package

    given = [*([] if data is None else [f"data={data}"]), *(parameter or [])]
    with package(pipeline, config) as ready:
        yield ready, arguments(ready, given)
    _tell_what_is_only_here(config, data)


def _config(recipe: str | None, set_: list[str] | None, transfer: list[str] | None, bucket: str | None) -> Config:
    return resolve(Settings("", recipe, tuple(set_ or ()), tuple(transfer or ()), DEFAULT_OUT, bucket))


def _account(given: str | None, config: Config) -> str | None:
    return (config.cluster.service_account if given is None else given) or None


def _trigger(cron: str | None, every: str | None) -> dict[str, Any]:
    from esvit_pipelines import schedule as work

    if (cron is None) == (every is None):
        raise UserError("schedule: expected either --cron '0 0 3 * * 1' (Mondays at 3:00) or --every 7d")
    return {"cron_expression": work.cron(cron)} if cron is not None else {"interval_second": work.interval(every or "")}


def _tell_what_is_only_here(config: Config, data: str | None = None) -> None:
    """Name the sources that a cluster will look for where it cannot find them."""
    places = [(f"transfer set {s.name}", s.source) for s in config.evaluation.transfer]
    places += [] if data is None else [("the pictures", data)]
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
