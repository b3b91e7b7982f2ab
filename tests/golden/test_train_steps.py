"""Three whole training steps against the published implementation."""

from __future__ import annotations

import numpy as np
import pytest

from esvit_core.config import Config
from esvit_core.losses import Objective
from esvit_core.training.optim.optimizer import (
    build_optimizer,
    clip_gradients_,
    freeze_last_layer_,
    set_hyperparameters_,
    update_teacher_,
)
from esvit_core.training.optim.schedules import Schedules
from esvit_core.weights.published_names import to_published

RELATIVE = 2e-4


def test_train_steps(golden, golden_file, record):
    expected = golden.arrays(golden_file)
    arch = golden_file.removeprefix("train_steps").removeprefix("_") or "swin_tiny_w7"
    config = Config.from_mapping(
        {
            "model": {"arch": arch, "drop_path": 0.0},
            "head": {"out_dim": golden.index["head_out_dim"]},
            "training": {"epochs": 20},
            "objective": {"warmup_teacher_temp_epochs": 10},
        }
    )
    student = golden.network(arch).train()
    teacher = golden.network(arch, seed_offset=100).train().requires_grad_(False)
    objective = Objective(config.objective, config.head.out_dim)
    schedules = Schedules(config, steps_per_epoch=1)
    optimizer = build_optimizer(student, config)
    losses, norms = [], []
    for i, step in enumerate(expected["iterations"].tolist()):
        values = schedules.at(step)
        set_hyperparameters_(optimizer, values.lr, values.weight_decay)
        crops = golden.crops(f"step{i}/")
        loss = objective(student(crops), teacher(crops[:2]), values.teacher_temp).total
        optimizer.zero_grad()
        loss.backward()
        norms.append(clip_gradients_(student.parameters(), config.optimizer.clip_grad).item())
        if values.epoch < config.optimizer.freeze_last_layer_epochs:
            freeze_last_layer_(student)
        optimizer.step()
        update_teacher_(student, teacher, values.teacher_momentum)
        losses.append(loss.item())

    networks = {"student": to_published(student.state_dict()), "teacher": to_published(teacher.state_dict())}
    compared = [name.removesuffix("/norm") for name in expected if name.endswith("/norm")]
    assert compared
    weights = {key: networks[key.split("/", 1)[0]][key.split("/", 1)[1]].detach() for key in compared}
    values = {key: weight.flatten()[:64].numpy() for key, weight in weights.items()}
    weight_norms = {key: weight.norm().item() for key, weight in weights.items()}
    largest = {
        "loss (relative)": np.abs(losses / expected["loss"] - 1).max(),
        "grad_norm (relative)": np.abs(norms / expected["grad_norm"] - 1).max(),
        "center": np.abs(objective.center_view.value.numpy() - expected["center"]).max(),
        "center_grid": np.abs(objective.center_region.value.numpy() - expected["center_grid"]).max(),
        "norms of weights (relative)": max(abs(weight_norms[key] / expected[f"{key}/norm"] - 1) for key in compared),
        "weights": max(np.abs(values[key] - expected[key]).max() for key in compared),
    }
    record(golden_file, largest)
    assert losses == pytest.approx(expected["loss"], rel=RELATIVE)
    assert norms == pytest.approx(expected["grad_norm"], rel=RELATIVE)
    assert max(largest["center"], largest["center_grid"]) < 1e-5
    for key in compared:
        assert weight_norms[key] == pytest.approx(float(expected[f"{key}/norm"]), rel=RELATIVE), key
        assert values[key] == pytest.approx(expected[key], rel=RELATIVE, abs=1e-5), key


test_train_steps.golden_file = "train_steps"
