"""Checkpoints of the published code are read and written bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from esvit_core.errors import UserError
from esvit_core.losses.objective import Objective
from esvit_core.models.multicrop import build_network
from esvit_core.training.optim.optimizer import build_optimizer
from esvit_core.weights.esvit_checkpoint import read_published_checkpoint, write_published_checkpoint
from esvit_core.weights.fit import fit_weights
from esvit_core.weights.optimizer_state import optimized_names, renumber_state
from esvit_core.weights.snapshot import part_of

ONLY_ARCH = {"patch_size": None, "embed_dim": None, "depths": None, "num_heads": None, "window_size": None}


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal to the last bit, keys in the same order."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}.{i}")
    else:
        assert a == b, where


def through_a_run(path: Path, config: Any, network: Any = build_network) -> dict[str, Any]:
    """Load a file into the parts of a training, and return their states."""
    snapshot = read_published_checkpoint(path)
    networks = {"student": network(config), "teacher": network(config)}
    assert snapshot.student is not None and snapshot.optimizer is not None
    for name, weights in (("student", snapshot.student), ("teacher", snapshot.teacher)):
        networks[name].load_state_dict(fit_weights(networks[name], weights, str(path), "the network"))
    optimizer = build_optimizer(networks["student"], config)
    there = optimized_names(snapshot.student, networks["student"])
    here = optimized_names(networks["student"].state_dict(), networks["student"])
    optimizer.load_state_dict(renumber_state(snapshot.optimizer, there, here))
    objective = Objective(config.objective, config.head.out_dim)
    objective.load_state_dict(snapshot.centers)
    stateful = {**networks, "optimizer": optimizer, "objective": objective}
    return {name: thing.state_dict() for name, thing in stateful.items()}


@pytest.mark.parametrize("arch", ["swin", "deit_tiny", "resnet50", "cvt_tiny", "vil_2262"])
@pytest.mark.parametrize("region", [True, False], ids=["region", "view"])
def test_the_round_trip_is_bitwise(arch, region, settings, network, published_file, tmp_path):
    model = {} if arch == "swin" else {"arch": arch, **ONLY_ARCH}
    config = settings(model=model, objective={"region": region})
    path = published_file(config)
    states = through_a_run(path, config, network)
    again = tmp_path / "again.pth"
    write_published_checkpoint(again, states, config, epoch=2, scaler=read_published_checkpoint(path).scaler)
    before, after = (torch.load(p, weights_only=False) for p in (path, again))
    for entry in ("student", "teacher", "dino_loss", "epoch", "fp16_scaler"):
        assert_same(before[entry], after[entry], entry)
    assert_same(before["optimizer"]["state"], after["optimizer"]["state"], "optimizer")
    for group, same in zip(before["optimizer"]["param_groups"], after["optimizer"]["param_groups"], strict=True):
        assert all(same[key] == group[key] for key in ("params", "lr", "weight_decay", "betas", "eps"))
    assert after["args"].arch == {"swin": "swin"}.get(arch, arch) and after["args"].use_dense_prediction is region


def test_frozen_prototypes_without_optimizer_state_stay_without(settings, published_file):
    config = settings()
    states = through_a_run(published_file(config, freeze=True), config)
    student = build_network(config)
    names = [name for group in optimized_names(student.state_dict(), student) for name in group]
    without = {names[number] for number in range(len(names)) if number not in states["optimizer"]["state"]}
    assert without == {name for name in names if "last_layer" in name}


def test_our_groups_number_the_parameters_as_named(settings):
    student = build_network(settings())
    parameters = dict(student.named_parameters())
    names = optimized_names(student.state_dict(), student)
    groups = build_optimizer(student, settings()).param_groups
    assert [[id(parameters[name]) for name in group] for group in names] == [
        [id(p) for p in group["params"]] for group in groups
    ]


def test_state_of_parameters_in_another_order_finds_its_parameter(settings, published_file):
    config = settings()
    snapshot = read_published_checkpoint(published_file(config))
    student = build_network(config)
    here = optimized_names(student.state_dict(), student)
    there = [list(reversed(group)) for group in here]
    turned = renumber_state(snapshot.optimizer, there, here)
    number = {name: i for i, name in enumerate(name for group in here for name in group)}
    was = {name: i for i, name in enumerate(name for group in there for name in group)}
    for name, i in number.items():
        assert turned["state"][i] == snapshot.optimizer["state"][was[name]]


def test_state_of_other_parameters_is_rejected(settings, published_file):
    snapshot = read_published_checkpoint(published_file(settings(objective={"region": False})))
    student = build_network(settings())
    here = optimized_names(student.state_dict(), student)
    there = optimized_names(snapshot.student, student)
    assert renumber_state(snapshot.optimizer, there, here) is None


def test_numpys_numbers_and_the_command_line_are_read(settings, published_file):
    snapshot = read_published_checkpoint(published_file(settings()))
    assert snapshot.optimizer["param_groups"][0]["lr"] == 5e-4 / 3
    assert snapshot.arguments["arch"] == "swin_tiny" and snapshot.arguments["local_crops_number"] == (8,)
    assert snapshot.epoch == 2 and snapshot.scaler["scale"] == 65536.0


@pytest.mark.parametrize("where", ["teacher", "model", "state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone.backbone."])
def test_a_file_with_one_network_is_read(where, prefix, settings, tmp_path):
    network = build_network(settings())
    state = {f"{prefix}{name}": value for name, value in network.backbone.state_dict().items()}
    torch.save({where: state} if where else state, tmp_path / "one.pth")
    snapshot = read_published_checkpoint(tmp_path / "one.pth")
    assert_same(part_of(snapshot.teacher, "backbone"), dict(network.backbone.state_dict()))
    assert snapshot.student is None and snapshot.optimizer is None


def test_a_file_with_only_a_student_also_serves_as_teacher(settings, published_file):
    snapshot = read_published_checkpoint(published_file(settings(), teacher=None))
    assert snapshot.teacher is snapshot.student


def test_classifiers_and_other_entries_are_ignored_and_listed(settings, published_file):
    state = dict(build_network(settings()).backbone.state_dict())
    state |= {"head.weight": torch.zeros(3, 4), "module.linear.bias": torch.zeros(3)}
    snapshot = read_published_checkpoint(published_file(settings(), teacher=state, best_acc=77.0))
    assert snapshot.ignored == ("head.weight", "linear.bias", "best_acc")


def test_a_file_with_only_a_linear_probe_is_refused(tmp_path):
    probe = {"module.linear.weight": torch.zeros(3, 4), "module.linear.bias": torch.zeros(3)}
    torch.save({"epoch": 99, "state_dict": probe, "optimizer": {}, "best_acc": 77.0}, tmp_path / "linear.pth")
    with pytest.raises(UserError, match="state_dict contains only a classifier"):
        read_published_checkpoint(tmp_path / "linear.pth")


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ([1, 2], "it contains a list"),
        (torch.zeros(3), "it contains a Tensor"),
        ({"teacher": 3}, "teacher is not the state of a network"),
        ({"epoch": 3, "figures": "x"}, "epoch, figures are not tensors"),
        ({"teacher": {"a": torch.zeros(2).to_sparse()}}, "teacher is not the state of a network"),
        ({"teacher": {"a": torch.zeros(1)}, "dino_loss": {"center": 3}}, "dino_loss contains"),
    ],
)
def test_a_file_that_is_not_a_checkpoint_is_reported(payload, message, tmp_path):
    torch.save(payload, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=message):
        read_published_checkpoint(tmp_path / "odd.pth")


def test_an_unwritable_path_is_named(settings, published_file, tmp_path):
    states = through_a_run(published_file(settings()), settings())
    with pytest.raises(UserError, match=r"nowhere.*cannot be written"):
        write_published_checkpoint(tmp_path / "nowhere" / "a.pth", states, settings(), epoch=1)
