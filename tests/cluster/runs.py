"""Start runs as a user does, with the project's command line, and see how they go through KFP's own client."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster_settings import Settings
from kube import Kube, wait_for

from esvit_core.storage.address import VARIABLES

ENDED = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
STEP = "app.kubernetes.io/name=esvit,app.kubernetes.io/component=step"
TRAIN_STEP = f"{STEP},esvit.dev/role=train"
TRAINER = "app.kubernetes.io/name=esvit,app.kubernetes.io/component=trainer"
_RUN_ID = re.compile(r"#/runs/details/([0-9a-f-]{36})")


@dataclass
class Cli:
    """The command line, pointed at the cluster.

    Args:
        settings: addresses and names.
        recipe: of the runs.
        short: settings that every run gets.
    """

    settings: Settings
    recipe: Path
    short: tuple[str, ...]

    def run(self, *arguments: str, seconds: float = 1200, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run ``esvit`` with these arguments."""
        return subprocess.run(
            ["esvit", *arguments],
            executable=str(Path(sys.executable).with_name("esvit")),
            capture_output=True,
            text=True,
            timeout=seconds,
            env=self.environment(**environment),
        )

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start ``esvit`` with these arguments and do not wait for it."""
        return subprocess.Popen(
            ["esvit", *arguments],
            executable=str(Path(sys.executable).with_name("esvit")),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment(**environment),
            # A shell's background job ignores SIGINT, and so would its children, which a test interrupts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def environment(self, **more: str) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if k not in VARIABLES}
        return {**kept, "KF_PIPELINES_ENDPOINT": self.settings.kfp, "COLUMNS": "160", **more}

    def submission(self, pipeline: str, data: str, *more: str, settings: tuple[str, ...] = ()) -> list[str]:
        """The arguments of a submission with the suite's recipe."""
        changes = [item for one in (*self.short, *settings) for item in ("--set", one)]
        return ["submit", pipeline, "--data", data, "--recipe", str(self.recipe), *changes, *more]

    def submit(self, pipeline: str, data: str, *more: str, settings: tuple[str, ...] = ()) -> str:
        """Submit a run; its id.

        Raises:
            AssertionError: it was refused.
        """
        done = self.run(*self.submission(pipeline, data, *more, settings=settings))
        assert done.returncode == 0, done.stdout + done.stderr
        return run_id_in(done.stdout)


def run_id_in(text: str) -> str:
    """The id in the link that a submission prints."""
    found = _RUN_ID.search(text)
    assert found, text
    return found[1]


class Runs:
    """Runs of the server, and their pods.

    Args:
        client: KFP's.
        kube: the namespace that they run in.
    """

    def __init__(self, client: Any, kube: Kube) -> None:
        self.client, self.kube = client, kube

    def state(self, run_id: str) -> str:
        """``PENDING``, ``RUNNING``, ``SUCCEEDED``, ``FAILED``, ``CANCELED`` ..."""
        return str(self.client.get_run(run_id).state or "")

    def wait(self, run_id: str, expected: str = "SUCCEEDED", seconds: float = 1500) -> float:
        """Wait for the end of a run; the seconds that it took.

        Raises:
            AssertionError: it ends otherwise, with the last lines of the failed step.
        """
        began = time.monotonic()

        def ended() -> str | None:
            try:
                state = self.state(run_id)
            except Exception:  # the port-forward is being made anew
                return None
            return state if state in ENDED else None

        state = wait_for(f"the end of run {run_id}", ended, seconds, every=5)
        assert state == expected, f"run {run_id} is {state}, expected {expected}\n{self.failure(run_id)}"
        return time.monotonic() - began

    def pods(self, run_id: str, selector: str = STEP, phase: str | None = "Running") -> list[dict[str, Any]]:
        """Pods of the steps of a run."""
        return self.kube.pods(f"{selector},pipeline/runid={run_id}", phase)

    def pod(self, run_id: str, selector: str = STEP, seconds: float = 600) -> dict[str, Any]:
        """Wait for a running pod of a run."""

        def look() -> dict[str, Any] | None:
            state = self.state(run_id)
            assert state not in ENDED, f"run {run_id} is {state}\n{self.failure(run_id)}"
            return next(iter(self.pods(run_id, selector)), None)

        return wait_for(f"a pod of run {run_id} with {selector}", look, seconds)

    def terminate(self, *run_ids: str) -> None:
        """Terminate the runs that have not ended."""
        for run_id in run_ids:
            with contextlib.suppress(Exception):  # the server may be away: the test says what went wrong
                if self.state(run_id) not in ENDED:
                    self.client.terminate_run(run_id)

    def failure(self, run_id: str) -> str:
        """The last lines of the pods that failed."""
        message = []
        for pod in self.kube.list("pods", f"pipeline/runid={run_id}"):
            if pod["status"].get("phase") == "Failed":
                name = pod["metadata"]["name"]
                message += [f"-- {name}", *self.kube.logs(name).splitlines()[-15:]]
        return "\n".join(message)


def step_in(line: str) -> int:
    """The step that a training's line of progress is at, such as 1,024 in ``train  1,024/2,000 steps  51 %``."""
    found = re.search(r"([\d,]+)/[\d,]+ steps", line)
    assert found, line
    return int(found[1].replace(",", ""))


def wait_for_step(kube: Kube, pod: dict[str, Any], after: int, seconds: float = 300) -> int:
    """Wait until a training has come further than a step; the step."""

    def look() -> int | None:
        newest = max((step_in(line) for line in progress(kube, pod)), default=0)
        return newest if newest > after else None

    return wait_for(f"a step after {after} in the log of {pod['metadata']['name']}", look, seconds)


def progress(kube: Kube, pod: dict[str, Any]) -> list[str]:
    """The lines of a training's log that tell its speed."""
    return [line for line in kube.logs(pod["metadata"]["name"]).splitlines() if "images/s" in line]


def wait_for_line(kube: Kube, pod: dict[str, Any], text: str, seconds: float = 300) -> str:
    """Wait until a line of a pod's log contains the text; the line."""
    name = pod["metadata"]["name"]

    def look() -> str | None:
        return next((line for line in kube.logs(name).splitlines() if text in line), None)

    return wait_for(f"{text!r} in the log of {name}", look, seconds)
