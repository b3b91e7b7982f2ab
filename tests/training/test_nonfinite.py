"""A step that is not finite is skipped, rolled back, or ends the run, as configured."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked

from esvit_core.runs.log import read_log
from esvit_core.runs.run import open_run
from esvit_core.training.distributed.processes import World
from esvit_core.training.loop import training_step
from esvit_core.training.state import build_train_state

pytestmark = pytest.mark.usefixtures("torch_settings")


@pytest.mark.parametrize("image", [0, 15], ids=["first micro-batch", "last"])
def test_a_skipped_step_changes_nothing_but_the_teacher(micro_run: Callable[..., Any], image: int) -> None:
    run = micro_run("skip-one", training={"on_nonfinite": "skip", "max_images_per_process": 8})
    state = build_train_state(open_run(run.uri), World(0, 1, torch.device("cpu"), None))
    batches = state.loader.epoch(1)
    training_step(state, next(batches), state.schedules.at(5))
    before = {name: copy.deepcopy(thing.state_dict()) for name, thing in state.stateful.items()}
    batch = next(batches)
    batch.crops[0][image] = torch.nan
    grad_norm = training_step(state, batch, state.schedules.at(6)).grad_norm
    assert not grad_norm.isfinite()
    for name in ("student", "objective"):
        for key, value in state.stateful[name].state_dict().items():
            assert torch.equal(value, before[name][key]), (name, key)
    moments = state.optimizer.state_dict()["state"]
    assert moments and all(
        torch.equal(value, before["optimizer"]["state"][number][key])
        for number, state in moments.items()
        for key, value in state.items()
    )
    assert all(p.isfinite().all() for p in state.teacher.parameters())
    training_step(state, next(batches), state.schedules.at(7))  # and the next one is an ordinary one
    weights = state.student.state_dict()
    assert any(not torch.equal(weights[key], value) for key, value in before["student"].items())


# Two processes; in one of them a step's crops are damaged, as by a flipped bit: once, or every time.
PROGRAM = """
import os, sys, json
import torch
from esvit_core.data.loading.loader import TrainLoader
from esvit_core.errors import UserError
from esvit_core.training.main import run_training
from esvit_core.launch.signals import StopRequest

uris, me = sys.argv[1:4], int(sys.argv[4])
whole, damaged = TrainLoader.epoch, set()

def epoch(self, number, start_step=0):
    for step, batch in enumerate(whole(self, number, start_step), number * 4 + start_step):
        if step in self.damaged_steps and me == 1 and not (self.once and step in damaged):
            damaged.add(step)
            batch.crops[1][3, 0, 0, 0] = torch.nan
        yield batch

TrainLoader.epoch = epoch
results = []
for attempt, (uri, steps, once) in enumerate(zip(uris, [{6}, {6}, {6, 7}], [False, True, False])):
    damaged.clear()
    TrainLoader.damaged_steps, TrainLoader.once = steps, once
    os.environ |= {"RANK": str(me), "WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": str(attempt)}
    try:
        results.append(run_training(uri, StopRequest()))
    except UserError as error:
        results.append(str(error))
print(json.dumps(results))
"""


@pytest.mark.timeout(900)
def test_two_processes_skip_roll_back_or_stop_together(micro_run: Callable[..., Any], tmp_path: Path) -> None:
    every_step = {"log_steps": 1, "checkpoint_steps": 4, "processes": 2}
    skipping = micro_run("skipping", training=every_step | {"on_nonfinite": "skip"})
    returning = micro_run("returning", training=every_step | {"on_nonfinite": "rollback"})
    limited = micro_run("limited", training=every_step | {"on_nonfinite": "skip", "nonfinite_limit": 1})
    environment = os.environ | {
        "ESVIT_RENDEZVOUS_DIR": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        Forked(PROGRAM, skipping.uri, returning.uri, limited.uri, str(me), environment=environment) for me in range(2)
    ]
    outputs = [process.communicate(timeout=800)[0] for process in processes]
    results = [json.loads(output.splitlines()[-1]) for output in outputs]
    assert results[0][:2] == results[1][:2] == [0, 0]

    (record,) = records(skipping)
    assert (record["step"], record["epoch"], record["action"], record["seed"]) == (7, 1, "skip", 0)
    assert [process["loss"] == "nan" for process in record["processes"]] == [False, True]
    assert {process["grad_norm"] for process in record["processes"]} == {"nan"}
    seen = [number for process in record["processes"] for number in process["indices"]]
    assert len(set(seen)) == 16
    assert [line["step"] for line in read_log(skipping.store, skipping.uri)] == list(range(1, 13))

    assert [r["action"] for r in records(returning)] == ["rollback"]
    assert returning.store.get_json(f"{returning.uri}/training/summary.json")["resumes"] == [4]
    rates = [
        [line["lr"] for line in read_log(run.store, run.uri)] for run in (skipping, returning)
    ]  # the schedule's, and from step 4 on half of it
    assert rates[1] == pytest.approx(rates[0][:4] + [lr / 2 for lr in rates[0][4:]], rel=1e-5)

    assert [r["action"] for r in records(limited)] == ["skip", "stop"]
    assert results[0][2].startswith("training: the norm of the gradient is nan at step 8, not finite, time 2 within")
    assert results[1][2].startswith("training: the loss is nan at step 8, not finite, time 2 within an epoch; ")
    assert limited.checkpointed_step() == 4


def records(run: Any) -> list[dict[str, Any]]:
    return [run.store.get_json(stat.uri) for stat in run.store.list(f"{run.uri}/training/nonfinite")]
