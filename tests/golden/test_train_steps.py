"""Three whole training steps against the published implementation."""

from __future__ import annotations

import numpy as np
import pytest

from esvit_core.config import Config
from esvit_core.losses import Objective
from esvit_core.models.published import to_published
from esvit_core.training.optimizer import (
    build_optimizer,
    clip_gradients_,
    freeze_last_layer_,
    set_hyperparameters_,
    update_teacher_,
)
from esvit_core.training.schedules import Schedules

RELATIVE = 2e-4


def test_train_steps(golden, golden_file):
    expected = golden.arrays(golden_file)
    config = Config.from_mapping(
        {
            "model": {"drop_path": 0.0},
            "head": {"out_dim": golden.index["head_out_dim"]},
            "training": {"epochs": 20},
            "objective": {"warmup_teacher_temp_epochs": 10},
        }
    )
    student = golden.network("swin_tiny_w7").train()
    teacher = golden.network("swin_tiny_w7", seed_offset=100).train().requires_grad_(False)
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

    print(np.array(losses) / expected["loss"] - 1, np.array(norms) / expected["grad_norm"] - 1)
    assert losses == pytest.approx(expected["loss"], rel=RELATIVE)
    assert norms == pytest.approx(expected["grad_norm"], rel=RELATIVE)
    assert np.abs(objective.centre_view.value.numpy() - expected["center"]).max() < 1e-5
    assert np.abs(objective.centre_region.value.numpy() - expected["center_grid"]).max() < 1e-5
    networks = {"student": to_published(student.state_dict()), "teacher": to_published(teacher.state_dict())}
    compared = [name for name in expected if name.endswith("/norm")]
    assert len(compared) == 18
    for key in (name.removesuffix("/norm") for name in compared):
        who, name = key.split("/", 1)
        weight = networks[who][name].detach()
        assert weight.norm().item() == pytest.approx(float(expected[f"{key}/norm"]), rel=RELATIVE), key
        assert weight.flatten()[:64].numpy() == pytest.approx(expected[key], rel=RELATIVE, abs=1e-5), key


test_train_steps.golden_file = "train_steps"
