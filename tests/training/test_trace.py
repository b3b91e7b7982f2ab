"""The trace of samples when processes die: the proofs that no sample is lost or repeated depend on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from esvit_core.launch.signals import StopRequest
from esvit_core.training import loop
from esvit_core.training.main import run_training
from esvit_core.training.sample_trace import TRACE_VARIABLE, samples_that_count


@pytest.mark.usefixtures("torch_settings")
def test_the_trace_has_the_samples_of_a_process_that_dies_after_the_reduction(
    micro_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, steps = micro_run("dies"), iter(range(1, 9))

    def die_in_the_third(*_: Any) -> None:
        if next(steps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setenv(TRACE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(loop, "update_teacher_", die_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        run_training(run.uri, StopRequest())
    seen = samples_that_count(tmp_path)
    assert {step: len(set(samples)) for step, samples in seen.items()} == {1: 16, 2: 16, 3: 16}


def test_repeated_steps_replace_lost_steps_in_the_trace(tmp_path: Path) -> None:
    def attempt(number: int, *ranks: dict[int, list[int]]) -> None:
        for rank, steps in enumerate(ranks):
            lines = [
                json.dumps({"step": step, "rank": rank, "world": len(ranks), "indices": indices}) + "\n"
                for step, indices in steps.items()
            ]
            (tmp_path / f"{number:020d}-{rank}.jsonl").write_text("".join(lines), encoding="utf-8")

    attempt(1, {1: [0, 1], 2: [4, 5], 3: [8, 9]}, {1: [2, 3], 2: [6, 7]})  # the second died before the third step
    attempt(2, {})  # dies before its first step
    attempt(3, {3: [8, 9, 10, 11], 4: [12, 13, 14, 15]})
    assert samples_that_count(tmp_path) == {
        1: [0, 1, 2, 3],
        2: [4, 5, 6, 7],
        3: [8, 9, 10, 11],
        4: [12, 13, 14, 15],
    }
