"""When the next checkpoint is due.

A pod of a pipeline's step is gone a second or so after it is asked to stop, which is too short to write a checkpoint.
There the checkpoints come so often that at most a minute of training is lost, where the store keeps up: what is lost
at worst is the time between two checkpoints plus the time that one takes to reach the store. Elsewhere a training that
is asked to stop writes a checkpoint first, and a longer interval does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Literal

LOST_SECONDS_VARIABLE = "ESVIT_LOST_WORK_SECONDS"  # set in a step's own pod: training that may be lost, seconds
POD_LOST_SECONDS = 60.0
UNHURRIED_SECONDS = 15 * 60.0
SHORTEST_SECONDS = 5.0
_FIRST_GUESS = 0.25  # of the bound: what a checkpoint takes, before one has been written


class CheckpointPace:
    """Decides before each step whether a checkpoint follows it.

    Args:
        minutes: ``training.checkpoint_minutes``.
        environment: may bound the training that is lost (:data:`LOST_SECONDS_VARIABLE`).
        leads: this process learns what checkpoints take and decides for all; the others never ask for one. With a
            fixed interval each process decides, which comes to the same.
    """

    def __init__(
        self, minutes: float | Literal["auto"], environment: Mapping[str, str] | None = None, leads: bool = True
    ) -> None:
        given = (os.environ if environment is None else environment).get(LOST_SECONDS_VARIABLE)
        self.lost_seconds = float(given) if given and minutes == "auto" else None
        self._fixed = 60 * minutes if minutes != "auto" else UNHURRIED_SECONDS
        self._leads = leads
        self._takes = _FIRST_GUESS * (self.lost_seconds or 0.0)
        self._step = 0.0
        self._saved = time.monotonic()
        self._asked: float | None = None

    @property
    def interval(self) -> float:
        """Seconds from one checkpoint to the time at which the next is asked for.

        With a bound: what it leaves after the writing and the two steps that may pass until the state is copied. Where
        writing takes more than half of the bound, as long as it takes: one reaches the store before the next begins.
        """
        if self.lost_seconds is None:
            return self._fixed
        left = max(self.lost_seconds - self._takes - 2 * self._step, self._takes)
        return min(max(left, SHORTEST_SECONDS), self.lost_seconds)

    @property
    def longest(self) -> float:
        """Seconds between two checkpoints that are as they should be; for the alert."""
        return self._fixed if self.lost_seconds is None else max(self.lost_seconds, 2 * self._takes)

    def due(self) -> bool:
        """Whether a checkpoint is to follow the step that begins now."""
        now = time.monotonic()
        if self._asked is not None:
            self._step = now - self._asked
        self._asked = now
        if self.lost_seconds is not None and not self._leads:
            return False
        return now - self._saved > self.interval

    def saved(self) -> None:
        """The state is being copied."""
        self._saved = time.monotonic()

    def written(self, seconds: float) -> None:
        """A checkpoint has reached the store, so long after its copy began. May be called from another thread."""
        self._takes = seconds
