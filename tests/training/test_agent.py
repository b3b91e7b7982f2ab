"""Which of several failures is reported as the reason; who hosts the rendezvous."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from esvit_core.errors import TRY_AGAIN_EXIT_CODE, LostPeerError, UserError
from esvit_core.launch import outcome
from esvit_core.launch.agent import _threads, _with_host, first_failure
from esvit_core.launch.outcome import mark_consequence, record_own_failure
from esvit_core.launch.signals import STOPPED_EXIT_CODE
from esvit_core.runs.environment import available_cores
from esvit_core.runs.events import read_events, record_event


def failure(
    folder: Path, rank: int, exit_code: int, message: str = "", seconds_ago: float = 0, consequence: bool = False
) -> ProcessFailure:
    file = folder / f"{rank}.json"
    if message:
        when = str(int(time.time() - seconds_ago))
        file.write_text(json.dumps({"message": {"message": message, "extraInfo": {"timestamp": when}}}))
    if consequence:
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("TORCHELASTIC_ERROR_FILE", str(file))
            mark_consequence()
    return ProcessFailure(rank, 1000 + rank, exit_code, str(file))


def reason(*failures: ProcessFailure) -> str:
    return first_failure(ChildFailedError("train", {f.local_rank: f for f in failures}))["reason"]


def test_a_user_error_is_reported_unchanged(tmp_path: Path) -> None:
    lost = failure(tmp_path, 0, 1, "RuntimeError: Connection closed by peer", seconds_ago=5)
    mistake = failure(tmp_path, 1, 2, "UserError: data: expected images;\nadd some")
    assert reason(lost, mistake) == "data: expected images; add some"


def test_a_killed_process_comes_before_those_that_lost_it(tmp_path: Path) -> None:
    lost = failure(tmp_path, 0, 1, "RuntimeError: Connection closed by peer", seconds_ago=5)
    killed = failure(tmp_path, 1, -signal.SIGKILL)
    assert reason(lost, killed) == "process 1 was killed by SIGKILL (out of memory?)"


def test_an_exception_comes_before_a_process_that_the_agent_ended(tmp_path: Path) -> None:
    ended = failure(tmp_path, 0, -signal.SIGTERM)
    raised = failure(tmp_path, 1, 1, "ValueError: wrong shape")
    assert reason(ended, raised) == "process 1: ValueError: wrong shape"


def test_an_outage_keeps_its_reason_and_its_code(tmp_path: Path) -> None:
    outage = failure(tmp_path, 0, TRY_AGAIN_EXIT_CODE, "StoreUnavailable: s3://b/k: no answer")
    reported = first_failure(ChildFailedError("train", {0: outage}))
    assert (reported["exit_code"], reported["reason"]) == (TRY_AGAIN_EXIT_CODE, "s3://b/k: no answer")
    assert not reported["consequence"]


def test_the_reason_of_a_lost_process_precedes_its_consequences(tmp_path: Path) -> None:
    lost = failure(tmp_path, 0, TRY_AGAIN_EXIT_CODE, "LostPeerError: gone", seconds_ago=5, consequence=True)
    outage = failure(tmp_path, 1, TRY_AGAIN_EXIT_CODE, "StoreUnavailable: no answer")
    assert reason(lost, outage) == "no answer"
    assert reason(lost, failure(tmp_path, 2, 1, "ValueError: wrong shape")) == "process 2: ValueError: wrong shape"
    assert reason(lost, failure(tmp_path, 3, 1)) == "process 3 ended with exit code 1 and no reason"
    reported = first_failure(ChildFailedError("train", {0: lost}))
    assert (reported["exit_code"], reported["reason"], reported["consequence"]) == (TRY_AGAIN_EXIT_CODE, "gone", True)


def test_a_requested_stop_is_not_a_process_failure(tmp_path: Path) -> None:
    assert reason(failure(tmp_path, 0, STOPPED_EXIT_CODE)) == "stopped from outside by a signal"
    assert reason(failure(tmp_path, 1, 134)) == "process 1 ended with exit code 134 and no reason"


@pytest.mark.parametrize(
    "conf, address, expected",
    [
        ("", "first", "is_host=1"),
        ("", "second", "is_host=0"),
        ("join_timeout=60", "first", "join_timeout=60,is_host=1"),
        ("store_type=file", "first", "store_type=file"),  # nobody keeps it: it is a file
        ("", "", ""),  # torch finds out by itself
    ],
)
def test_the_node_of_the_endpoint_hosts_the_rendezvous(conf: str, address: str, expected: str) -> None:
    options = Namespace(local_addr=address, rdzv_backend="c10d", rdzv_endpoint="first:29500", rdzv_conf=conf)
    assert _with_host(options).rdzv_conf == expected


def test_under_plain_torchrun_the_processes_record_the_reason(micro_run: Callable[..., Any], tmp_path: Path) -> None:
    run = micro_run("lost-shard")
    for stat in list(run.store.list(f"{run.uri}/data")):
        if stat.uri.endswith(".tar"):
            run.store.remove(stat.uri)
    command = [
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "esvit_core.training",
        "--run-uri",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    environment["ESVIT_CACHE_DIR"] = str(tmp_path)  # other tests may have cached the same shards
    done = subprocess.run(
        [sys.executable, "-m", *command, run.uri], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode != 0
    # Once as a rule; twice where the second has not seen in time what the first has left.
    (reason,) = {entry.reason for entry in read_events(run.store, run.uri) if entry.kind == "failed"}
    assert "shard" in reason and f"error: {reason}" in done.stderr


def test_a_process_that_lost_another_records_no_second_reason(store_env: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcome, "CONSEQUENCE_DELAY_SECONDS", 0.0)
    uri, began = store_env.uri("runs/a"), time.time()
    record_event(store_env, uri, "failed", reason="data: expected images")
    record_own_failure(uri, LostPeerError("Connection closed"), 0, began)
    assert [entry.reason for entry in read_events(store_env, uri)] == ["data: expected images"]
    record_own_failure(uri, UserError("another time"), 0, time.time() + 1)  # a later start, another failure
    record_own_failure(uri, ValueError("wrong\nshape"), 3, time.time() + 2)
    assert [entry.reason for entry in read_events(store_env, uri)][1:] == [
        "another time",
        "process 3: ValueError: wrong shape",
    ]


def test_the_processes_of_a_node_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esvit_core.launch.agent.available_cores", lambda: 7)
    assert _threads(["--nnodes", "1:2", "--nproc_per_node", "3"]) == 2
    assert _threads(["--nproc_per_node", "8"]) == 1


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_a_pod_s_limit_bounds_the_cores_with_either_version_of_control_groups(
    tmp_path: Path, files: dict[str, str], cores: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_cores(tmp_path) == (cores or len(os.sched_getaffinity(0)))
