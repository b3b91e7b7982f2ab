"""Follow a run on a cluster until it ends: its steps as they begin and end, why one waits, and the verdict."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO

from esvit_core.errors import UserError
from esvit_core.monitoring.progress_line import format_duration
from esvit_pipelines.cluster.client import Connection, refusal
from esvit_pipelines.cluster.pod_api import pod_reason
from esvit_pipelines.cluster.run_steps import Step, Workflow, workflow_of
from esvit_pipelines.cluster.runs import ENDED, GOOD, again, get_run, state
from esvit_pipelines.cluster.step_log import StepLog, figures_line, read_log, users_mistake

PATIENCE_SECONDS = 24 * 3600  # without an answer; a run of days outlives a broken connection
_REMINDER_SECONDS = 30 * 60
_LONGEST_PAUSE = 30.0
_REASON_LENGTH = 300
_SETTLED = ("succeeded", "cached", "skipped", "failed", "stopped")


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        run: as the server describes it.
        workflow: its steps.
        failed: the step that failed first.
        log: of that step; None: there is none.
    """

    run: Any
    workflow: Workflow
    failed: Step | None = None
    log: StepLog | None = None

    @property
    def good(self) -> bool:
        """Whether it succeeded."""
        return self.run.state in GOOD

    @property
    def worth_repeating(self) -> bool:
        """Whether it failed for another reason than what it was given, or a person who ended it."""
        if self.run.state != "FAILED" or self.workflow.terminated:
            return False
        return self.failed is None or not users_mistake(self.log, self.failed.message)

    @property
    def reason(self) -> str:
        """Why it failed, in a line."""
        if self.workflow.terminated:
            return "the run was terminated"
        if self.failed is None:
            error = self.run.error.message if self.run.error else ""
            return self.workflow.message or error or "the server gives no reason"
        if self.log and self.log.error:
            why = self.log.error.removeprefix("error: ")
            return why if why.startswith(f"{self.failed.title}: ") else f"step {self.failed.title}: {why}"
        code = self.log.exit_code if self.log else None
        # Of the launcher, which ends with 1 whatever the step ends with, comes the message.
        return f"step {self.failed.title}: {self.failed.message if code is None else f'exit code {code}'}"


def follow(connection: Connection, run_id: str, seconds: float = 5.0) -> Outcome:
    """Wait until a run has ended, and print what happens to its steps.

    A server that does not answer is asked again for a day: a broken port-forward does not end the run.

    Raises:
        UserError: the server has not answered for a day, or there is no such run.
    """
    patient = Patience(connection, run_id)
    seen = _Seen(connection, run_id)
    while True:
        run = patient.ask(lambda: get_run(connection, run_id))
        workflow = patient.ask(lambda run=run: workflow_of(connection, run))
        seen.compare(run, workflow, patient.ask)
        if run.state in ENDED:
            return seen.outcome(run, workflow, patient.ask)
        time.sleep(seconds)


class Patience:
    """Asks again while the server does not answer.

    Args:
        run_id: of the run that the questions are about.
        screen: gets a line when the answers stop and when they begin again; None: standard output.
    """

    def __init__(self, connection: Connection, run_id: str, screen: TextIO | None = None) -> None:
        self._connection, self._run_id, self._screen = connection, run_id, screen

    def ask(self, question: Callable[[], Any]) -> Any:
        """The answer to a question, however often it has to be asked.

        Raises:
            UserError: there has been no answer for :data:`PATIENCE_SECONDS`.
            kfp_server_api.ApiException: the server refuses.
        """
        import kfp_server_api
        from urllib3.exceptions import HTTPError

        silent, pause, reminded = 0.0, 1.0, 0.0
        while True:
            try:
                answer = question()
            except (HTTPError, OSError, kfp_server_api.ApiException) as error:
                if isinstance(error, kfp_server_api.ApiException) and not _passes(error):
                    raise
                if silent >= PATIENCE_SECONDS:
                    raise UserError(
                        f"{self._connection.host}: no answer for {format_duration(silent)}; the run may go on, look "
                        f"at it with {again(self._connection, 'runs', 'show', self._run_id, '--wait')}"
                    ) from None
                if silent == 0 or silent - reminded >= _REMINDER_SECONDS:
                    reminded = silent
                    why = refusal(error, self._connection.server.token_file is not None).partition(";")[0]
                    _print(f"lost the server: {why}; the run goes on without it, asking again", self._screen)
                time.sleep(pause)
                silent += pause
                pause = min(2 * pause, _LONGEST_PAUSE)
                continue
            if silent:
                _print("the server answers again", self._screen)
            return answer


