"""Small objects are saved at once when a training is asked to stop during a long step."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from forked import TRAINING, Forked

from esvit_core.runs.events import read_events
from esvit_core.runs.log import read_log
from esvit_core.training.checkpoint_interval import LOST_SECONDS_VARIABLE

PROGRAM = """
import sys, time
from esvit_core.runs import log
from esvit_core.training import loop

log.MIN_CHUNK_SECONDS = 3600  # lines are collected
step = loop.training_step

def slow(state, batch, at):
    if state.progress.step == 6:
        print("in the long step", flush=True)
        time.sleep(3600)
    return step(state, batch, at)

loop.training_step = slow
"""


@pytest.mark.parametrize("in_a_pod", [True, False])
def test_the_log_is_uploaded_while_the_step_still_computes(micro_run: Callable[..., Any], in_a_pod: bool) -> None:
    run = micro_run("long-step", training={"log_steps": 1, "checkpoint_steps": 1000})
    environment = os.environ | {"ESVIT_GRACE_SECONDS": "600"} | ({LOST_SECONDS_VARIABLE: "36000"} if in_a_pod else {})
    process = Forked(PROGRAM + TRAINING, "--run", run.uri, environment=environment)
    run.launched.append(process)
    next(line for line in process.stdout if "in the long step" in line)
    assert len(read_log(run.store, run.uri)) < 6
    process.terminate()
    run.wait_until(lambda: len(read_log(run.store, run.uri)) == 6, "the log")
    if in_a_pod:  # which does not live long enough for more
        run.wait_until(lambda: [e.kind for e in read_events(run.store, run.uri)] == ["started", "stopped"], "the entry")
        assert read_events(run.store, run.uri)[-1].step == 6
    assert process.poll() is None, "it still computes"
