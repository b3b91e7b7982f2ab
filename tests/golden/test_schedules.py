"""Schedules against the published implementation."""

from __future__ import annotations

import numpy as np

from esvit_core.config import Config
from esvit_core.training.optim.schedules import Schedules, cosine_schedule, teacher_temperature

EPOCHS, STEPS = 20, 7


def test_schedules(golden, golden_file, record):
    expected = golden.arrays(golden_file)
    found = {
        "lr": cosine_schedule(0.0005 * 512 / 256, 1e-6, EPOCHS, STEPS, warmup_epochs=10),
        "weight_decay": cosine_schedule(0.04, 0.4, EPOCHS, STEPS),
        "teacher_momentum": cosine_schedule(0.996, 1, EPOCHS, STEPS),
        "teacher_temperature": teacher_temperature(0.04, 0.07, 12, EPOCHS),
    }
    assert set(found) == set(expected)
    largest = {name: np.abs(value - expected[name]).max() for name, value in found.items()}
    record(golden_file, largest)
    assert max(largest.values()) <= 1e-12

    recipe = Config.from_mapping({"training": {"epochs": EPOCHS}, "objective": {"warmup_teacher_temp_epochs": 12}})
    schedules = Schedules(recipe, STEPS)
    for step in range(EPOCHS * STEPS):
        values = schedules.at(step)
        assert values.epoch == step // STEPS
        assert values.lr == found["lr"][step]
        assert values.weight_decay == found["weight_decay"][step]
        assert values.teacher_momentum == found["teacher_momentum"][step]
        assert values.teacher_temp == found["teacher_temperature"][values.epoch]


test_schedules.golden_file = "schedules"
