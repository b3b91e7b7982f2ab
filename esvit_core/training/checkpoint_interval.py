"""When the next checkpoint is due.

A pipeline step's own pod is gone about a second after it is asked to stop, which is too short to write a checkpoint.
There, checkpoints are written so often that at most a minute of training is lost, if the store keeps up: the worst-case
loss is the time between two checkpoints plus the time that one takes to reach the store. Elsewhere a training that is
asked to stop writes a checkpoint first, so a longer interval suffices.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Literal

LOST_SECONDS_VARIABLE = "ESVIT_LOST_WORK_SECONDS"  # set in a step's own pod: training that may be lost, seconds
POD_LOST_SECONDS = 60.0
DEFAULT_SECONDS = 15 * 60.0
SHORTEST_SECONDS = 5.0
_MARGIN = 0.05  # of the bound: one checkpoint takes a little longer than the one before
_INITIAL_SHARE = 0.25  # of the bound: assumed time of a checkpoint before one has been written


class CheckpointInterval:
    """Decides before each step whether a checkpoint follows it.

    Args:
        minutes: ``training.checkpoint_minutes``.
        environment: may set a bound on the training that is lost (:data:`LOST_SECONDS_VARIABLE`).
        is_main: whether this process writes the checkpoints. With a bound it measures how long they take and decides
            for all processes; the others never request one. With a fixed interval every process decides.
    """

    def __init__(
        self, minutes: float | Literal["auto"], environment: Mapping[str, str] | None = None, is_main: bool = True
    ) -> None:
        bound = (os.environ if environment is None else environment).get(LOST_SECONDS_VARIABLE)
        self.lost_seconds = float(bound) if bound and minutes == "auto" else None
        self._fixed = 60 * minutes if minutes != "auto" else DEFAULT_SECONDS
        self._is_main = is_main
        self._write_seconds = _INITIAL_SHARE * (self.lost_seconds or 0.0)
        self._step_seconds = 0.0
        self._last_saved = time.monotonic()
        self._last_step: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds from one checkpoint to the request for the next.

        With a bound: what remains of it after a margin, the time to write a checkpoint and the two steps that may pass until the
        state is copied. If writing takes more than half of the bound, the interval is the time of writing, so that one
        checkpoint reaches the store before the next begins.
        """
        if self.lost_seconds is None:
            return self._fixed
        left = max(
            (1 - _MARGIN) * self.lost_seconds - self._write_seconds - 2 * self._step_seconds, self._write_seconds
        )
        return min(max(left, SHORTEST_SECONDS), self.lost_seconds)

    @property
    def longest(self) -> float:
        """Longest time between two checkpoints in normal operation, seconds; used by the alert."""
        return self._fixed if self.lost_seconds is None else max(self.lost_seconds, 2 * self._write_seconds)

    def due(self) -> bool:
        """Return whether a checkpoint should follow the step that begins now."""
        now = time.monotonic()
        if self._last_step is not None:
            self._step_seconds = now - self._last_step
        self._last_step = now
        if self.lost_seconds is not None and not self._is_main:
            return False
        return now - self._last_saved > self.seconds

    def saved(self) -> None:
        """Restart the interval: the state is being copied now."""
        self._last_saved = time.monotonic()

    def written(self, seconds: float) -> None:
        """Take into account that a checkpoint took ``seconds`` to reach the store. May be called from another thread."""
        self._write_seconds = seconds
