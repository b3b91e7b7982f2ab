"""What goes wrong in the middle of a training in a step's own pod."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable

from cluster_settings import Settings
from evidence import Saw
from kube import Kube, wait_for
from runs import ENDED, TRAIN_STEP, Cli, Runs, progress, run_id_in, step_in, wait_for_line, wait_for_step

LONG = 600  # epochs of 4 steps


def another(runs: Runs, run_id: str, pod: dict, seconds: float = 300) -> dict:
    """Wait for the pod that replaces one that is gone."""

    def look() -> dict | None:
        assert runs.state(run_id) not in ENDED, runs.failure(run_id)
        return next((p for p in runs.pods(run_id, TRAIN_STEP) if p["metadata"]["uid"] != pod["metadata"]["uid"]), None)

    return wait_for("another pod of the step", look, seconds)


def pod_of(runs: Runs, run_id: str) -> tuple[dict, int]:
    """The pod that trains, and the step that it is at."""
    pod = runs.pod(run_id, TRAIN_STEP)
    return pod, wait_for_step(runs.kube, pod, after=0)


def test_step_pod_deleted(
    training: Callable[..., tuple[str, dict]], runs: Runs, kube: Kube, unfinished: dict[str, str], saw: Saw
) -> None:
    """A training pod that is deleted starts again from a checkpoint of the last minute."""
    run_id, pod = training("deleted", epochs=LONG)
    time.sleep(25)  # a checkpoint is saved every 15 s
    lines = progress(kube, pod)
    kube.delete_pod(pod)
    again = another(runs, run_id, pod)
    resumed = wait_for_line(kube, again, "resuming from step")
    saw(f"before: {lines[-1].strip()}")
    saw(f"after:  {resumed.strip()}")
    unfinished["a step's pod deleted"] = run_id


def test_infrastructure_failure_is_repeated(endless: str, runs: Runs, kube: Kube, saw: Saw) -> None:
    """A step that ends with an infrastructure failure begins again in its own pod."""
    pod, _ = pod_of(runs, endless)
    kill = (
        "import os, signal, psutil;"
        "[p.send_signal(signal.SIGKILL) for p in psutil.process_iter() if 'esvit_core.launch.agent' in p.cmdline()]"
    )
    kube.run("exec", pod["metadata"]["name"], "-c", "main", "--", "python", "-c", kill)
    saw(wait_for_line(kube, pod, "retrying in").strip())
    resumed = wait_for_line(kube, pod, "resuming from step")
    saw(resumed.strip())
    after, _ = pod_of(runs, endless)
    assert after["metadata"]["uid"] == pod["metadata"]["uid"]


def test_mistake_is_not_repeated(cli: Cli, runs: Runs, stamp: str, saw: Saw) -> None:
    """A user's mistake ends the run at once, in one line."""
    done = cli.run(
        *cli.submission("pretrain", f"s3://esvit/nothing-here-{stamp}", "--wait", "--name", f"mistake {stamp}")
    )
    saw.command(done)
    assert done.returncode != 0
    assert f"nothing-here-{stamp}" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    (pod,) = runs.pods(run_id_in(done.stdout), phase=None)
    saw(f"one pod, not repeated: {pod['metadata']['name']}")


def test_store_away(endless: str, runs: Runs, kube: Kube, saw: Saw) -> None:
    """The store is away for a minute in the middle of a training, which goes on in the same pod."""
    pod, before = pod_of(runs, endless)
    kube.run("scale", "statefulset/esvit-object-store", "--replicas=0")
    began = time.monotonic()
    time.sleep(60)
    kube.run("scale", "statefulset/esvit-object-store", "--replicas=1")
    kube.run("rollout", "status", "statefulset/esvit-object-store", "--timeout=180s", seconds=200)
    saw(f"the store was away for {time.monotonic() - began:.0f} s")
    saw(wait_for_line(kube, pod, "nothing was lost").strip())
    during = step_in(progress(kube, pod)[-1])
    saw(f"at step {before:,} before, at step {wait_for_step(kube, pod, during):,} after, in the same pod")


def test_api_server_restarted(
    settings: Settings, endless: str, runs: Runs, kube: Kube, needs: Callable[..., None], saw: Saw
) -> None:
    """The Kubernetes API server restarts in the middle of a training, which goes on in the same pod."""
    needs("restart_api")
    pod, before = pod_of(runs, endless)
    subprocess.run(settings.restart_api, shell=True, check=True, timeout=120)
    wait_for("the API server", lambda: kube.get("pod", pod["metadata"]["name"]), 120)
    again, after = pod_of(runs, endless)
    assert again["metadata"]["uid"] == pod["metadata"]["uid"]
    saw(f"the API server was restarted; at step {before:,} before, at step {after:,} after, in the same pod")


def test_waits_and_comes_back(cli: Cli, runs: Runs, unlabelled: str, stamp: str, saw: Saw) -> None:
    """Ctrl-C on `esvit submit --wait` leaves the run; `esvit runs` shows, terminates and retries it."""
    import signal

    submission = cli.submission(
        "pretrain",
        unlabelled,
        "--wait",
        "--name",
        f"left {stamp}",
        settings=(f"recipe=left-{stamp}", f"training.epochs={LONG}"),
    )
    process = cli.start(*submission)
    lines: list[str] = []
    assert process.stdout
    for line in process.stdout:
        lines.append(line)
        if "prepare data" in line:
            process.send_signal(signal.SIGINT)
            break
    lines += process.stdout.readlines()
    process.wait(60)
    for line in lines[-8:]:
        saw(line.rstrip())
    run_id = next(word for line in lines for word in re.findall(r"[0-9a-f]{8}-[0-9a-f-]{27}", line))
    assert runs.state(run_id) in ("PENDING", "RUNNING")
    runs.pod(run_id, TRAIN_STEP)
    for verb in ("show", "logs", "terminate"):
        done = cli.run("runs", verb, run_id)
        saw.command(done)
        assert done.returncode == 0, done.stderr
    runs.wait(run_id, "FAILED" if runs.state(run_id) != "CANCELED" else "CANCELED", 300)
    done = cli.run("runs", "retry", run_id)
    saw.command(done)
    assert done.returncode == 0
    wait_for("the retried run to run", lambda: runs.state(run_id) == "RUNNING" or None, 120)
    cli.run("runs", "terminate", run_id)
    wait_for("the end of the retried run", lambda: runs.state(run_id) in ENDED or None, 300)
