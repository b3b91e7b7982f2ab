"""`esvit schedule`: commands for recurring runs on a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from esvit_core.data.ingest.source_lists import join_sources
from esvit_core.errors import UserError
from esvit_pipelines.cli.cluster_options import (
    DEFAULT_EXPERIMENT,
    AccountOption,
    CaOption,
    DataOption,
    ExperimentOption,
    HostOption,
    InlineOption,
    NamespaceOption,
    NewExperimentOption,
    OneExperimentOption,
    ParameterOption,
    ScheduleArgument,
    SentArgument,
    TokenOption,
    UiOption,
    compatible_package,
    connect,
    prepare_submission,
    registered_version,
    request_of,
    service_account_of,
    warn_about_capacity,
)
from esvit_pipelines.cli.options import BucketOption, JsonOption, RecipeOption, SetOption, TransferOption

schedule_app = typer.Typer(help="Manage recurring runs on a cluster, at fixed times or intervals.")


@schedule_app.callback(invoke_without_command=True)
def group(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@schedule_app.command("create")
def schedule_create(
    name: Annotated[str, typer.Option("--name", help="Name of the schedule.")],
    pipeline: SentArgument = "pretrain",
    cron: Annotated[
        str | None,
        typer.Option(
            "--cron",
            metavar="'S M H DAY MONTH WEEKDAY'",
            help="Six fields, seconds first: '0 0 3 * * 1' is Mondays at 3:00.",
        ),
    ] = None,
    every: Annotated[
        str | None, typer.Option("--every", metavar="TIME", help="Interval instead of --cron, such as 12h or 7d.")
    ] = None,
    paused: Annotated[bool, typer.Option("--paused", help="Create the schedule disabled.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Replace an existing schedule of that name.")] = False,
    data: DataOption = None,
    parameter: ParameterOption = None,
    experiment: ExperimentOption = DEFAULT_EXPERIMENT,
    new_experiment: NewExperimentOption = False,
    service_account: AccountOption = None,
    inline: InlineOption = False,
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
    """Create a schedule that runs a pipeline repeatedly, one run at a time, without catching up on missed times.

    This is what `kfp recurring-run create` does. Times are in the server's time zone, by default UTC.
    """
    from esvit_pipelines.cluster import schedule as work
    from esvit_pipelines.cluster.client import experiment_id

    trigger = _trigger(cron, every)
    request = request_of(pipeline, recipe, set_, transfer, bucket)
    with (
        prepare_submission(pipeline, request, join_sources(data) if data else None, parameter) as (made, values),
        connect(host, namespace, token_file, ca_file, ui) as server,
        compatible_package(server, pipeline, made, request) as package,
    ):
        warn_about_capacity(server, pipeline, request)
        experiment_key = experiment_id(server, experiment, new_experiment or experiment == DEFAULT_EXPERIMENT)
        account = service_account_of(service_account, request.config)
        replaced = work.schedules_to_replace(server, experiment_key, name, replace)
        version = registered_version(server, package, inline)
        schedule = work.create(
            server, package, values, name, experiment_key, trigger, account, paused, version, replaced
        )
        print(f"scheduled {name}, {work.trigger_text(schedule)}{', paused' if paused else ''}")
        print(server.link("recurringrun", schedule.recurring_run_id))


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
    """List the schedules with state, trigger and link."""
    from esvit_pipelines.cluster import schedule as work
    from esvit_pipelines.cluster.client import experiment_id

    with connect(host, namespace, token_file, ca_file, ui) as server:
        experiment_key = experiment_id(server, experiment, create=False) if experiment else None
        work.show(server, work.schedules(server, experiment_key), json)


@schedule_app.command("pause")
def schedule_pause(
    schedule: ScheduleArgument,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
) -> None:
    """Pause a schedule: start no more runs until it is resumed. An active run continues."""
    _apply("disable", "paused", schedule, host, namespace, token_file, ca_file)


@schedule_app.command("resume")
def schedule_resume(
    schedule: ScheduleArgument,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
) -> None:
    """Resume a schedule: start runs again from the next scheduled time on."""
    _apply("enable", "resumed", schedule, host, namespace, token_file, ca_file)


@schedule_app.command("delete")
def schedule_delete(
    schedule: ScheduleArgument,
    now: Annotated[
        bool,
        typer.Option("--now", help="Delete it even if one of its runs is active, which deletes that run's pods too."),
    ] = False,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
) -> None:
    """Delete a schedule unless one of its runs is active, whose pods Kubeflow would delete too. Ended runs are kept."""
    _apply("delete", "deleted", schedule, host, namespace, token_file, ca_file, keep_runs=not now)


def _apply(
    verb: str,
    done: str,
    schedule: str,
    host: str | None,
    namespace: str | None,
    token_file: Path | None,
    ca_file: Path | None,
    keep_runs: bool = False,
) -> None:
    from esvit_pipelines.cluster import schedule as work

    with connect(host, namespace, token_file, ca_file, None) as server:
        existing = work.find(server, schedule)
        if keep_runs:
            work.require_no_active_run(server, existing)
        getattr(server.client, f"{verb}_recurring_run")(existing.recurring_run_id)
        print(f"{done} {existing.display_name}")


def _trigger(cron: str | None, every: str | None) -> dict[str, Any]:
    from esvit_pipelines.cluster import schedule as work

    if (cron is None) == (every is None):
        raise UserError("schedule: expected either --cron '0 0 3 * * 1' (Mondays at 3:00) or --every 7d")
    return {"cron_expression": work.cron(cron)} if cron is not None else {"interval_second": work.interval(every or "")}
