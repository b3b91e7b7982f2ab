"""`esvit runs`: the commands about the runs of a cluster."""

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
    server_at,
)
from esvit_pipelines.cli.options import JsonOption

if TYPE_CHECKING:
    from esvit_pipelines.cluster.client import Connection
    from esvit_pipelines.cluster.follow import Outcome

INTERRUPTED_EXIT_CODE = 130
_LOG_SECONDS = 5.0

runs_app = typer.Typer(help="The runs of a cluster: list, show, follow, read, end and repeat them.")

RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", show_default=False, help="Its id, the beginning of it, its name, or its link.")
]
WaitOption = Annotated[
    bool, typer.Option("--wait", help="Show its steps until it has ended; exit code 1 if it failed.")
]


@runs_app.callback(invoke_without_command=True)
def runs(
    context: typer.Context,
    experiment: OneExperimentOption = None,
    number: Annotated[int, typer.Option("--number", min=1, help="The newest so many.")] = 20,
    json: JsonOption = False,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    ui: UiOption = None,
) -> None:
    """List the runs of a cluster: state, duration, link.

    With a command, do something about one of them. (`esvit status` and `esvit logs` show the curves and the log of a
    run from the object store.)
    """
    from esvit_pipelines.cluster import runs as work
    from esvit_pipelines.cluster.client import experiment_id

    if context.invoked_subcommand is not None:
        given = [name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"]  # type: ignore[union-attr]
        if given:
            option = "--" + given[0].replace("_", "-")
            raise UserError(
                f"{option}: give it after the command: esvit runs {context.invoked_subcommand} ... {option}"
            )
        return
    with server_at(host, namespace, token_file, ca_file, ui) as server:
        folder = experiment_id(server, experiment, create=False) if experiment else None
        work.show_runs(server, work.runs(server, folder, number), json)


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
    """Show a run: its steps with their state, duration and figures, why one waits, and how it ended."""
    from esvit_pipelines.cluster.runs import ENDED, find_run
    from esvit_pipelines.cluster.show_run import show_run

    if wait and json:
        raise UserError("--wait --json: give one of them; --json shows the run as it is now")
    with server_at(host, namespace, token_file, ca_file, ui) as server:
        found = find_run(server, run)
        if not wait or found.state in ENDED:
            outcome = show_run(server, found, json)
        else:
            print(found.display_name, flush=True)
            outcome = followed(server, found.run_id)
        if wait and not outcome.good:
            raise typer.Exit(1)


@runs_app.command("logs")
def logs(
    run: RunArgument,
    step: Annotated[
        str | None,
        typer.Argument(
            metavar="[STEP]", show_default=False, help="Default: the one that failed, else that runs, else the last."
        ),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the step ends.")] = False,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    ui: UiOption = None,
) -> None:
    """Print the log of a step of a run, as its newest pod wrote it."""
    from esvit_pipelines.cluster.follow import Patience
    from esvit_pipelines.cluster.run_steps import UNFINISHED, workflow_of
    from esvit_pipelines.cluster.runs import find_run, get_run
    from esvit_pipelines.cluster.show_run import choose_step
    from esvit_pipelines.cluster.step_log import read_log

    with server_at(host, namespace, token_file, ca_file, ui) as server:
        found = find_run(server, run)
        patient = Patience(server, found.run_id, sys.stderr)
        printed = 0
        while True:
            workflow = patient.ask(partial(workflow_of, server, found))
            chosen = choose_step(found, workflow, step)
            log = patient.ask(partial(read_log, server, found.run_id, workflow.namespace, chosen))
            lines = log.lines if log else []
            print(*lines[printed:], sep="\n", end="\n" if lines[printed:] else "", flush=True)
            printed = max(printed, len(lines))
            if not follow or chosen.state not in UNFINISHED:
                break
            step = chosen.name
            time.sleep(_LOG_SECONDS)
            found = patient.ask(partial(get_run, server, found.run_id))
        if not printed:
            raise UserError(
                f"run {found.display_name}: step {chosen.title} ({chosen.state}) has no log"
                + ("" if chosen.pod is None else f"; {_without_log(chosen.state in UNFINISHED)}")
            )


@runs_app.command("terminate")
def terminate(
    run: RunArgument,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
) -> None:
    """End a run that is under way. Submitted again, it goes on from what it has done."""
    from esvit_pipelines.cluster import runs as work

    with server_at(host, namespace, token_file, ca_file, None) as server:
        found = work.find_run(server, run)
        work.terminate(server, found)
        print(
            f"terminating {found.display_name}; {work.again(server, 'runs', 'show', found.run_id, '--wait')} follows it"
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
    """Start the failed steps of a run again, as KFP's button does; what has succeeded stays."""
    from esvit_pipelines.cluster import runs as work

    with server_at(host, namespace, token_file, ca_file, ui) as server:
        found = work.find_run(server, run)
        work.retry(server, found)
        print(f"trying {found.display_name} again\n{server.link('runs', found.run_id)}", flush=True)
        if wait and not followed(server, found.run_id).good:
            raise typer.Exit(1)


def _without_log(under_way: bool) -> str:
    if under_way:
        return (
            "the server keeps logs of pods that have ended only; name the user interface with --ui, or set KUBECONFIG"
        )
    return "its pod is gone, and the server keeps no archive of it"


def followed(server: Connection, run_id: str) -> Outcome:
    """Follow a run; Ctrl-C leaves it alone and says how to come back."""
    from esvit_pipelines.cluster.follow import follow
    from esvit_pipelines.cluster.runs import again

    try:
        return follow(server, run_id)
    except KeyboardInterrupt:
        print(f"\nthe run goes on; to come back:\n    {again(server, 'runs', 'show', run_id, '--wait')}")
        print(f"to end it:\n    {again(server, 'runs', 'terminate', run_id)}", flush=True)
        raise typer.Exit(INTERRUPTED_EXIT_CODE) from None
