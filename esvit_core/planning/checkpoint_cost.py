"""What checkpoints cost, and how much training is lost without warning, before a run starts."""

from __future__ import annotations

from dataclasses import dataclass

from esvit_core.config import Config
from esvit_core.training.checkpoint_interval import POD_LOST_SECONDS, UNHURRIED_SECONDS


@dataclass(frozen=True)
class Saving:
    """The checkpoints of a training.

    Attributes:
        bytes: of one.
        lost_seconds: training that is lost at most when it is killed where it may write a checkpoint before it stops
            (on this machine, in a pod of a job): the time between two, without what one takes to reach the store.
        bytes_an_hour: written there.
        pod_lost_seconds: lost at most in a step's own pod, where the store keeps up.
        store_rate: bytes a second that the store has to take for that.
        pod_bytes_an_hour: written there, with a fast store and with one that just keeps up.
    """

    bytes: float
    lost_seconds: float
    bytes_an_hour: float
    pod_lost_seconds: float
    store_rate: float
    pod_bytes_an_hour: tuple[float, float]


def saving(config: Config, checkpoint_bytes: float, step_seconds: float) -> Saving:
    """The checkpoints of ``config``.

    Args:
        config: of the run.
        checkpoint_bytes: size of one.
        step_seconds: time of a training step.
    """
    training = config.training
    steps = training.checkpoint_steps * step_seconds
    if training.checkpoint_minutes != "auto":
        interval = min(60 * training.checkpoint_minutes, steps)
        hourly = 3600 / interval * checkpoint_bytes
        return Saving(checkpoint_bytes, interval, hourly, interval, checkpoint_bytes / interval, (hourly, hourly))
    interval, bound = min(UNHURRIED_SECONDS, steps), min(POD_LOST_SECONDS, steps)
    return Saving(
        bytes=checkpoint_bytes,
        lost_seconds=interval,
        bytes_an_hour=3600 / interval * checkpoint_bytes,
        pod_lost_seconds=bound,
        store_rate=2 * checkpoint_bytes / bound,
        # One that takes half of the bound to arrive is followed by the next at once.
        pod_bytes_an_hour=(3600 / bound * checkpoint_bytes, 2 * 3600 / bound * checkpoint_bytes),
    )
