"""What checkpoints cost, and how much training a kill without warning loses, estimated before a run starts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from esvit_core.config import Config
from esvit_core.training.checkpoint_interval import DEFAULT_SECONDS, POD_LOST_SECONDS


@dataclass(frozen=True)
class CheckpointCost:
    """The cost of a training's checkpoints.

    Attributes:
        bytes: size of a checkpoint.
        lost_seconds: training that a kill without warning loses at most on this machine or in a pod of a job: the
            interval between checkpoints, not counting the time that one takes to reach the store.
        bytes_per_hour: bytes written at this interval.
        pod_lost_seconds: training lost at most in a step's own pod, where the store keeps up.
        store_rate: bytes per second that the store has to take for that.
        pod_bytes_per_hour: bytes written in a step's own pod, with a fast store and with one that just keeps up.
    """

    bytes: float
    lost_seconds: float
    bytes_per_hour: float
    pod_lost_seconds: float
    store_rate: float
    pod_bytes_per_hour: tuple[float, float]


def checkpoint_cost(config: Config, checkpoint_bytes: float, step_seconds: float | None) -> CheckpointCost:
    """Estimate the cost of the checkpoints of ``config``.

    Args:
        config: configuration of the run.
        checkpoint_bytes: size of a checkpoint.
        step_seconds: time of a training step; None: it is not known, and the interval follows from
            ``training.checkpoint_minutes`` alone, which is the longest that it can be.
    """
    training = config.training
    steps = math.inf if step_seconds is None else training.checkpoint_steps * step_seconds
    if training.checkpoint_minutes != "auto":
        interval = min(60 * training.checkpoint_minutes, steps)
        hourly = 3600 / interval * checkpoint_bytes
        return CheckpointCost(
            checkpoint_bytes, interval, hourly, interval, checkpoint_bytes / interval, (hourly, hourly)
        )
    interval, bound = min(DEFAULT_SECONDS, steps), min(POD_LOST_SECONDS, steps)
    return CheckpointCost(
        bytes=checkpoint_bytes,
        lost_seconds=interval,
        bytes_per_hour=3600 / interval * checkpoint_bytes,
        pod_lost_seconds=bound,
        store_rate=2 * checkpoint_bytes / bound,
        # A checkpoint whose upload takes half of the bound is followed by the next one at once.
        pod_bytes_per_hour=(3600 / bound * checkpoint_bytes, 2 * 3600 / bound * checkpoint_bytes),
    )
