"""Real processes under a real agent: resume, interruption, failure."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from esvit_core.config import Config
from esvit_core.errors import TRY_AGAIN_EXIT_CODE, UserError
from esvit_core.launch import launcher as launch
from esvit_core.launch.launcher import divide_cores, launch_training
from esvit_core.runs.events import read_events
from esvit_core.runs.log import read_log
from esvit_core.storage.upload_queue import pending_folder

# 160 steps: long enough to be stopped in the middle.
LONG = {"epochs": 40, "processes": 2}


@pytest.fixture
def two_cores() -> Iterator[None]:
    """Two cores for this process and its children, so that the launcher gives one thread to each of two processes."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:2])
    yield
    os.sched_setaffinity(0, cores)


@pytest.mark.timeout(900)  # seconds where the machine is free; two launches
def test_resume_continues_bitwise_elsewhere_and_past_a_damaged_checkpoint(
    micro_run: Callable[..., Any], two_cores: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"epochs": 15, "processes": 2}
    undisturbed = micro_run("undisturbed", training=settings)
    undisturbed.train(tmp_path)

    killed = micro_run("killed", training=settings)
    launcher = killed.launch()
    killed.wait_for_step(random.randint(5, 25))
    random.choice(killed.trainers()).kill()
    output, _ = launcher.communicate(timeout=240)
    assert launcher.returncode == TRY_AGAIN_EXIT_CODE
    assert "was killed by SIGKILL" in output.splitlines()[-1]
    started, failed = read_events(killed.store, killed.uri)
    assert (started.kind, started.step, started.facts) == ("started", 0, {"steps": 60, "processes": 2, "device": "cpu"})
    assert failed.kind == "failed" and f"process {failed.rank} was killed by SIGKILL" in failed.reason
    assert not killed.processes()

    newest = killed.checkpointed_step()
    assert 0 < newest < 60
    damaged = f"{killed.uri}/training/checkpoints/{newest:08d}"
    data = killed.store.get_bytes(f"{damaged}/student.pt")
    killed.store.put_bytes(f"{damaged}/student.pt", data[:2000] + bytes([data[2000] ^ 1]) + data[2001:])

    # Elsewhere: with nothing of what this machine may have kept.
    shutil.rmtree(pending_folder(killed.store, killed.uri), ignore_errors=True)
    monkeypatch.setenv("ESVIT_CACHE_DIR", str(tmp_path / "cache"))
    launcher = killed.launch()
    output, _ = launcher.communicate(timeout=240)
    assert launcher.returncode == 0, output
    assert f"{damaged} cannot be used" in output and "SHA-256" in output
    (resumed,) = killed.store.get_json(f"{killed.uri}/training/summary.json")["resumes"]
    assert resumed < newest
    assert f"resuming from step {resumed} of 60 (checkpoint {killed.uri}/training/checkpoints/" in output

    assert [(e.kind, e.step) for e in read_events(killed.store, killed.uri)[2:]] == [("started", resumed)]
    assert killed.weights() == undisturbed.weights()
    logs = [{line["step"]: line["loss"] for line in read_log(run.store, run.uri)} for run in (killed, undisturbed)]
    assert logs[0].keys() == logs[1].keys()
    # A line is the mean since the one before: the first after the resume may cover fewer steps.
    assert {step for step in logs[0] if logs[0][step] != logs[1][step]} <= {resumed + 1}


def test_an_interrupted_launcher_leaves_a_checkpoint_and_no_process(micro_run: Callable[..., Any]) -> None:
    run = micro_run("interrupted", training=LONG | {"metrics_port": 0, "checkpoint_steps": 1000})
    launcher = run.launch()
    lines = iter(launcher.stdout.readline, "")
    address = next(m.group(1) for line in lines if (m := re.search(r"metrics on (http://\S+)", line)))
    next(line for line in lines if "images/s" in line)
    metrics = urllib.request.urlopen(address, timeout=10).read().decode()
    assert re.search(r'esvit_train_loss\{recipe="micro",run="interrupted",term="view"\} \d', metrics)
    assert re.search(r'esvit_train_step_seconds_count\{recipe="micro",run="interrupted"\} [1-9]', metrics)

    listening = [c for p in run.processes() for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert listening and {c.laddr.ip for c in listening} == {"127.0.0.1"}

    launcher.send_signal(signal.SIGINT)
    output = "".join(lines)
    assert launcher.wait(240) == 128 + signal.SIGINT
    assert not run.processes()
    step = run.checkpointed_step()
    assert 0 < step < 160
    assert [(e.kind, e.step) for e in read_events(run.store, run.uri)] == [("started", 0), ("stopped", step)]
    assert f"rerun the command to resume from step {step}" in output.splitlines()[-1]
    assert "Traceback" not in output


@pytest.mark.parametrize("victim", ["launcher", "agent"])
def test_nothing_outlives_a_killed_launcher_or_agent(
    micro_run: Callable[..., Any], victim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    run = micro_run(f"killed-{victim}", training=LONG | {"checkpoint_steps": 3})
    launcher = run.launch()
    run.wait_for_step(3)
    trainers = run.trainers()
    assert len(trainers) == 2
    if victim == "launcher":
        launcher.kill()
    else:
        (agent,) = run.processes("launch.agent")
        agent.kill()
        output, _ = launcher.communicate(timeout=240)
        assert "agent" in output.splitlines()[-1]
        assert not run.processes()  # the launcher has waited for them
    run.wait_until(lambda: not run.processes(), "the end of the processes")
    assert not list(tmp_path.glob("esvit-train-*"))
    assert run.checkpointed_step() > 3  # they have written a last one


def test_a_training_that_diverges_ends_with_its_reason_and_no_traceback(
    micro_run: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    run = micro_run("diverging", training={"processes": 2}, optimizer={"lr": 1e30, "warmup_epochs": 0, "clip_grad": 0})
    with pytest.raises(UserError, match=r"training: .* at step [12], not finite; lower optimizer.lr"):
        launch_training(run.uri, run.config)
    assert "Traceback" not in capfd.readouterr().err
    assert run.checkpointed_step() == -1
    assert not run.processes()


def test_processes_and_threads_use_every_core_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_gpus", lambda: 0)

    def divided(cores: int, processes: int | str = "auto", batch_size: int = 64) -> tuple[int, int]:
        monkeypatch.setattr(launch, "available_cores", lambda: cores)
        return divide_cores(Config.from_mapping({"training": {"processes": processes, "batch_size": batch_size}}))

    assert divided(1) == (1, 1)
    assert divided(2) == (2, 1)
    assert divided(8) == (2, 4)
    assert divided(8, processes=4) == (4, 2)
    assert divided(2, batch_size=63) == (1, 2)  # two processes cannot share it equally
    assert divided(2, processes=2, batch_size=63) == (2, 1)  # but may be told to: 31 and 32
    with pytest.raises(UserError, match=r"expected at least training\.processes, 2"):
        divided(2, processes=2, batch_size=1)
    monkeypatch.setattr(launch, "_gpus", lambda: 4)
    assert divided(8) == (4, 2)
    assert divide_cores(Config(), use_gpus=False) == (2, 4)
