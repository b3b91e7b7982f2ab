"""Why a training of several pods has failed: of all that went wrong, what came first."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from typing import Any

from esvit_core.errors import TRY_AGAIN_EXIT_CODE, USER_ERROR_EXIT_CODE
from esvit_core.launch.outcome import Outcome, family_of
from esvit_core.launch.stop import STOPPED_EXIT_CODE


@dataclass(frozen=True)
class Failure:
    """The end of a pod.

    Attributes:
        pod: its name.
        exit_code: of the process that failed, negative: minus the signal; that of the agent when it did not say.
        reason: in one line.
        when: it ended, as the API writes times.
        rank: of the process, if it is known.
        last_words: of the log, if the agent itself came to an unexpected end.
        explained: whether the agent gave the reason.
        consequence: another pod has the reason, or a signal ended it.
    """

    pod: str
    exit_code: int
    reason: str
    when: str = ""
    rank: int | None = None
    last_words: str = ""
    explained: bool = False
    consequence: bool = False

    def order(self) -> tuple[int, str]:
        """A mistake of the user's, a process that was killed or crashed, an exception, the rest; the earlier first."""
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
    """Collects the ends of pods while they can be seen: a pod that is replaced is gone."""

    def __init__(self) -> None:
        self._by_pod: dict[str, Failure] = {}

    def observe(self, pods: list[dict[str, Any]]) -> list[Failure]:
        """Those that are new."""
        new = []
        for pod in pods:
            uid = pod["metadata"]["uid"]
            if uid not in self._by_pod and (failure := _failure(pod)):
                self._by_pod[uid] = failure
                new.append(failure)
        return new

    def outcome(self, says: str) -> Outcome:
        """The first failure.

        Args:
            says: what the job says of its end, for when no pod does.
        """
        if not self._by_pod:
            reason = f"training: the job ended without a reason of its pods ({says or 'nothing said'})"
            return Outcome(reason=reason, exit_code=TRY_AGAIN_EXIT_CODE)
        first = min(self._by_pod.values(), key=Failure.order)
        if first.exit_code == USER_ERROR_EXIT_CODE:
            return Outcome(reason=first.reason, rank=first.rank, exit_code=first.exit_code)
        reason = f"training: {first.reason} (pod {first.pod}); the same command again goes on from the last checkpoint"
        return Outcome(
            reason=reason, rank=first.rank, last_words=first.last_words, exit_code=family_of(first.exit_code)
        )


def _failure(pod: dict[str, Any]) -> Failure | None:
    name, status = pod["metadata"]["name"], pod.get("status", {})
    for container in status.get("containerStatuses", []):
        ended = container.get("state", {}).get("terminated")
        if ended and ended.get("exitCode"):
            return _of_container(name, ended)
    if status.get("phase") == "Failed":  # evicted, or its node is gone: no container ended of itself
        text = " ".join(f"{status.get('reason', 'failed')}: {status.get('message', '')}".split()).strip(": ")
        return Failure(name, 128 + 9, f"the pod was ended: {text}")
    return None


def _of_container(pod: str, ended: dict[str, Any]) -> Failure:
    code, when, message = int(ended["exitCode"]), str(ended.get("finishedAt", "")), ended.get("message", "")
    try:
        said = json.loads(message)
        return Failure(
            pod,
            int(said["exit_code"]),
            str(said["reason"]),
            when,
            said.get("rank"),
            explained=True,
            consequence=bool(said.get("consequence")),
        )
    except (ValueError, KeyError, TypeError):
        pass
    if ended.get("reason") == "OOMKilled":
        return Failure(pod, 128 + 9, "the pod ran out of memory; raise cluster.train.memory", when)
    lines = message.strip().splitlines()
    last = f": {' '.join(lines[-1].split())}" if lines else ""
    stopped = code in (STOPPED_EXIT_CODE, 128 + signal.SIGTERM)
    reason = f"the agent ended with exit code {code}{last}"
    return Failure(pod, code, reason, when, last_words=message.strip(), consequence=stopped)
