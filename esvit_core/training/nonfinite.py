"""Detect a loss or gradient that is not finite without waiting for the device, record it, and handle it.

The device knows at once that a step went wrong, Python one step later: the metrics of a step are copied to the host
while the next step runs, and are read then. What cannot wait is the update of weights, optimizer, centers and running
statistics; with ``training.on_nonfinite`` skip or rollback the device itself leaves it out. Every process has the same
averaged gradient, so all processes decide alike without communicating.
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
from esvit_core.training.progress import Progress

NONFINITE = "training/nonfinite"
FIGURES = ("loss", "loss_view", "loss_region", "grad_norm")


class Rollback(Exception):  # noqa: N818  not an error: the run continues
    """The run has to return to its last checkpoint and continue with a lower learning rate."""


class NonFiniteGuard:
    """Checks every step of this process.

    Args:
        config: of the run.
        world: the processes.
        progress: of the run; stores the steps that were not finite.
        steps_per_epoch: window of steps in which ``training.nonfinite_limit`` such steps are allowed.
        networks: student, teacher and objective, whose buffers a skipped step restores.
        optimizer: whose update a skipped step leaves out.

    Attributes:
        on_record: called in rank 0 with the record of a step that was not finite.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        progress: Progress,
        steps_per_epoch: int,
        networks: list[nn.Module],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self._config, self._world, self._progress, self._optimizer = config, world, progress, optimizer
        self._policy, self._limit = config.training.on_nonfinite, config.training.nonfinite_limit
        self._steps_per_epoch = steps_per_epoch
        restorable = [] if self._policy == "stop" else networks
        self._buffers = [b for network in restorable for b in network.buffers() if b.is_floating_point()]
        self._before: list[Tensor] = []
        self._pending: list[_PendingMetrics] = []
        self.on_record: Callable[[dict[str, Any]], None] = lambda record: None

    def begin_step(self) -> None:
        """Copy the buffers that the forward passes change."""
        self._before = [buffer.clone() for buffer in self._buffers]

    def skip_if_nonfinite(self, grad_norm: Tensor) -> None:
        """Restore the buffers and skip the update, on the device, if the gradient is not finite.

        To be called between the backward pass and the update.
        """
        if self._policy == "stop":
            return
        nonfinite = ~grad_norm.isfinite()
        skip_step_where_(self._optimizer, nonfinite)
        for buffer, before in zip(self._buffers, self._before, strict=True):
            torch.where(nonfinite, before, buffer, out=buffer)

    def end_step(self, schedule: ScheduleValues, terms: ObjectiveTerms, grad_norm: Tensor, indices: np.ndarray) -> None:
        """Queue the metrics of the step that ``progress`` has just counted, and read those of the step before.

        Args:
            schedule: the schedules' values of the step.
            terms: of the loss.
            grad_norm: norm of the gradient before clipping.
            indices: of this process's samples.

        Raises:
            UserError: a step was not finite, and the policy is to stop or the limit is exceeded.
            Rollback: the run has to return to its last checkpoint.
        """
        region = torch.zeros_like(terms.view) if terms.region is None else terms.region
        figures = torch.stack((terms.total, terms.view, region, grad_norm.to(terms.view)))
        self._pending.append(_PendingMetrics(self._progress.step, schedule, indices, figures))
        if len(self._pending) > 1:
            self._read(self._pending.pop(0))

    def flush(self) -> None:
        """Wait for the device and read all pending metrics; afterwards the state is known to be finite.

        Raises:
            UserError, Rollback: as :meth:`end_step`.
        """
        while self._pending:
            self._read(self._pending.pop(0))

    def _read(self, pending: _PendingMetrics) -> None:
        values = pending.values()
        if math.isfinite(values["grad_norm"]):
            return
        steps = [s for s in self._progress.nonfinite if s > pending.step - self._steps_per_epoch] + [pending.step]
        self._progress.nonfinite = steps
        action = self._policy if len(steps) <= self._limit else "stop"
        self._record(pending, values, action)
        if action == "rollback":
            self._pending.clear()  # these steps will be repeated
            raise Rollback
        if action == "stop":
            raise UserError(self._message(pending.step, values, len(steps)))

    def _record(self, pending: _PendingMetrics, values: dict[str, float], action: str) -> None:
        """Record what is needed, together with the checkpoint before it, to reproduce the step."""
        own = {
            "rank": self._world.rank,
            "indices": pending.indices.tolist(),
            **{name: value if math.isfinite(value) else str(value) for name, value in values.items()},
        }
        processes = self._world.gather_object(own)
        if processes is not None:
            self.on_record(
                {
                    "step": pending.step,
                    **pending.schedule._asdict(),
                    "action": action,
                    "seed": self._config.seed,
                    "config_sha256": self._config.digest(),
                    "world": self._world.size,
                    "device": self._world.device.type,
                    "processes": processes,
                    "time": time.time(),
                }
            )

    def _message(self, step: int, values: dict[str, float], times: int) -> str:
        loss, grad_norm = values["loss"], values["grad_norm"]
        what = f"the norm of the gradient is {grad_norm}" if math.isfinite(loss) else f"the loss is {loss}"
        often = "" if times == 1 else f", time {times} within an epoch"
        advice = "lower optimizer.lr or raise optimizer.warmup_epochs"
        if self._config.training.precision != "float32":
            advice += ", or set training.precision=float32"
        if self._policy == "stop":
            advice += ", or set training.on_nonfinite=skip or rollback to handle single steps"
        return f"training: {what} at step {step}, not finite{often}; {advice}; {NONFINITE} has the details"


class _PendingMetrics:
    """Metrics of a step that are being copied from the device."""

    def __init__(self, step: int, schedule: ScheduleValues, indices: np.ndarray, figures: Tensor) -> None:
        self.step, self.schedule, self.indices = step, schedule, indices
        self._copied: torch.cuda.Event | None = None
        self._host = figures
        if figures.is_cuda:
            self._host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
            self._host.copy_(figures, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def values(self) -> dict[str, float]:
        if self._copied is not None:
            self._copied.synchronize()  # waits for the end of that step only, not for work queued since
        return dict(zip(FIGURES, self._host.tolist(), strict=True))


def backward(loss: Tensor) -> None:
    """Run the backward pass of ``loss``; a loss that is not finite makes every gradient NaN.

    So the norm of the gradient alone shows a failure, in every process once the gradients are averaged. A hook
    sets the gradient of the loss, because torch imports SymPy for ``backward(gradient=)``.
    """
    gradient = torch.where(loss.detach().isfinite(), 1.0, torch.nan).to(loss)
    loss.register_hook(lambda _: gradient)
    loss.backward()
