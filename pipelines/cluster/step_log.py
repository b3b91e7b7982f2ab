"""The log of a step on a cluster, and what it says of the step: figures, the reason of a decision, why it failed.

KFP keeps the figures of a step in its metadata store, which its REST API does not show (2.16, 2.17). The launcher in
the step's pod prints what the step hands over, figures included, as ``ExecutorOutput: {...}``; that is read here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlencode

from esvit_core.errors import USER_ERROR_EXIT_CODE
from esvit_pipelines.cluster.client import Connection
from esvit_pipelines.cluster.pod_api import pod_log
from esvit_pipelines.cluster.run_steps import Step

_OUTPUT = re.compile(r"^I\d{4} .*\] ExecutorOutput: ")
_EXIT = re.compile(r"^[EF]\d{4} .*exit status (\d+)$")
_EXIT_OF_POD = re.compile(r"exit code (\d+)")
_ERROR = re.compile(r"^error: ")
# Lines of KFP's launcher and of Argo, which say nothing about the step itself.
_MACHINERY = re.compile(r'^([IWEF]\d{4} \d\d:\d\d:\d\d|time="?\d{4}-|\[KFP Executor |\{"level":)')
_LAST_LINES = 12


@dataclass(frozen=True)
class StepLog:
    """What the log of a step's pod holds.

    Attributes:
        lines: all of it.
        figures: scalar metrics that the step handed over, by name.
        outputs: its output parameters, by name.
        exit_code: of the step's own process, if the launcher named it.
    """

    lines: Sequence[str] = ()
    figures: Mapping[str, float] = field(default_factory=dict)
    outputs: Mapping[str, Any] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def error(self) -> str:
        """The last line that a person wrote for a failure: ``error: ...``; empty: there is none."""
        return next((line for line in reversed(self.lines) if _ERROR.match(line)), "")

    def last_lines(self, number: int = _LAST_LINES) -> list[str]:
        """The end of the log without the lines of KFP and Argo, unless there are no others."""
        return (_own(self.lines) or list(self.lines))[-number:]


def read_log(connection: Connection, run_id: str, namespace: str, step: Step) -> StepLog | None:
    """Read the log of the newest pod of a step.

    Asked for it are, in this order: KFP's API, which has the logs that are in the archive, and with a namespace for each
    user those of pods that run, too; the user interface, which has both, and which alone answers behind Kubeflow's
    gateway; and the Kubernetes API.

    Args:
        namespace: of the pod; empty: unknown.

    Returns:
        None: none of them has it.

    Raises:
        urllib3.exceptions.HTTPError: the server does not answer.
    """
    import kfp_server_api

    if step.pod is None:
        return None
    created = f"{step.began:%Y-%m-%d}" if step.began else ""
    asked = {"podname": step.pod, "runid": run_id, "podnamespace": namespace, "createdat": created}
    interface = f"/k8s/pod/logs?{urlencode(asked)}"
    places = [(connection.host, f"/apis/v1alpha1/runs/{quote(run_id)}/nodes/{quote(step.pod)}/log")]
    places += [(base, interface) for base in dict.fromkeys((connection.host, connection.ui)) if namespace]
    for base, path in places:
        try:
            found = parse_log(connection.ask("GET", path, base=base).decode(errors="replace"))
        except kfp_server_api.ApiException:
            continue
        if found is not None:
            return found
    text = pod_log(namespace, step.pod) if namespace else None
    return None if text is None else parse_log(text)


def parse_log(text: str) -> StepLog | None:
    """Take a log apart; None: it is the server's message that there is none.

    The server begins to answer with 200 before it looks for the log, so that its error is the last thing in the text.
    """
    lines = text.splitlines()
    if lines and lines[-1].startswith('{"error_message":'):
        del lines[-1]
        if not lines:
            return None
    handed = _handed_over(lines)
    codes = [match[1] for line in lines if (match := _EXIT.match(line))]
    return StepLog(lines, _figures(handed), handed.get("parameterValues") or {}, int(codes[-1]) if codes else None)


def _own(lines: Sequence[str]) -> list[str]:
    """The lines that the step itself wrote."""
    own, inside = [], ""
    for line in lines:
        if inside:  # JSON over several lines
            inside = "" if line == inside else inside
        elif _MACHINERY.match(line):
            inside = "}" if line.endswith(("Got executor_input:", "ExecutorOutput: {")) else ""
        elif line.strip():
            own.append(line)
    return own


def users_mistake(log: StepLog | None, message: str) -> bool:
    """Whether a step failed for what it was given, which another attempt would not change.

    Args:
        log: of the step; None: it could not be read.
        message: of its pod.
    """
    if log is not None and log.exit_code is not None:
        return log.exit_code == USER_ERROR_EXIT_CODE
    match = _EXIT_OF_POD.search(message)
    return match is not None and int(match[1]) == USER_ERROR_EXIT_CODE


def figures_line(figures: Mapping[str, float], number: int = 6) -> str:
    """Figures for people, in one line."""
    parts = [f"{name} {value:.4g}" if abs(value) < 1e4 else f"{name} {value:,.0f}" for name, value in figures.items()]
    more = f", and {len(parts) - number} more" if len(parts) > number else ""
    return ", ".join(parts[:number]) + more


def _handed_over(lines: Sequence[str]) -> Mapping[str, Any]:
    """The last JSON after `ExecutorOutput:`, which runs over several lines."""
    for number in range(len(lines) - 1, -1, -1):
        if match := _OUTPUT.match(lines[number]):
            text = "\n".join([lines[number][match.end() :], *lines[number + 1 :]])
            try:
                said, _ = json.JSONDecoder().raw_decode(text)
            except ValueError:
                return {}
            return said if isinstance(said, dict) else {}
    return {}


def _figures(handed: Mapping[str, Any]) -> dict[str, float]:
    """Scalars of the outputs that are metrics; the types of outputs are not in what is handed over, their names are."""
    figures: dict[str, float] = {}
    for name, artifacts in (handed.get("artifacts") or {}).items():
        for artifact in artifacts.get("artifacts") or () if "metric" in name else ():
            values = artifact.get("metadata") or {}
            figures.update({k: float(v) for k, v in values.items() if isinstance(v, (int, float))})
    return figures
