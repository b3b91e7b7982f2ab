"""A run whose number of processes changes sees the same samples, batches and schedules."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import TRAINING, Forked

from esvit_core.runs.log import read_log
from esvit_core.training.sample_trace import TRACE_VARIABLE, samples_that_count

# One of three processes, which form one world after the other; each stops after so many steps, None: at the end.
PROGRAM = """
import os, sys
from esvit_core.training.main import run_training
from esvit_core.launch.signals import StopRequest

run, me, rendezvous = sys.argv[1], int(sys.argv[2]), sys.argv[3]

class StopAfter(StopRequest):
    def __init__(self, steps):
        super().__init__()
        self.steps = steps

    @property
    def requested(self):
        self.steps -= 1
        return self.steps == 0

codes = []
for number, (world, steps) in enumerate([(2, 2), (1, 2), (3, 2), (2, None)]):
    if me < world:
        os.environ |= {"RANK": str(me), "WORLD_SIZE": str(world), "TORCHELASTIC_RESTART_COUNT": str(number)}
        codes.append(run_training(run, StopAfter(steps or -1)))
    else:  # wait for the others
        while not os.path.exists(f"{rendezvous}/done-{number}"):
            import time; time.sleep(0.05)
    if me == 0:
        open(f"{rendezvous}/done-{number}", "w").close()
print(codes)
"""


@pytest.mark.timeout(900)
def test_worlds_of_2_1_3_and_2_in_one_epoch_see_every_sample_once(
    micro_run: Callable[..., Any], tmp_path: Path
) -> None:
    settings = {"epochs": 1, "batch_size": 8, "log_steps": 1, "precision": "float32"}
    plain = {"model": {"drop_path": 0.0}, "optimizer": {"warmup_epochs": 0}}
    elastic = micro_run("elastic", training=settings | {"max_images_per_process": 3}, **plain)
    environment = os.environ | {
        TRACE_VARIABLE: str(tmp_path / "trace"),
        "ESVIT_RENDEZVOUS_DIR": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    processes = [Forked(PROGRAM, elastic.uri, str(me), str(tmp_path), environment=environment) for me in range(3)]
    outputs = [process.communicate(timeout=800)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert [output.splitlines()[-1] for output in outputs] == ["[75, 75, 75, 0]", "[75, 75, 0]", "[75]"]

    steps = samples_that_count(tmp_path / "trace")
    assert sorted(steps) == list(range(1, 9))
    assert [len(seen) for seen in steps.values()] == [8] * 8
    assert Counter(n for seen in steps.values() for n in seen) == Counter(range(64))
    assert elastic.store.get_json(f"{elastic.uri}/training/summary.json")["resumes"] == [2, 4, 6]

    alone = micro_run("alone", training=settings | {"processes": 1}, **plain)
    environment[TRACE_VARIABLE] = str(tmp_path / "trace-alone")
    assert Forked(TRAINING, "--run", alone.uri, environment=environment).wait(timeout=800) == 0
    assert samples_that_count(tmp_path / "trace-alone") == steps
    there, here = read_log(elastic.store, elastic.uri), read_log(alone.store, alone.uri)
    for key in ("step", "epoch", "lr", "weight_decay", "teacher_temp", "teacher_momentum"):
        assert [line[key] for line in there] == [line[key] for line in here]
    for key in ("loss", "loss_view", "loss_region"):  # of the global batch, but for rounding
        assert [line[key] for line in there] == pytest.approx([line[key] for line in here], rel=1e-3)
    norms = [[line["grad_norm"] for line in lines] for lines in (there, here)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)
