"""Which of several failures is the reason."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from esvit_core.training.agent import first_failure
from esvit_core.training.stop import STOPPED_EXIT_CODE


def failure(folder: Path, rank: int, exit_code: int, message: str = "", seconds_ago: float = 0) -> ProcessFailure:
    file = folder / f"{rank}.json"
    if message:
        when = str(int(time.time() - seconds_ago))
        file.write_text(json.dumps({"message": {"message": message, "extraInfo": {"timestamp": when}}}))
    return ProcessFailure(rank, 1000 + rank, exit_code, str(file))


def reason(*failures: ProcessFailure) -> str:
    return first_failure(ChildFailedError("train", {f.local_rank: f for f in failures}))["reason"]


def test_a_users_error_is_told_as_it_is(tmp_path: Path) -> None:
    lost = failure(tmp_path, 0, 1, "RuntimeError: Connection closed by peer", seconds_ago=5)
    mistake = failure(tmp_path, 1, 2, "UserError: data: expected pictures;\nadd some")
    assert reason(lost, mistake) == "data: expected pictures; add some"


def test_a_killed_process_comes_before_those_that_lost_it(tmp_path: Path) -> None:
    lost = failure(tmp_path, 0, 1, "RuntimeError: Connection closed by peer", seconds_ago=5)
    killed = failure(tmp_path, 1, -signal.SIGKILL)
    assert reason(lost, killed) == "process 1 was killed by SIGKILL (out of memory?)"


def test_an_exception_comes_before_a_process_that_the_agent_ended(tmp_path: Path) -> None:
    ended = failure(tmp_path, 0, -signal.SIGTERM)
    raised = failure(tmp_path, 1, 1, "ValueError: wrong shape")
    assert reason(ended, raised) == "process 1: ValueError: wrong shape"


def test_a_stop_on_request_is_no_failure_of_a_process(tmp_path: Path) -> None:
    assert reason(failure(tmp_path, 0, STOPPED_EXIT_CODE)) == "stopped from outside by a signal"
    assert reason(failure(tmp_path, 1, 134)) == "process 1 ended with exit code 134 and without a reason"
