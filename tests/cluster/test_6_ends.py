"""Runs that the tests before disturbed, and left to go on, succeed."""

from __future__ import annotations

import pytest
from evidence import Saw
from runs import Runs


def test_disturbed_runs_succeed(unfinished: dict[str, str], runs: Runs, saw: Saw) -> None:
    """A run whose pods were killed succeeds."""
    if not unfinished:
        pytest.skip("no test before has left a run")
    for what, run_id in unfinished.items():
        runs.wait(run_id)
        saw(f"{what}: SUCCEEDED")
