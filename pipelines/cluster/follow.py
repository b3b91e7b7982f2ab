"""Follow a run on a cluster until it ends: its steps as they start and end, why one is waiting, and the outcome."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO

from esvit_core.errors import UserError
from esvit_core.monitoring.progress_line import format_duration
from esvit_pipelines.cluster.client import Connection, describe_error
from esvit_pipelines.cluster.pod_api import pod_reason
from esvit_pipelines.cluster.run_steps import Step, Workflow, workflow_of
from esvit_pipelines.cluster.runs import ENDED, SUCCESSFUL, command_for, get_run, state
from esvit_pipelines.cluster.step_log import StepLog, is_user_error, metrics_line, read_log

OUTAGE_SECONDS = 24 * 3600  # of retries without a response; a run of days outlives a broken connection
_REMINDER_SECONDS = 30 * 60
_LONGEST_PAUSE = 30.0
_REASON_LENGTH = 300
_FINAL_STATES = ("succeeded", "cached", "skipped", "failed", "stopped")


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        run: the run as the server describes it.
        workflow: its steps.
        failed: the step that failed first; None: no step failed.
        log: log of that step; None: there is none.
    """

    run: Any
    workflow: Workflow
    failed: Step | None = None
    log: StepLog | None = None

    @property
    def succeeded(self) -> bool:
        """Whether the run succeeded."""
        return self.run.state in SUCCESSFUL

    @property
    def retryable(self) -> bool:
        """Whether the run failed, and neither because of its input nor because it was terminated."""
        if self.run.state != "FAILED" or self.workflow.terminated:
            return False
        return self.failed is None or not is_user_error(self.log, self.failed.message)

    @property
    def reason(self) -> str:
        """Why the run failed, in one line."""
        if self.workflow.terminated:
            return "the run was terminated"
        if self.failed is None:
            error = self.run.error.message if self.run.error else ""
            return self.workflow.message or error or "the server reports no reason"
        if self.log and self.log.error:
            reason = self.log.error.removeprefix("error: ")
            return reason if reason.startswith(f"{self.failed.title}: ") else f"step {self.failed.title}: {reason}"
        code = self.log.exit_code if self.log else None
        # The pod's message has the exit code of the launcher, which is 1 whatever the step's exit code is.
        return f"step {self.failed.title}: {self.failed.message if code is None else f'exit code {code}'}"


def follow(connection: Connection, run_id: str, seconds: float = 5.0) -> Outcome:
    """Wait until a run has ended, and print the state changes of its steps.

    Requests are retried for a day, since a broken port-forward does not end the run.

    Raises:
        UserError: the server has not answered for a day, or the run does not exist.
    """
    retrying = RetryOnOutage(connection, run_id)
    printer = _RunPrinter(connection, run_id)
    while True:
        run = retrying.call(lambda: get_run(connection, run_id))
        workflow = retrying.call(lambda run=run: workflow_of(connection, run))
        printer.print_changes(run, workflow, retrying.call)
        if run.state in ENDED:
            return printer.print_outcome(run, workflow, retrying.call)
        time.sleep(seconds)


class RetryOnOutage:
    """Retries requests about a run while the server does not answer.

    Args:
        run_id: id of the run.
        screen: stream for a line when the outage begins and when it ends; None: standard output.
    """

    def __init__(self, connection: Connection, run_id: str, screen: TextIO | None = None) -> None:
        self._connection, self._run_id, self._screen = connection, run_id, screen

    def call(self, request: Callable[[], Any]) -> Any:
        """Call ``request`` until it succeeds, and return its result.

        Raises:
            UserError: the server has not answered for :data:`OUTAGE_SECONDS`.
            kfp_server_api.ApiException: the server refuses the request.
        """
        import kfp_server_api
        from urllib3.exceptions import HTTPError

        silent, pause, reminded = 0.0, 1.0, 0.0
        while True:
            try:
                response = request()
            except (HTTPError, OSError, kfp_server_api.ApiException) as error:
                if isinstance(error, kfp_server_api.ApiException) and not _is_temporary(error):
                    raise
                if silent >= OUTAGE_SECONDS:
                    raise UserError(
                        f"{self._connection.host}: no answer for {format_duration(silent)}; the run may still be "
                        f"active, follow it with {command_for(self._connection, 'runs', 'show', self._run_id, '--wait')}"
                    ) from None
                if silent == 0 or silent - reminded >= _REMINDER_SECONDS:
                    reminded = silent
                    reason = describe_error(error, self._connection.server.token_file is not None).partition(";")[0]
                    _print(f"no response from the server: {reason}; the run is not affected, retrying", self._screen)
                time.sleep(pause)
                silent += pause
                pause = min(2 * pause, _LONGEST_PAUSE)
                continue
            if silent:
                _print("the server responds again", self._screen)
            return response


