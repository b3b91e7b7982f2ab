"""`esvit runs`: commands for the runs of a cluster."""

from __future__ import annotations

import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from esvit_core.errors import UserError
from esvit_pipelines.cli.cluster_options import (
    CaOption,
    HostOption,
    NamespaceOption,
    OneExperimentOption,
    TokenOption,
    UiOption,
    connect,
)
from esvit_pipelines.cli.options import JsonOption

if TYPE_CHECKING:
    from esvit_pipelines.cluster.client import Connection
    from esvit_pipelines.cluster.follow import Outcome

INTERRUPTED_EXIT_CODE = 130
_LOG_SECONDS = 5.0

runs_app = typer.Typer(help="List, show, follow, terminate and retry the runs of a cluster.")

RunArgument = Annotated[
    str,
    typer.Argument(metavar="RUN", show_default=False, help="Id of a run, a prefix of the id, its name, or its link."),
]
WaitOption = Annotated[bool, typer.Option("--wait", help="Follow the run until it ends; exit code 1 if it failed.")]


@runs_app.callback(invoke_without_command=True)
def runs(
    context: typer.Context,
    experiment: OneExperimentOption = None,
    number: Annotated[int, typer.Option("--number", min=1, metavar="N", help="Show the N most recent runs.")] = 20,
    json: JsonOption = False,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    ui: UiOption = None,
) -> None:
    """List the runs of a cluster with state, duration and link, or act on one of them with a command.

    `esvit status` and `esvit logs` show the figures and the log of a run from the object store.
    """
    from esvit_pipelines.cluster import runs as work
    from esvit_pipelines.cluster.client import experiment_id

    if context.invoked_subcommand is not None:
        given = [name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"]  # type: ignore[union-attr]
        if given:
            option = "--" + given[0].replace("_", "-")
            raise UserError(f"{option}: put it after the command: esvit runs {context.invoked_subcommand} ... {option}")
        return
    with connect(host, namespace, token_file, ca_file, ui) as server:
        experiment_key = experiment_id(server, experiment, create=False) if experiment else None
        work.show_runs(server, work.runs(server, experiment_key, number), json)


@runs_app.command("show")
def show(
    run: RunArgument,
    wait: WaitOption = False,
    json: JsonOption = False,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    ui: UiOption = None,
) -> None:
    """Show a run: state, duration and metrics of its steps, why a step is waiting, and how the run ended."""
    from esvit_pipelines.cluster.runs import ENDED, find_run
    from esvit_pipelines.cluster.show_run import show_run

    if wait and json:
        raise UserError("--wait --json: give only one of them; --json prints the current state of the run")
    with connect(host, namespace, token_file, ca_file, ui) as server:
        current_run = find_run(server, run)
        if not wait or current_run.state in ENDED:
            outcome = show_run(server, current_run, json)
        else:
            print(current_run.display_name, flush=True)
            outcome = followed(server, current_run.run_id)
        if wait and not outcome.succeeded:
            raise typer.Exit(1)


@runs_app.command("logs")
def logs(
    run: RunArgument,
    step: Annotated[
        str | None,
        typer.Argument(
            metavar="[STEP]", show_default=False, help="Default: the failed step, else a running one, else the last."
        ),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Continue until the step ends.")] = False,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    ui: UiOption = None,
) -> None:
    """Print the log of a step of a run, from its newest pod."""
    from esvit_pipelines.cluster.follow import RetryOnOutage
    from esvit_pipelines.cluster.run_steps import UNFINISHED, workflow_of
    from esvit_pipelines.cluster.runs import find_run, get_run
    from esvit_pipelines.cluster.show_run import choose_step
    from esvit_pipelines.cluster.step_log import read_log

    with connect(host, namespace, token_file, ca_file, ui) as server:
        current_run = find_run(server, run)
        retrying = RetryOnOutage(server, current_run.run_id, sys.stderr)
        printed = 0
        while True:
            workflow = retrying.call(partial(workflow_of, server, current_run))
            chosen = choose_step(current_run, workflow, step)
            log = retrying.call(partial(read_log, server, current_run.run_id, workflow.namespace, chosen))
            lines = log.lines if log else []
            print(*lines[printed:], sep="\n", end="\n" if lines[printed:] else "", flush=True)
            printed = max(printed, len(lines))
            if not follow or chosen.state not in UNFINISHED:
                break
            step = chosen.name
            time.sleep(_LOG_SECONDS)
            current_run = retrying.call(partial(get_run, server, current_run.run_id))
        if not printed:
            raise UserError(
                f"run {current_run.display_name}: step {chosen.title} ({chosen.state}) has no log"
                + ("" if chosen.pod is None else f"; {_missing_log_reason(chosen.state in UNFINISHED)}")
            )


@runs_app.command("terminate")
def terminate(
    run: RunArgument,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
) -> None:
    """Terminate an active run. Submitted again, it resumes and reuses the finished steps."""
    from esvit_pipelines.cluster import runs as work

    with connect(host, namespace, token_file, ca_file, None) as server:
        current_run = work.find_run(server, run)
        work.terminate(server, current_run)
        print(
            f"terminating {current_run.display_name}; to follow it:\n"
            f"    {work.command_for(server, 'runs', 'show', current_run.run_id, '--wait')}"
        )


@runs_app.command("retry")
def retry(
    run: RunArgument,
    wait: WaitOption = False,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    ui: UiOption = None,
) -> None:
    """Retry the failed steps of a run, as KFP's button does; steps that succeeded are kept."""
    from esvit_pipelines.cluster import runs as work

    with connect(host, namespace, token_file, ca_file, ui) as server:
        current_run = work.find_run(server, run)
        work.retry(server, current_run)
        print(f"retrying {current_run.display_name}\n{server.link('runs', current_run.run_id)}", flush=True)
        if wait and not followed(server, current_run.run_id).succeeded:
            raise typer.Exit(1)


def _missing_log_reason(active: bool) -> str:
    if active:
        return "the server only has logs of pods that have ended; give the user interface with --ui, or set KUBECONFIG"
    return "its pod is gone, and the server has no archived log of it"


def followed(server: Connection, run_id: str) -> Outcome:
    """Follow a run until it ends. Ctrl-C leaves the run alone and prints how to follow it again."""
    from esvit_pipelines.cluster.follow import follow
    from esvit_pipelines.cluster.runs import command_for

    try:
        return follow(server, run_id)
    except KeyboardInterrupt:
        print(f"\nthe run continues; to follow it again:\n    {command_for(server, 'runs', 'show', run_id, '--wait')}")
        print(f"to terminate it:\n    {command_for(server, 'runs', 'terminate', run_id)}", flush=True)
        raise typer.Exit(INTERRUPTED_EXIT_CODE) from None
