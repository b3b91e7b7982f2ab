"""Schedules of learning rate, weight decay, teacher momentum and teacher temperature."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from esvit_core.config import Config


def cosine_schedule(
    base: float, final: float, epochs: int, steps_per_epoch: int, warmup_epochs: int = 0, start: float = 0.0
) -> np.ndarray:
    """Linear warm-up from ``start`` to ``base``, then half a cosine towards ``final``, which the next step would reach.

    A run that is shorter than its warm-up ends within it.

    Returns:
        One value per step, (epochs * steps_per_epoch,), float64.
    """
    steps = epochs * steps_per_epoch
    warmup = np.linspace(start, base, warmup_epochs * steps_per_epoch)[:steps]
    rest = steps - len(warmup)
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * np.arange(rest) / max(rest, 1)))
    return np.concatenate((warmup, cosine))


def teacher_temperature(warmup_temp: float, temp: float, warmup_epochs: int, epochs: int) -> np.ndarray:
    """Linear rise from ``warmup_temp`` to ``temp`` over ``warmup_epochs``, then constant: one value per epoch."""
    warmup = np.linspace(warmup_temp, temp, warmup_epochs)[:epochs]
    return np.concatenate((warmup, np.full(epochs - len(warmup), temp)))


class ScheduleValues(NamedTuple):
    """The schedules' values of one step."""

    lr: float
    weight_decay: float
    teacher_momentum: float
    teacher_temp: float
    epoch: int


class Schedules:
    """All schedules of a run.

    Args:
        config: the run's configuration; the peak learning rate is ``optimizer.lr * batch_size / 256``.
        steps_per_epoch: optimizer steps per epoch.
    """

    def __init__(self, config: Config, steps_per_epoch: int) -> None:
        optimizer, objective, epochs = config.optimizer, config.objective, config.training.epochs
        peak = optimizer.lr * config.training.batch_size / 256
        self.steps_per_epoch = steps_per_epoch
        self.steps = epochs * steps_per_epoch
        self._lr = cosine_schedule(peak, optimizer.min_lr, epochs, steps_per_epoch, optimizer.warmup_epochs)
        self._weight_decay = cosine_schedule(
            optimizer.weight_decay, optimizer.weight_decay_end, epochs, steps_per_epoch
        )
        self._teacher_momentum = cosine_schedule(optimizer.teacher_momentum, 1.0, epochs, steps_per_epoch)
        self._teacher_temp = teacher_temperature(
            objective.warmup_teacher_temp, objective.teacher_temp, objective.warmup_teacher_temp_epochs, epochs
        )

    def at(self, step: int) -> ScheduleValues:
        """Return the values of optimizer step ``step``, counted from 0 over the whole run."""
        epoch = step // self.steps_per_epoch
        return ScheduleValues(
            lr=float(self._lr[step]),
            weight_decay=float(self._weight_decay[step]),
            teacher_momentum=float(self._teacher_momentum[step]),
            teacher_temp=float(self._teacher_temp[epoch]),
            epoch=epoch,
        )
