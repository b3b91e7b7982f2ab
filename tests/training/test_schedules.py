"""Schedules: their ends, their order, and runs shorter than their warm-up."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esvit_core.config import Config
from esvit_core.training.optim.schedules import Schedules, cosine_schedule, teacher_temperature


def test_cosine_schedule_warms_up_and_falls_to_the_end():
    values = cosine_schedule(1.0, 0.1, epochs=10, steps_per_epoch=4, warmup_epochs=2)
    assert len(values) == 40
    assert values[0] == 0
    assert values[7] == values[8] == 1.0  # the warm-up reaches the peak, the cosine starts from it
    assert np.all(np.diff(values[:8]) > 0) and np.all(np.diff(values[8:]) < 0)
    assert values[24] == pytest.approx(0.55)  # half-way
    assert values[-1] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 31 / 32)))


@given(st.integers(1, 20), st.integers(1, 5), st.integers(0, 30))
def test_schedules_have_one_value_per_step(epochs, steps, warmup):
    assert len(cosine_schedule(1.0, 0.0, epochs, steps, warmup)) == epochs * steps
    assert len(teacher_temperature(0.04, 0.07, warmup, epochs)) == epochs


def test_a_run_shorter_than_its_warm_up_ends_within_it():
    values = cosine_schedule(1.0, 0.0, epochs=2, steps_per_epoch=5, warmup_epochs=4)
    assert values == pytest.approx(np.linspace(0, 1, 20)[:10])
    assert teacher_temperature(0.04, 0.07, 4, 2) == pytest.approx([0.04, 0.05])


def test_values_of_a_step_follow_the_recipe():
    config = Config.from_mapping(
        {
            "training": {"epochs": 4, "batch_size": 128},
            "optimizer": {"lr": 0.001, "warmup_epochs": 1, "teacher_momentum": 0.9},
            "objective": {"warmup_teacher_temp_epochs": 3},
        }
    )
    schedules = Schedules(config, steps_per_epoch=3)
    first, peak, last = schedules.at(0), schedules.at(3), schedules.at(11)
    assert schedules.steps == 12
    assert (first.lr, first.weight_decay, first.teacher_momentum, first.teacher_temp, first.epoch) == pytest.approx(
        (0.0, 0.04, 0.9, 0.04, 0)
    )
    assert peak.lr == 0.0005  # scaled by batch / 256
    assert peak.teacher_temp == pytest.approx(0.055)
    assert last.epoch == 3
    assert last.teacher_temp == 0.07
    assert last.teacher_momentum < 1 and last.weight_decay < 0.4
