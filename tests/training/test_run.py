"""A whole training in this process: its results, and what stops it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from esvit_core.config import Config
from esvit_core.errors import UserError
from esvit_core.launch.launcher import launch_training
from esvit_core.launch.signals import STOPPED_EXIT_CODE, StopRequest
from esvit_core.models.multicrop import build_network
from esvit_core.runs.log import read_log
from esvit_core.runs.run import open_run
from esvit_core.runs.training_summary import read_summary
from esvit_core.training.distributed.processes import World
from esvit_core.training.loop import training_step
from esvit_core.training.main import run_training
from esvit_core.training.state import apply_activation_checkpointing_, build_train_state
from esvit_core.training.step_timer import PARTS

pytestmark = pytest.mark.usefixtures("torch_settings")


def train(run: Any, stop: StopRequest | None = None) -> int:
    return run_training(run.uri, stop or StopRequest())


def test_a_finished_run_has_everything_and_is_found_again(
    micro_run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = micro_run("finished")
    assert train(run) == 0
    output = capsys.readouterr().out
    assert output.splitlines()[-1].endswith(f"the backbone is at {run.uri}/backbone")
    summary = read_summary(run.store, run.uri)
    assert summary is not None
    assert (summary.steps, summary.epochs, summary.images, summary.resumes) == (12, 3, 192, [])
    assert summary.backbone == f"{run.uri}/backbone"
    json.dumps(summary.as_json(), allow_nan=False)

    lines = read_log(run.store, run.uri)
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert {
        "loss",
        "loss_view",
        "loss_region",
        "lr",
        "weight_decay",
        "teacher_temp",
        "teacher_momentum",
        "grad_norm",
    } <= set(lines[0])
    assert {
        "images_per_second",
        "data_wait",
        "feature_std",
        "feature_rank",
        "mutual_matches",
        "time",
    } <= set(lines[0])
    figures = ("entropy", "kl", "student_kl", "prototypes", "center_norm")
    assert {f"{figure}_{task}" for figure in figures for task in ("view", "region")} <= set(lines[0])
    assert lines[-1]["loss"] == pytest.approx((lines[-1]["loss_view"] + lines[-1]["loss_region"]) / 2, rel=1e-4)

    baseline, trained = (run.store.get_json(f"{run.uri}/{which}/backbone.json") for which in ("baseline", "backbone"))
    assert (baseline["step"], trained["step"]) == (0, 12)
    assert baseline["weights"]["sha256"] != trained["weights"]["sha256"]

    before = {stat.uri: stat.etag for stat in run.store.list(run.uri)}
    assert not [uri for uri in before if "tmp" in uri]
    assert train(run) == 0
    assert launch_training(run.uri, run.config) == summary
    assert {stat.uri: stat.etag for stat in run.store.list(run.uri)} == before


def test_profiling_and_activation_checkpointing_change_no_number(
    micro_run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = micro_run("profiled", launch={"profile_steps": 2, "activation_checkpointing": True}, training={"epochs": 2})
    assert train(run) == 0
    assert f"{run.uri}/profile" in capsys.readouterr().out
    summary = run.store.get_json(f"{run.uri}/profile/summary.json")
    assert summary["steps"] == 2
    assert set(summary["seconds_a_step"]) == set(PARTS)
    assert all(seconds > 0 for seconds in summary["seconds_a_step"].values())
    assert any("mm" in operator["name"] for operator in summary["operators"])
    trace = json.loads(gzip.decompress(run.store.get_bytes(f"{run.uri}/profile/trace.json.gz")))
    assert any("addmm" in event.get("name", "") for event in trace["traceEvents"])
    plain = micro_run("plain", training={"epochs": 2})
    assert train(plain) == 0
    assert "profile" not in capsys.readouterr().out
    weights = [run.store.get_json(f"{uri}/backbone/backbone.json")["weights"] for uri in (run.uri, plain.uri)]
    assert weights[0]["sha256"] == weights[1]["sha256"]


def test_batch_norms_are_not_computed_twice() -> None:
    config = Config.from_mapping({"model": {"arch": "cvt_tiny"}, "head": {"out_dim": 8, "hidden_dim": 8}})
    with pytest.raises(UserError, match=r"launch.activation_checkpointing: cvt_tiny has batch norms"):
        apply_activation_checkpointing_(build_network(config), "cvt_tiny")


OPTIONS: dict[str, dict[str, Any]] = {
    "view+region": {},
    "view, mixup, batch norm, LARS": {
        "objective": {"region": False},
        "mixup": {"use": True, "crops": 3},
        "head": {"batch_norm": True},
        "optimizer": {"name": "lars", "lr": 1.0},
    },
    "view+region, deit, two local sizes, SGD": {
        "augment": {"policy": "deit", "local_crops": [{"size": 8, "number": 1}, {"size": 12, "number": 2}]},
        "optimizer": {"name": "sgd", "lr": 0.1},
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_stopped_run_resumes_bitwise(
    micro_run: Callable[..., Any], stop_after: Callable[[int], StopRequest], options: dict[str, dict[str, Any]]
) -> None:
    whole = micro_run("whole", **options)
    assert train(whole) == 0
    stopped = micro_run("stopped", **options)
    assert train(stopped, stop_after(6)) == STOPPED_EXIT_CODE
    assert stopped.checkpointed_step() == 7
    assert read_summary(stopped.store, stopped.uri) is None
    assert train(stopped) == 0
    assert stopped.weights() == whole.weights()
    summary = read_summary(stopped.store, stopped.uri)
    assert summary is not None and summary.resumes == [7] and summary.images == 192


def test_a_run_killed_between_its_last_step_and_its_summary_finishes(micro_run: Callable[..., Any]) -> None:
    run = micro_run("late")
    assert train(run) == 0
    weights, summary = run.weights(), read_summary(run.store, run.uri)
    run.store.remove(f"{run.uri}/training/summary.json")
    run.store.remove_prefix(f"{run.uri}/backbone")
    assert train(run) == 0
    again = read_summary(run.store, run.uri)
    assert run.weights() == weights
    assert summary is not None and again is not None and again.final_loss == pytest.approx(summary.final_loss, rel=1e-5)


def test_checkpoints_are_also_written_by_the_clock(micro_run: Callable[..., Any]) -> None:
    run = micro_run("clock", training={"checkpoint_steps": 1000, "checkpoint_minutes": 1e-6, "keep_checkpoints": 20})
    assert train(run) == 0
    root = f"{run.uri}/training/checkpoints/"
    steps = {int(s.uri.removeprefix(root)[:8]) for s in run.store.list(root)}
    assert len(steps) > 2 and max(steps) == 12  # one that the store has no time for gives way to the next


def test_a_collapsed_teacher_warns_once_then_stops_the_run_by_name(
    micro_run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = micro_run(
        "collapsing",
        objective={"teacher_temp": 1e4, "warmup_teacher_temp": 1e4},
        training={"collapse_patience": 6},
        diagnostics={"warn_after": 2},
    )
    with pytest.raises(UserError) as raised:
        train(run)
    assert "the teacher has collapsed: the uniform distribution for every image from step 2 to 8" in str(raised.value)
    assert "lower objective.teacher_temp" in str(raised.value)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("train: warning: ")]
    assert [line.partition(" from ")[0] for line in warnings] == [
        "train: warning: the uniform distribution for every image",
        "train: warning: the uniform distribution for every region",
    ]
    lines = {line["step"]: line for line in read_log(run.store, run.uri)}  # the curve that shows it
    assert [step for step, line in lines.items() if "warn" in line] == [4]
    assert [f"train: warning: {text}" for text in lines[4]["warn"]] == warnings
    assert [step for step, line in lines.items() if "stop" in line] == [8]


def test_diagnostics_do_not_change_the_training(micro_run: Callable[..., Any]) -> None:
    often, seldom = micro_run("often"), micro_run("seldom", diagnostics={"steps": 1000})
    assert train(often) == train(seldom) == 0
    measured = [[line["step"] for line in read_log(run.store, run.uri) if "kl_view" in line] for run in (often, seldom)]
    assert measured == [[2, 4, 6, 8, 10, 12], [12]]  # and the last step always
    assert often.weights() == seldom.weights()


def test_a_nonfinite_state_never_becomes_a_checkpoint(micro_run: Callable[..., Any]) -> None:
    run = micro_run(
        "poisoned",
        optimizer={"lr": 1e30, "warmup_epochs": 0, "clip_grad": 0},
        training={"checkpoint_steps": 1, "log_steps": 12},
    )
    with pytest.raises(UserError, match="not finite"):
        train(run)
    assert run.checkpointed_step() < 2


def test_too_few_images_for_a_batch(micro_run: Callable[..., Any]) -> None:
    run = micro_run("few", training={"batch_size": 128})
    with pytest.raises(UserError, match="64 training images, expected at least one batch of 128"):
        train(run)


def test_a_metrics_port_in_use(micro_run: Callable[..., Any]) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        run = micro_run("port", training={"metrics_port": taken.getsockname()[1]})
        with pytest.raises(UserError, match=r"training\.metrics_port"):
            train(run)


def test_a_run_that_does_not_exist(store_env: Any) -> None:
    with pytest.raises(UserError, match="no such run"):
        run_training(store_env.uri("runs/none"), StopRequest())


def test_a_vision_longformer_ends_its_random_neighbours(micro_run: Callable[..., Any]) -> None:
    stages = "l1,h2,d8,n1,s1,g1,p2,f2,a0_l2,h2,d16,n1,s0,g0,p2,f2,a0"
    sizes = dict.fromkeys(("patch_size", "embed_dim", "depths", "num_heads", "window_size"))
    run = micro_run("vil", model={**sizes, "arch": "vil", "stages": stages, "mode_switch": 0.6})
    state = build_train_state(open_run(run.uri, run.store), World(0, 1, torch.device("cpu"), None))
    modes = []
    for batch in state.batches():
        training_step(state, batch, state.schedules.at(state.progress.step))
        state.progress.step += 1
        modes.append([network.backbone.layer1[1].attn.mode for network in (state.student, state.teacher)])
    assert modes == [[1, 1]] * 8 + [[0, 0]] * 4  # the third epoch of three
