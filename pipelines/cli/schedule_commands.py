"""`esvit schedule`: the commands about runs that a cluster starts by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

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
    account_of,
    asked_of,
    note_misfits,
    sent,
    server_at,
    suited,
    version_of,
)
from esvit_pipelines.cli.options import BucketOption, JsonOption, RecipeOption, SetOption, TransferOption

schedule_app = typer.Typer(help="Runs that start by themselves on a cluster, at times or at intervals.")


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
    """Run a pipeline again and again: one run at a time, and none for times that were missed.

    Does what `kfp recurring-run create` does. Times are those of the server, UTC unless it says otherwise.
    """
    from esvit_pipelines.cluster import schedule as work
    from esvit_pipelines.cluster.client import experiment_id

    trigger = _trigger(cron, every)
    asked = asked_of(recipe, set_, transfer, bucket)
    with (
        sent(pipeline, asked, data, parameter) as (ready, values),
        server_at(host, namespace, token_file, ca_file, ui) as server,
        suited(server, pipeline, ready, asked) as package,
    ):
        note_misfits(server, pipeline, asked)
        folder = experiment_id(server, experiment, new_experiment or experiment == DEFAULT_EXPERIMENT)
        account = account_of(service_account, asked.config)
        there = work.of_name(server, folder, name, replace)
        version = version_of(server, package, inline)
        made = work.create(server, package, values, name, folder, trigger, account, paused, version, there)
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
    from esvit_pipelines.cluster import schedule as work
    from esvit_pipelines.cluster.client import experiment_id

    with server_at(host, namespace, token_file, ca_file, ui) as server:
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
    now: Annotated[bool, typer.Option("--now", help="Also while a run of it is under way: it is deleted too.")] = False,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
) -> None:
    """Delete a schedule, unless a run of it is under way: Kubeflow would delete its pods too. Ended runs stay."""
    _turn("delete", "deleted", schedule, host, namespace, token_file, ca_file, spare_runs=not now)


def _turn(
    verb: str,
    done: str,
    schedule: str,
    host: str | None,
    namespace: str | None,
    token_file: Path | None,
    ca_file: Path | None,
    spare_runs: bool = False,
) -> None:
    from esvit_pipelines.cluster import schedule as work

    with server_at(host, namespace, token_file, ca_file, None) as server:
        found = work.find(server, schedule)
        if spare_runs:
            work.without_runs(server, found)
        getattr(server.client, f"{verb}_recurring_run")(found.recurring_run_id)
        print(f"{done} {found.display_name}")


def _trigger(cron: str | None, every: str | None) -> dict[str, Any]:
    from esvit_pipelines.cluster import schedule as work

    if (cron is None) == (every is None):
        raise UserError("schedule: expected either --cron '0 0 3 * * 1' (Mondays at 3:00) or --every 7d")
    return {"cron_expression": work.cron(cron)} if cron is not None else {"interval_second": work.interval(every or "")}
