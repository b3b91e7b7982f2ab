"""The log of a step on a cluster, and what it contains: metrics, output parameters, and why the step failed.

KFP stores the metrics of a step in its metadata store, which its REST API does not expose (2.16, 2.17). The launcher in
the step's pod prints the outputs of the step, metrics included, as ``ExecutorOutput: {...}``; this module parses that.
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
# Lines of KFP's launcher and of Argo.
_LAUNCHER = re.compile(r'^([IWEF]\d{4} \d\d:\d\d:\d\d|time="?\d{4}-|\[KFP Executor |\{"level":)')
_LAST_LINES = 12


@dataclass(frozen=True)
class StepLog:
    """Contents of the log of a step's pod.

    Attributes:
        lines: all lines.
        metrics: scalar metrics of the step, by name.
        outputs: its output parameters, by name.
        exit_code: exit code of the step's process; None: the launcher did not print it.
    """

    lines: Sequence[str] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    outputs: Mapping[str, Any] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def error(self) -> str:
        """The last line of the form ``error: ...``; empty: there is none."""
        return next((line for line in reversed(self.lines) if _ERROR.match(line)), "")

    def last_lines(self, number: int = _LAST_LINES) -> list[str]:
        """Return the last lines of the step itself; if there are none, those of KFP and Argo."""
        return (_step_lines(self.lines) or list(self.lines))[-number:]


def read_log(connection: Connection, run_id: str, namespace: str, step: Step) -> StepLog | None:
    """Read the log of the newest pod of a step.

    Three sources are tried in this order: KFP's API, which has archived logs and, with one namespace per user, also
    those of running pods; the user interface, which has both, and is the only one that answers behind Kubeflow's
    gateway; and the Kubernetes API.

    Args:
        namespace: namespace of the pod; empty: unknown.

    Returns:
        None: no source has the log.

    Raises:
        urllib3.exceptions.HTTPError: the server does not answer.
    """
    import kfp_server_api

    if step.pod is None:
        return None
    created = f"{step.started:%Y-%m-%d}" if step.started else ""
    query = {"podname": step.pod, "runid": run_id, "podnamespace": namespace, "createdat": created}
    interface = f"/k8s/pod/logs?{urlencode(query)}"
    sources = [(connection.host, f"/apis/v1alpha1/runs/{quote(run_id)}/nodes/{quote(step.pod)}/log")]
    sources += [(base, interface) for base in dict.fromkeys((connection.host, connection.ui)) if namespace]
    for base, path in sources:
        try:
            log = parse_log(connection.request("GET", path, base=base).decode(errors="replace"))
        except kfp_server_api.ApiException:
            continue
        if log is not None:
            return log
    text = pod_log(namespace, step.pod) if namespace else None
    return None if text is None else parse_log(text)


def parse_log(text: str) -> StepLog | None:
    """Parse a log; None: the text is the server's message that there is no log.

    The server sends status 200 before it looks for the log, so an error message is the last line of the text.
    """
    lines = text.splitlines()
    if lines and lines[-1].startswith('{"error_message":'):
        del lines[-1]
        if not lines:
            return None
    output = _executor_output(lines)
    codes = [match[1] for line in lines if (match := _EXIT.match(line))]
    return StepLog(lines, _metrics(output), output.get("parameterValues") or {}, int(codes[-1]) if codes else None)


def _step_lines(lines: Sequence[str]) -> list[str]:
    """Return the lines that the step itself wrote."""
    own, closing = [], ""
    for line in lines:
        if closing:  # multi-line JSON
            closing = "" if line == closing else closing
        elif _LAUNCHER.match(line):
            closing = "}" if line.endswith(("Got executor_input:", "ExecutorOutput: {")) else ""
        elif line.strip():
            own.append(line)
    return own


def is_user_error(log: StepLog | None, message: str) -> bool:
    """Return whether a step failed because of its input, so that another attempt would fail too.

    Args:
        log: log of the step; None: it could not be read.
        message: message of its pod.
    """
    if log is not None and log.exit_code is not None:
        return log.exit_code == USER_ERROR_EXIT_CODE
    match = _EXIT_OF_POD.search(message)
    return match is not None and int(match[1]) == USER_ERROR_EXIT_CODE


def metrics_line(metrics: Mapping[str, float], number: int = 6) -> str:
    """Format metrics in one line."""
    parts = [f"{name} {value:.4g}" if abs(value) < 1e4 else f"{name} {value:,.0f}" for name, value in metrics.items()]
    more = f", and {len(parts) - number} more" if len(parts) > number else ""
    return ", ".join(parts[:number]) + more


def _executor_output(lines: Sequence[str]) -> Mapping[str, Any]:
    """Return the last JSON object after `ExecutorOutput:`, which spans several lines."""
    for number in range(len(lines) - 1, -1, -1):
        if match := _OUTPUT.match(lines[number]):
            text = "\n".join([lines[number][match.end() :], *lines[number + 1 :]])
            try:
                value, _ = json.JSONDecoder().raw_decode(text)
            except ValueError:
                return {}
            return value if isinstance(value, dict) else {}
    return {}


def _metrics(output: Mapping[str, Any]) -> dict[str, float]:
    """Return the scalars of outputs whose name contains "metric"; the executor output lacks the artifact types."""
    metrics: dict[str, float] = {}
    for name, artifacts in (output.get("artifacts") or {}).items():
        for artifact in artifacts.get("artifacts") or () if "metric" in name else ():
            values = artifact.get("metadata") or {}
            metrics.update({k: float(v) for k, v in values.items() if isinstance(v, (int, float))})
    return metrics
