"""Runs that start from another run, a published checkpoint, or weights of timm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from esvit_core.config import Config
from esvit_core.errors import UserError
from esvit_core.launch.signals import STOPPED_EXIT_CODE, StopRequest
from esvit_core.runs.log import read_log
from esvit_core.runs.run import INITIAL, open_run, run_id, start_run
from esvit_core.storage.upload_queue import UploadQueue
from esvit_core.training.checkpoint import Checkpointer
from esvit_core.training.distributed.processes import init_world
from esvit_core.training.initial_weights import initial_states
from esvit_core.training.main import run_training
from esvit_core.training.state import TrainState, build_train_state
from esvit_core.weights.backbone import load_backbone, save_backbone
from esvit_core.weights.esvit_checkpoint import write_published_checkpoint
from esvit_core.weights.timm_names import to_timm
from esvit_core.weights.weight_source import pin_source

pytestmark = pytest.mark.usefixtures("torch_settings")


@pytest.fixture
def source(micro_run: Callable[..., Any]) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """``source("name", **sections)``: a run with a checkpoint of step 6, in which nothing is as drawn; its states."""

    def make(name: str, **sections: Any) -> tuple[Any, dict[str, Any]]:
        run = micro_run(name, **sections)
        state = build_train_state(open_run(run.uri), init_world())
        generator = torch.Generator().manual_seed(1)
        for thing in (state.student, state.teacher, state.objective):
            for value in thing.state_dict().values():
                if value.is_floating_point():
                    value.add_(torch.randn(value.shape, generator=generator))
        for parameter in state.student.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        state.optimizer.step()
        state.progress.step, state.progress.images = 6, 96
        checkpoints = Checkpointer(UploadQueue(run.store, run.uri))
        checkpoints.save(6, state.stateful)
        checkpoints.wait()
        return run, {name: thing.state_dict() for name, thing in state.stateful.items()}

    return make


def started(micro_run: Callable[..., Any], name: str, **sections: Any) -> tuple[Any, TrainState, dict[str, Any]]:
    """A run before its first step, its state, and the states that it starts from."""
    made = micro_run(name, **sections)
    run = open_run(made.uri)
    state = build_train_state(run, init_world())
    states = initial_states(run, state)
    assert states is not None
    state.load(states)
    return run, state, states


def published(run: Any, states: dict[str, Any], path: Path, epoch: int = 1) -> Path:
    write_published_checkpoint(path, states, run.config, epoch)
    return path


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], part: str = "") -> bool:
    names = [name for name in a if name.startswith(part)]
    return bool(names) and all(torch.equal(a[name], b[name]) for name in names)


def test_a_run_continues_from_everything_of_another_run(micro_run, source, capsys):
    run, there = source("a")
    new, state, _ = started(micro_run, "b", init={"source": run.uri, "load": "all"}, training={"epochs": 4})
    for name in ("student", "teacher", "objective"):
        assert same(getattr(state, name).state_dict(), there[name])
    own = state.optimizer.state_dict()
    assert own["state"].keys() == there["optimizer"]["state"].keys()
    assert all(same(own["state"][i], there["optimizer"]["state"][i]) for i in own["state"])
    assert (state.progress.step, state.progress.images) == (there["progress"]["step"], there["progress"]["images"])
    message = capsys.readouterr().out
    assert f"starting from {run.uri}" in message and "the optimizer, the progress, epoch 1.5 of 4" in message
    assert new.store.get_json(new.at(INITIAL))["step"] == 6


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_a_run_continues_from_a_published_checkpoint_at_its_epoch(optimizer, micro_run, source, tmp_path):
    run, there = source("a", optimizer={"name": optimizer})
    path = published(run, there, tmp_path / "checkpoint.pth", epoch=2)
    _, state, _ = started(micro_run, "b", init={"source": str(path), "load": "all"}, optimizer={"name": optimizer})
    assert same(state.student.state_dict(), there["student"]) and same(state.teacher.state_dict(), there["teacher"])
    assert same(state.objective.state_dict(), there["objective"])
    own, other = state.optimizer.state_dict()["state"], there["optimizer"]["state"]
    assert own.keys() == other.keys() and all(same(own[i], other[i]) for i in own)
    assert state.progress.step == 2 * state.schedules.steps_per_epoch


@pytest.mark.timeout(300)
def test_two_processes_start_from_the_same_as_one(micro_run, source, tmp_path):
    run, _ = source("a", model={"drop_path": 0.0})
    losses = []
    for processes in (1, 2):
        new = micro_run(
            f"with-{processes}",
            init={"source": run.uri, "load": "all"},
            model={"drop_path": 0.0},
            training={"precision": "float32", "log_steps": 1, "processes": processes},
        )
        messages = new.train(tmp_path)
        assert [message.count(f"starting from {run.uri}") for message in messages] == [1, 0][:processes]
        log = read_log(new.store, new.uri)
        assert [line["step"] for line in log] == list(range(7, 13))  # from where the source was
        losses.append([line["loss"] for line in log])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_view_only_checkpoint_gets_a_region_head_as_published(micro_run, source, tmp_path, capsys):
    """main_esvit.py loads without strictness: head_dense as drawn, center_grid zero, the optimizer anew, the epoch kept."""
    run, there = source("a", objective={"region": False})
    path = published(run, there, tmp_path / "view.pth", epoch=1)
    _, state, _ = started(micro_run, "b", init={"source": str(path), "load": "all"})
    student, teacher = state.student.state_dict(), state.teacher.state_dict()
    assert same(there["student"], student) and same(there["teacher"], teacher)
    assert same(student, teacher, "head_dense.")
    assert same(there["objective"], state.objective.state_dict())
    assert not state.objective.state_dict()["center_region.value"].any()
    assert not state.optimizer.state_dict()["state"]
    assert state.progress.step == state.schedules.steps_per_epoch
    assert "newly initialized: the region head, the optimizer" in capsys.readouterr().out


def test_the_backbone_alone_goes_into_student_and_teacher(micro_run, source):
    run, there = source("a")
    fresh, _, _ = started(micro_run, "fresh", init={"source": run.uri})
    _, state, _ = started(micro_run, "b", init={"source": run.uri, "load": "backbone"})
    student, teacher = state.student.state_dict(), state.teacher.state_dict()
    assert same(there["teacher"], student, "backbone.") and same(there["teacher"], teacher, "backbone.")
    assert not same(there["student"], student, "backbone.") and not same(
        there["student"], student, "head.last_layer.weight_v"
    )
    assert state.progress.step == 0 and not state.optimizer.state_dict()["state"]
    assert fresh.store.get_json(fresh.at(INITIAL))["initialized"] == ["the heads"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_timms_weights_start_both_networks(suffix, micro_run, source, tmp_path):
    _, there = source("a")
    ours = {n.removeprefix("backbone."): v for n, v in there["teacher"].items() if n.startswith("backbone.")}
    weights = {**to_timm("swin", ours), "head.fc.weight": torch.zeros(5, 32), "head.fc.bias": torch.zeros(5)}
    path = tmp_path / f"timm{suffix}"
    (safetensors.torch.save_file if suffix == ".safetensors" else torch.save)(weights, path)
    _, state, _ = started(micro_run, "b", init={"source": str(path)})
    assert same(there["teacher"], state.student.state_dict(), "backbone.")
    assert same(there["teacher"], state.teacher.state_dict(), "backbone.")


def test_weights_that_do_not_fit_are_listed_in_one_error(micro_run, source, tmp_path):
    run, there = source("a")
    path = published(run, there, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError) as caught:
        started(
            micro_run,
            "b",
            init={"source": str(path), "load": "heads"},
            model={"depths": (2, 1)},
            head={"out_dim": 32},
        )
    message = str(caught.value)
    assert "missing: backbone.layers.0.blocks.1.* (13)" in message
    assert (
        "head.last_layer.weight_v 64x16 in the file, 32x16 in the network" in message and "head.out_dim 32" in message
    )
    with pytest.raises(UserError, match=r"unexpected: .*backbone\.layers\.1\.blocks\.0\.\*"):
        started(micro_run, "c", init={"source": str(path)}, model={"depths": (1,), "num_heads": (1,)})


def test_a_source_without_heads_or_beyond_the_last_epoch_is_refused(micro_run, source, tmp_path):
    run, there = source("a")
    backbone = {n.removeprefix("backbone."): v for n, v in there["teacher"].items() if n.startswith("backbone.")}
    torch.save(backbone, tmp_path / "backbone.pth")
    with pytest.raises(UserError, match="it has no heads; set init"):
        started(micro_run, "b", init={"source": str(tmp_path / "backbone.pth"), "load": "heads"})
    path = published(run, there, tmp_path / "late.pth", epoch=3)
    with pytest.raises(UserError, match="trained for 3 epochs, the run has 3; raise"):
        started(micro_run, "c", init={"source": str(path), "load": "all"})


def test_a_runs_own_checkpoint_precedes_its_source(micro_run, source, stop_after, tmp_path):
    run, there = source("a")
    path = published(run, there, tmp_path / "checkpoint.pth")
    made = micro_run("b", init={"source": str(path), "load": "all"})
    assert run_training(made.uri, stop_after(3)) == STOPPED_EXIT_CODE
    path.unlink()
    assert run_training(made.uri, StopRequest()) == 0
    baseline = load_backbone(f"{made.uri}/baseline", made.store)
    assert same(baseline.state_dict(), {n.removeprefix("backbone."): v for n, v in there["teacher"].items()})


@pytest.mark.parametrize(("epochs", "changes"), [(1, False), (2, True)])
def test_the_heads_are_trained_alone_first(epochs, changes, micro_run, source, stop_after):
    run, there = source("a")
    protected = {"layer_decay": 0.5, "freeze_backbone_epochs": 1, "warmup_epochs": 0}
    made = micro_run("b", init={"source": run.uri}, optimizer=protected, training={"epochs": epochs})
    assert run_training(made.uri, stop_after(2)) == STOPPED_EXIT_CODE
    assert run_training(made.uri, StopRequest()) == 0  # the groups of layer decay are in the checkpoint
    trained = load_backbone(f"{made.uri}/backbone", made.store).state_dict()
    before = {n.removeprefix("backbone."): v for n, v in there["teacher"].items() if n.startswith("backbone.")}
    assert same(trained, before) is not changes


def test_the_same_weights_elsewhere_make_the_same_run(store_env, images, tmp_path):
    weights = tmp_path / "a.pth"
    torch.save({"a": torch.zeros(1)}, weights)
    values = {"bucket": store_env.bucket, "init": {"source": str(weights)}}
    config = pin_source(Config.from_mapping(values), store_env)
    assert config.init.source == str(weights) and config.init.sha256
    moved = weights.rename(tmp_path / "b.pth")
    there = pin_source(Config.from_mapping({**values, "init": {"source": str(moved)}}), store_env)
    assert run_id(there, "x") == run_id(config, "x")
    torch.save({"a": torch.ones(1)}, moved)
    other = pin_source(Config.from_mapping({**values, "init": {"source": str(moved)}}), store_env)
    assert run_id(other, "x") != run_id(config, "x")
    with pytest.raises(UserError, match="has changed since the run was started"):
        pin_source(there, store_env)


def test_a_pointer_is_followed_when_the_run_is_started(store_env, images, micro_run):
    run = micro_run("a")
    state = build_train_state(open_run(run.uri), init_world())
    save_backbone(store_env, f"{run.uri}/backbone", state.teacher.backbone, run.config)
    store_env.swap_pointer(store_env.uri("pointers/champion"), {"backbone": f"{run.uri}/backbone"}, None)
    asked = Config.from_mapping({**run.config.model_dump(mode="json"), "init": {"source": "champion"}})
    new = start_run(asked, str(images), store_env.uri("runs/b"), store_env)
    assert new.config.init.source == f"{run.uri}/backbone" and new.config.init.sha256
    assert start_run(asked, str(images), new.uri, store_env).config == new.config


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.pth", "no such file or folder; expected a pointer such as champion"),
        ("nobody", "no such file, and no pointer"),
        ("s3://{bucket}/runs/none", "neither a run with a complete checkpoint nor a published backbone"),
        ("s3://{bucket}/none.pth", "there is no such object"),
        ("timm:no_such_network", "timm has no such network"),
    ],
)
def test_a_missing_source_is_reported(source, message, micro_run, store_env):
    with pytest.raises(UserError, match=message):
        run = micro_run("a", init={"source": source.format(bucket=store_env.bucket)})
        pin_source(run.config, store_env)
        started(micro_run, "b", init={"source": source})
