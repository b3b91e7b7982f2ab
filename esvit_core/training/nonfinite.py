"""A loss or a gradient that is not finite: noticed without waiting for the device, written down, and dealt with.

On the device a step that went wrong is known at once, in Python one step later: the figures of a step travel to the
host while the next one runs, and are read then. What must not wait, the update of weights, optimizer, centers and
running statistics, is left out on the device itself (``training.on_nonfinite`` skip and rollback). Every process
holds the same gradient, so that all decide the same without a word between them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from esvit_core.config import Config
from esvit_core.errors import UserError
from esvit_core.losses.objective import ObjectiveTerms
from esvit_core.training.distributed.processes import World
from esvit_core.training.optim.optimizer import skip_step_where_
from esvit_core.training.optim.schedules import ScheduleValues
from esvit_core.training.progress import Position

NONFINITE = "training/nonfinite"
FIGURES = ("loss", "loss_view", "loss_region", "grad_norm")


class RollBack(Exception):  # noqa: N818  not an error: the run goes on
    """The run has to go back to its last checkpoint and to learn more slowly from there."""


class NonFiniteGuard:
    """Looks at every step of this process.

    Args:
        config: of the run.
        world: the processes.
        position: of the run; keeps the steps that were not finite.
        steps_per_epoch: ``training.nonfinite_limit`` of them are allowed in so many steps.
        networks: whose buffers a skipped step leaves as they were: student, teacher, objective.
        optimizer: whose step is left out.

    Attributes:
        keep: called in the first process with what is to be kept of a step that was not finite.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        position: Position,
        steps_per_epoch: int,
        networks: list[nn.Module],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self._config, self._world, self._position, self._optimizer = config, world, position, optimizer
        self._policy, self._limit = config.training.on_nonfinite, config.training.nonfinite_limit
        self._steps_per_epoch = steps_per_epoch
        kept = [] if self._policy == "stop" else networks
        self._buffers = [b for network in kept for b in network.buffers() if b.is_floating_point()]
        self._before: list[Tensor] = []
        self._unread: list[_Figures] = []
        self.keep: Callable[[dict[str, Any]], None] = lambda record: None

    def begin_step(self) -> None:
        """Remember what the forward passes change."""
        self._before = [buffer.clone() for buffer in self._buffers]

    def judge(self, grad_norm: Tensor) -> None:
        """Between the backward pass and the update: where the gradient is not finite, on the device, undo and skip."""
        if self._policy == "stop":
            return
        bad = ~grad_norm.isfinite()
        skip_step_where_(self._optimizer, bad)
        for buffer, before in zip(self._buffers, self._before, strict=True):
            torch.where(bad, before, buffer, out=buffer)

    def end_step(self, at: ScheduleValues, terms: ObjectiveTerms, grad_norm: Tensor, indices: np.ndarray) -> None:
        """Take in the step that ``position`` has just counted, and read the figures of the one before.

        Args:
            at: its schedule values.
            terms: its loss.
            grad_norm: before clipping.
            indices: of this process's samples.

        Raises:
            UserError: a step was not finite, and the run is to stop or it has happened too often.
            RollBack: the run is to go back.
        """
        region = torch.zeros_like(terms.view) if terms.region is None else terms.region
        figures = torch.stack((terms.total, terms.view, region, grad_norm.to(terms.view)))
        self._unread.append(_Figures(self._position.step, at, indices, figures))
        if len(self._unread) > 1:
            self._read(self._unread.pop(0))

    def settle(self) -> None:
        """Wait for the device and read the rest: afterwards the state is known to be finite.

        Raises:
            UserError, RollBack: as :meth:`end_step`.
        """
        while self._unread:
            self._read(self._unread.pop(0))

    def _read(self, figures: _Figures) -> None:
        values = figures.values()
        if math.isfinite(values["grad_norm"]):
            return
        found = [s for s in self._position.nonfinite if s > figures.step - self._steps_per_epoch] + [figures.step]
        self._position.nonfinite = found
        action = self._policy if len(found) <= self._limit else "stop"
        self._record(figures, values, action)
        if action == "rollback":
            self._unread.clear()  # it is done again
            raise RollBack
        if action == "stop":
            raise UserError(self._explain(figures.step, values, len(found)))

    def _record(self, figures: _Figures, values: dict[str, float], action: str) -> None:
        """With the checkpoint before it, this is what it takes to see the same step again."""
        own = {
            "rank": self._world.rank,
            "indices": figures.indices.tolist(),
            **{name: value if math.isfinite(value) else str(value) for name, value in values.items()},
        }
        everyone = self._world.to_first(own)
        if everyone is not None:
            self.keep(
                {
                    "step": figures.step,
                    **figures.at._asdict(),
                    "action": action,
                    "seed": self._config.seed,
                    "config_sha256": self._config.digest(),
                    "world": self._world.size,
                    "device": self._world.device.type,
                    "processes": everyone,
                    "time": time.time(),
                }
            )

    def _explain(self, step: int, values: dict[str, float], times: int) -> str:
        loss, grad_norm = values["loss"], values["grad_norm"]
        what = f"the norm of the gradient is {grad_norm}" if math.isfinite(loss) else f"the loss is {loss}"
        often = "" if times == 1 else f", time {times} within an epoch"
        advice = "lower optimizer.lr or raise optimizer.warmup_epochs"
        if self._config.training.precision != "float32":
            advice += ", or set training.precision=float32"
        if self._policy == "stop":
            advice += ", or let training.on_nonfinite=skip or rollback deal with single ones"
        return f"training: {what} at step {step}, not finite{often}; {advice}; {NONFINITE} holds what led to it"


class _Figures:
    """What is known of a step, on its way from the device."""

    def __init__(self, step: int, at: ScheduleValues, indices: np.ndarray, figures: Tensor) -> None:
        self.step, self.at, self.indices = step, at, indices
        self._arrived: torch.cuda.Event | None = None
        self._host = figures
        if figures.is_cuda:
            self._host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
            self._host.copy_(figures, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def values(self) -> dict[str, float]:
        if self._arrived is not None:
            self._arrived.synchronize()  # with the end of that step, not with what was begun since
        return dict(zip(FIGURES, self._host.tolist(), strict=True))


def backward(loss: Tensor) -> None:
    """The backward pass of ``loss``; one that is not finite makes every gradient NaN.

    So the norm of the gradient alone tells, and after the processes have averaged it tells all of them.
    """
    loss.backward(gradient=torch.where(loss.detach().isfinite(), 1.0, torch.nan).to(loss))
