"""`esvit runs show`: one run of a cluster as it is now."""

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
from esvit_pipelines.cluster.step_log import StepLog, figures_line, read_log

_STYLES = {"failed": "red", "running": "cyan", "waiting": "yellow", "not begun": "dim"}
_WITH_LOG = ("succeeded", "failed")


def show_run(connection: Connection, run: Any, as_json: bool) -> Outcome:
    """Print a run and its steps: for people, or as JSON for programs."""
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

    table = Table("step", "state", "began", "took", "tries", "", box=None, pad_edge=False)
    for step in workflow.steps:
        began = f"{step.began.astimezone():%H:%M:%S}" if step.began else ""
        took = format_duration(step.seconds) if step.seconds is not None else ""
        tries = str(step.attempts) if step.attempts > 1 else ""
        table.add_row(
            step.title, step.state, began, took, tries, _remark(step, workflow, logs), style=_STYLES.get(step.state)
        )
    if workflow.steps:
        Console(width=max(Console().width, table_width(table)), soft_wrap=True, highlight=False).print(table)


def _remark(step: Step, workflow: Workflow, logs: dict[str, StepLog]) -> str:
    from rich.markup import escape

    if step.state in ("waiting", "failed"):
        asked = pod_reason(workflow.namespace, step.pod) if step.state == "waiting" and step.pod else ""
        return escape(" ".join((asked or step.message).split())[:300])
    return escape(figures_line(logs[step.name].figures)) if step.name in logs else ""


def _as_json(connection: Connection, outcome: Outcome, logs: dict[str, StepLog]) -> dict[str, Any]:
    run = outcome.run
    return {
        "id": run.run_id,
        "name": run.display_name,
        "state": state(run),
        "terminated": outcome.workflow.terminated,
        "seconds": duration(run),
        "reason": None if outcome.good or run.state not in ENDED else outcome.reason,
        "link": connection.link("runs", run.run_id),
        "steps": [
            {
                "name": step.name,
                "title": step.title,
                "state": step.state,
                "began": step.began.isoformat() if step.began else None,
                "seconds": step.seconds,
                "attempts": step.attempts,
                "pod": step.pod,
                "message": step.message,
                "figures": dict(logs[step.name].figures) if step.name in logs else {},
                "outputs": dict(logs[step.name].outputs) if step.name in logs else {},
            }
            for step in outcome.workflow.steps
        ],
    }


def choose_step(run: Any, workflow: Workflow, name: str | None) -> Step:
    """The step of that name or title; None: the one that failed, else one that runs, else the last that began.

    Raises:
        UserError: there is none.
    """
    if name is None:
        running = [step for step in workflow.steps if step.state in ("running", "waiting")]
        begun = [step for step in workflow.steps if step.pod]
        for choice in (workflow.failed(), *running[-1:], *begun[-1:]):
            if choice is not None:
                return choice
        raise UserError(f"run {run.display_name}: none of its steps has begun ({state(run)})")
    for step in workflow.steps:
        if name in (step.name, step.title):
            return step
    names = [step.name for step in workflow.steps]
    near = difflib.get_close_matches(name, names, n=1)
    meant = f", did you mean {near[0]!r}?" if near else ":"
    raise UserError(
        f"step {name}: run {run.display_name} has none of that name{meant} {', '.join(names) or 'no steps'}"
    )