def _passes(error: Any) -> bool:
    """Whether a refusal may be another one in a minute: a proxy without a backend, a token that is being renewed."""
    return not error.status or error.status in (401, 408, 429) or error.status >= 500


class _Seen:
    """What was printed of a run."""

    def __init__(self, connection: Connection, run_id: str) -> None:
        self._connection, self._run_id = connection, run_id
        self._steps: dict[str, Step] = {}
        self._reasons: dict[str, str] = {}
        self._logs: dict[str, StepLog | None] = {}
        self._state = ""

    def compare(self, run: Any, workflow: Workflow, ask: Callable[..., Any]) -> None:
        """Print what has changed."""
        if run.state != self._state and run.state not in (None, "RUNTIME_STATE_UNSPECIFIED") and not workflow.steps:
            _print(state(run))
            self._state = run.state
        width = max((len(step.title) for step in workflow.steps), default=0)
        for step in workflow.steps:
            before = self._steps.get(step.name)
            text = self._text(step, before, workflow, ask)
            if text:
                _print(f"{step.title:<{width}}  {text}")
            self._steps[step.name] = step

    def _text(self, step: Step, before: Step | None, workflow: Workflow, ask: Callable[..., Any]) -> str:
        changed = before is None or (step.state, step.attempts) != (before.state, before.attempts)
        if step.state == "waiting":
            return self._waiting(step, workflow)
        if step.state == "ended an attempt" and changed:
            return f"attempt {step.attempts} ended: {step.message or 'no reason was given'}"
        if step.state in _SETTLED and changed:
            return self._settled(step, workflow, ask)
        if step.state == "running" and changed:
            again = f" again, attempt {step.attempts}" if step.attempts > 1 else ""
            return f"running{again}" + (f"; the one before ended: {step.before}" if step.before else "")
        return ""

    def _waiting(self, step: Step, workflow: Workflow) -> str:
        """Why it waits, when that is new."""
        reason = step.message
        if step.pod and reason in ("", "PodInitializing", "ContainerCreating"):
            reason = pod_reason(workflow.namespace, step.pod) if workflow.namespace else ""
        reason = " ".join(reason.split())[:_REASON_LENGTH]
        if not reason or self._reasons.get(step.name) == reason:
            return ""
        self._reasons[step.name] = reason
        return f"waiting: {reason}"

    def _settled(self, step: Step, workflow: Workflow, ask: Callable[..., Any]) -> str:
        took = f" after {format_duration(step.seconds)}" if step.seconds is not None else ""
        if step.state == "succeeded":
            log = self._log(step, workflow, ask)
            figures = figures_line(log.figures) if log else ""
            return f"succeeded{took}" + (f": {figures}" if figures else "")
        if step.state == "failed":
            return f"failed{took}" + (f": {step.message}" if step.message else "")
        return step.state + (took if step.state == "stopped" else "")

    def _log(self, step: Step, workflow: Workflow, ask: Callable[..., Any]) -> StepLog | None:
        if step.pod and step.pod not in self._logs:
            self._logs[step.pod] = ask(lambda: read_log(self._connection, self._run_id, workflow.namespace, step))
        return self._logs.get(step.pod or "")

    def outcome(self, run: Any, workflow: Workflow, ask: Callable[..., Any]) -> Outcome:
        """The end, printed: the verdict and the link, or the last lines of the step that failed."""
        failed = workflow.failed()
        log = self._log(failed, workflow, ask) if failed else None
        outcome = Outcome(run, workflow, failed, log)
        print_end(self._connection, outcome, [found for found in self._logs.values() if found])
        return outcome


def print_end(connection: Connection, outcome: Outcome, logs: list[StepLog]) -> None:
    """Print how a run ended."""
    run, log, failed = outcome.run, outcome.log, outcome.failed
    if outcome.good:
        reasons = [str(found.outputs["reason"]) for found in logs if found.outputs.get("reason")]
        print(f"{state(run)}: {reasons[-1]}" if reasons else state(run))
    else:
        if failed and log:
            print(f"the last lines of {failed.title}:")
            for line in log.last_lines():
                print(f"    {line}")
        elif failed:
            print(f"the log of {failed.title} is gone with its pod")
        print(outcome.reason if outcome.workflow.terminated else f"{state(run)}: {outcome.reason}")
        if failed and log:
            print(f"the whole log: {again(connection, 'runs', 'logs', run.run_id, failed.name)}")
    print(connection.link("runs", run.run_id), flush=True)


def _print(text: str, screen: TextIO | None = None) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S}  {text}", file=screen, flush=True)
