"""When checkpoints are due: a step's pod loses at most a minute of training."""

from __future__ import annotations

import pytest

from esvit_core.training import checkpoint_interval as module
from esvit_core.training.checkpoint_interval import LOST_SECONDS_VARIABLE, CheckpointInterval

POD = {LOST_SECONDS_VARIABLE: "60"}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("minutes", "environment", "interval"),
    [("auto", {}, 900), (2.0, {}, 120), (2.0, POD, 120), ("auto", POD, 42)],  # of the first nothing is known yet
)
def test_a_setting_overrides_and_auto_depends_on_the_environment(minutes, environment, interval) -> None:
    assert CheckpointInterval(minutes, environment).seconds == interval


@pytest.mark.parametrize(
    ("takes", "interval"),
    [
        (4, 53),  # 53 s until it begins, and 4 s until it is complete: 57 s are lost, and 60 if it takes 3 s longer
        (28, 29),
        (40, 40),  # the store cannot keep up: one after the other
        (300, 60),
    ],
)
def test_the_interval_follows_the_time_of_a_checkpoint(takes: float, interval: float) -> None:
    pace = CheckpointInterval("auto", POD)
    pace.written(takes)
    assert pace.seconds == interval
    assert pace.longest == max(60, 2 * takes)


def test_long_steps_shorten_the_interval(clock: list[float]) -> None:
    pace = CheckpointInterval("auto", POD)
    pace.written(4)
    found = []
    for _ in range(8):
        found.append(pace.due())
        clock[0] += 7
    # It begins after 39 of the 60 seconds: two steps may pass until the state is copied, 4 s until it is sent, and 3 s more.
    assert found == [False] * 6 + [True] * 2
    pace.saved()
    assert not pace.due()


def test_rank_0_decides_for_all_processes(clock: list[float]) -> None:
    follower, leader = CheckpointInterval("auto", POD, is_main=False), CheckpointInterval("auto", POD)
    fixed = CheckpointInterval(0.5, POD, is_main=False)
    clock[0] += 100
    assert (follower.due(), leader.due(), fixed.due()) == (False, True, True)