def _is_temporary(error: Any) -> bool:
    """Return whether an error may disappear: a proxy without a backend, or a token that is being renewed."""
    return not error.status or error.status in (401, 408, 429) or error.status >= 500


class _RunPrinter:
    """Prints what has changed in a run since the last time."""

    def __init__(self, connection: Connection, run_id: str) -> None:
        self._connection, self._run_id = connection, run_id
        self._steps: dict[str, Step] = {}
        self._reasons: dict[str, str] = {}
        self._logs: dict[str, StepLog | None] = {}
        self._state = ""

    def print_changes(self, run: Any, workflow: Workflow, call: Callable[..., Any]) -> None:
        """Print the state changes of the run and its steps."""
        if run.state != self._state and run.state not in (None, "RUNTIME_STATE_UNSPECIFIED") and not workflow.steps:
            _print(state(run))
            self._state = run.state
        width = max((len(step.title) for step in workflow.steps), default=0)
        for step in workflow.steps:
            previous = self._steps.get(step.name)
            text = self._text(step, previous, workflow, call)
            if text:
                _print(f"{step.title:<{width}}  {text}")
            self._steps[step.name] = step

    def _text(self, step: Step, previous: Step | None, workflow: Workflow, call: Callable[..., Any]) -> str:
        changed = previous is None or (step.state, step.attempts) != (previous.state, previous.attempts)
        if step.state == "waiting":
            return self._waiting(step, workflow)
        if step.state == "retrying" and changed:
            return f"attempt {step.attempts} failed: {step.message or 'no reason was given'}"
        if step.state in _FINAL_STATES and changed:
            return self._final_text(step, workflow, call)
        if step.state == "running" and changed:
            attempt = f", attempt {step.attempts}" if step.attempts > 1 else ""
            return f"running{attempt}" + (f"; the previous one failed: {step.previous_message}" if attempt else "")
        return ""

    def _waiting(self, step: Step, workflow: Workflow) -> str:
        """Return why the step is waiting, unless it was printed before."""
        reason = step.message
        if step.pod and reason in ("", "PodInitializing", "ContainerCreating"):
            reason = pod_reason(workflow.namespace, step.pod) if workflow.namespace else ""
        reason = " ".join(reason.split())[:_REASON_LENGTH]
        if not reason or self._reasons.get(step.name) == reason:
            return ""
        self._reasons[step.name] = reason
        return f"waiting: {reason}"

    def _final_text(self, step: Step, workflow: Workflow, call: Callable[..., Any]) -> str:
        took = f" after {format_duration(step.seconds)}" if step.seconds is not None else ""
        if step.state == "succeeded":
            log = self._log(step, workflow, call)
            metrics = metrics_line(log.metrics) if log else ""
            return f"succeeded{took}" + (f": {metrics}" if metrics else "")
        if step.state == "failed":
            return f"failed{took}" + (f": {step.message}" if step.message else "")
        return step.state + (took if step.state == "stopped" else "")

    def _log(self, step: Step, workflow: Workflow, call: Callable[..., Any]) -> StepLog | None:
        if step.pod and step.pod not in self._logs:
            self._logs[step.pod] = call(lambda: read_log(self._connection, self._run_id, workflow.namespace, step))
        return self._logs.get(step.pod or "")

    def print_outcome(self, run: Any, workflow: Workflow, call: Callable[..., Any]) -> Outcome:
        """Print how the run ended, and return it."""
        failed = workflow.failed()
        log = self._log(failed, workflow, call) if failed else None
        outcome = Outcome(run, workflow, failed, log)
        print_end(self._connection, outcome, [step_log for step_log in self._logs.values() if step_log])
        return outcome


def print_end(connection: Connection, outcome: Outcome, logs: list[StepLog]) -> None:
    """Print the outcome of a run, the last lines of the failed step, and the link."""
    run, log, failed = outcome.run, outcome.log, outcome.failed
    if outcome.succeeded:
        reasons = [str(step_log.outputs["reason"]) for step_log in logs if step_log.outputs.get("reason")]
        print(f"{state(run)}: {reasons[-1]}" if reasons else state(run))
    else:
        if failed and log:
            print(f"last lines of {failed.title}:")
            for line in log.last_lines():
                print(f"    {line}")
        elif failed:
            print(f"the log of {failed.title} was deleted with its pod")
        print(outcome.reason if outcome.workflow.terminated else f"{state(run)}: {outcome.reason}")
        if failed and log:
            print(f"full log: {command_for(connection, 'runs', 'logs', run.run_id, failed.name)}")
    print(connection.link("runs", run.run_id), flush=True)


def _print(text: str, screen: TextIO | None = None) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S}  {text}", file=screen, flush=True)
