"""`esvit runs show`: the current state of a run on a cluster."""

from __future__ import annotations

import difflib
import json
from typing import Any

from esvit_core.errors import UserError
from esvit_core.monitoring.progress_line import format_duration
from esvit_pipelines.cluster.client import Connection
from esvit_pipelines.cluster.follow import Outcome, print_end
from esvit_pipelines.cluster.pod_api import pod_reason
from esvit_pipelines.cluster.run_steps import Step, Workflow, workflow_of
from esvit_pipelines.cluster.runs import ENDED, duration, state, table_width
from esvit_pipelines.cluster.step_log import StepLog, metrics_line, read_log

_STYLES = {"failed": "red", "running": "cyan", "waiting": "yellow", "not started": "dim"}
_WITH_LOG = ("succeeded", "failed")


def show_run(connection: Connection, run: Any, as_json: bool) -> Outcome:
    """Print a run and its steps as a table or as JSON."""
    workflow = workflow_of(connection, run)
    logs = {
        step.name: log
        for step in workflow.steps
        if step.state in _WITH_LOG and (log := read_log(connection, run.run_id, workflow.namespace, step))
    }
    failed = workflow.failed()
    outcome = Outcome(run, workflow, failed, logs.get(failed.name) if failed else None)
    if as_json:
        print(json.dumps(_as_json(connection, outcome, logs), indent=1))
        return outcome
    took = duration(run)
    print(f"{run.display_name}: {state(run)}" + (f", {format_duration(took)}" if took is not None else ""))
    _print_steps(workflow, logs)
    if run.state in ENDED:
        print_end(connection, outcome, list(logs.values()))
    else:
        print(connection.link("runs", run.run_id))
    return outcome


def _print_steps(workflow: Workflow, logs: dict[str, StepLog]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("step", "state", "started", "duration", "attempts", "", box=None, pad_edge=False)
    for step in workflow.steps:
        started = f"{step.started.astimezone():%H:%M:%S}" if step.started else ""
        took = format_duration(step.seconds) if step.seconds is not None else ""
        attempts = str(step.attempts) if step.attempts > 1 else ""
        table.add_row(
            step.title,
            step.state,
            started,
            took,
            attempts,
            _remark(step, workflow, logs),
            style=_STYLES.get(step.state),
        )
    if workflow.steps:
        Console(width=max(Console().width, table_width(table)), soft_wrap=True, highlight=False).print(table)


def _remark(step: Step, workflow: Workflow, logs: dict[str, StepLog]) -> str:
    from rich.markup import escape

    if step.state in ("waiting", "failed"):
        reason = pod_reason(workflow.namespace, step.pod) if step.state == "waiting" and step.pod else ""
        return escape(" ".join((reason or step.message).split())[:300])
    return escape(metrics_line(logs[step.name].metrics)) if step.name in logs else ""


def _as_json(connection: Connection, outcome: Outcome, logs: dict[str, StepLog]) -> dict[str, Any]:
    run = outcome.run
    return {
        "id": run.run_id,
        "name": run.display_name,
        "state": state(run),
        "terminated": outcome.workflow.terminated,
        "seconds": duration(run),
        "reason": None if outcome.succeeded or run.state not in ENDED else outcome.reason,
        "link": connection.link("runs", run.run_id),
        "steps": [
            {
                "name": step.name,
                "title": step.title,
                "state": step.state,
                "started": step.started.isoformat() if step.started else None,
                "seconds": step.seconds,
                "attempts": step.attempts,
                "pod": step.pod,
                "message": step.message,
                "metrics": dict(logs[step.name].metrics) if step.name in logs else {},
                "outputs": dict(logs[step.name].outputs) if step.name in logs else {},
            }
            for step in outcome.workflow.steps
        ],
    }


def choose_step(run: Any, workflow: Workflow, name: str | None) -> Step:
    """Find a step by its name or title; None: the failed step, else a running one, else the last that started.

    Raises:
        UserError: no step matches.
    """
    if name is None:
        running = [step for step in workflow.steps if step.state in ("running", "waiting")]
        started = [step for step in workflow.steps if step.pod]
        for choice in (workflow.failed(), *running[-1:], *started[-1:]):
            if choice is not None:
                return choice
        raise UserError(f"run {run.display_name}: none of its steps has started ({state(run)})")
    for step in workflow.steps:
        if name in (step.name, step.title):
            return step
    names = [step.name for step in workflow.steps]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f", did you mean {near[0]!r}?" if near else ":"
    raise UserError(f"step {name}: run {run.display_name} has no such step{hint} {', '.join(names) or 'no steps'}")
