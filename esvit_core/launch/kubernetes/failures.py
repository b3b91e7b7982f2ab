"""Find the first failure of a training with several pods."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from typing import Any

from esvit_core.errors import TRY_AGAIN_EXIT_CODE, USER_ERROR_EXIT_CODE
from esvit_core.launch.outcome import Outcome, step_exit_code
from esvit_core.launch.signals import STOPPED_EXIT_CODE


@dataclass(frozen=True)
class Failure:
    """The failure of a pod.

    Attributes:
        pod: name of the pod.
        exit_code: of the process that failed (minus the signal if negative), or of the agent if it did not report one.
        reason: in one line.
        when: time of the end, as the API writes times.
        rank: of the process, if known.
        log_tail: end of the log, if the agent itself ended unexpectedly.
        explained: whether the agent reported the reason.
        consequence: whether another pod has the reason, or a signal ended this one.
    """

    pod: str
    exit_code: int
    reason: str
    when: str = ""
    rank: int | None = None
    log_tail: str = ""
    explained: bool = False
    consequence: bool = False

    def order(self) -> tuple[int, str]:
        """Sort user errors first, then killed or crashed processes, exceptions and the rest; earlier failures first."""
        if self.exit_code == USER_ERROR_EXIT_CODE:
            kind = 0
        elif self.consequence:
            kind = 4
        elif self.exit_code < 0 or self.exit_code > 128:
            kind = 1
        else:
            kind = 2 if self.explained else 3
        return kind, self.when


class Failures:
    """Collects the failures of pods while the pods exist: a pod that is replaced is gone."""

    def __init__(self) -> None:
        self._by_pod: dict[str, Failure] = {}

    def observe(self, pods: list[dict[str, Any]]) -> list[Failure]:
        """Return the failures that are new."""
        new = []
        for pod in pods:
            uid = pod["metadata"]["uid"]
            if uid not in self._by_pod and (failure := _failure(pod)):
                self._by_pod[uid] = failure
                new.append(failure)
        return new

    def outcome(self, message: str) -> Outcome:
        """Return the first failure as an outcome.

        Args:
            message: status message of the job, used if no pod has a reason.
        """
        if not self._by_pod:
            reason = f"training: the job ended and no pod has a reason ({message or 'no message'})"
            return Outcome(reason=reason, exit_code=TRY_AGAIN_EXIT_CODE)
        first = min(self._by_pod.values(), key=Failure.order)
        if first.exit_code == USER_ERROR_EXIT_CODE:
            return Outcome(reason=first.reason, rank=first.rank, exit_code=first.exit_code)
        reason = f"training: {first.reason} (pod {first.pod}); rerun the command to resume from the last checkpoint"
        return Outcome(
            reason=reason, rank=first.rank, log_tail=first.log_tail, exit_code=step_exit_code(first.exit_code)
        )


def _failure(pod: dict[str, Any]) -> Failure | None:
    name, status = pod["metadata"]["name"], pod.get("status", {})
    for container in status.get("containerStatuses", []):
        ended = container.get("state", {}).get("terminated")
        if ended and ended.get("exitCode"):
            return _of_container(name, ended)
    if status.get("phase") == "Failed":  # evicted, or its node is gone: no container has an exit code
        text = " ".join(f"{status.get('reason', 'failed')}: {status.get('message', '')}".split()).strip(": ")
        return Failure(name, 128 + 9, f"the pod was ended: {text}")
    return None


def _of_container(pod: str, ended: dict[str, Any]) -> Failure:
    code, when, message = int(ended["exitCode"]), str(ended.get("finishedAt", "")), ended.get("message", "")
    try:
        report = json.loads(message)
        return Failure(
            pod,
            int(report["exit_code"]),
            str(report["reason"]),
            when,
            report.get("rank"),
            explained=True,
            consequence=bool(report.get("consequence")),
        )
    except (ValueError, KeyError, TypeError):
        pass
    if ended.get("reason") == "OOMKilled":
        return Failure(pod, 128 + 9, "the pod ran out of memory; raise cluster.train.memory", when)
    lines = message.strip().splitlines()
    last = f": {' '.join(lines[-1].split())}" if lines else ""
    stopped = code in (STOPPED_EXIT_CODE, 128 + signal.SIGTERM)
    reason = f"the agent ended with exit code {code}{last}"
    return Failure(pod, code, reason, when, log_tail=message.strip(), consequence=stopped)
