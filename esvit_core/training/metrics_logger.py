"""Metrics of a training: the log, Prometheus, the progress line, and the collapse detector."""

from __future__ import annotations

import time
from typing import NamedTuple, cast

import torch
from torch import Tensor

from esvit_core.errors import UserError
from esvit_core.losses.objective import ObjectiveTerms
from esvit_core.models.multicrop import NetworkOutput
from esvit_core.monitoring.metrics import TrainingMetrics
from esvit_core.monitoring.progress_line import ProgressLine, format_figure
from esvit_core.runs.log import LogWriter
from esvit_core.training.collapse import CollapseSign
from esvit_core.training.diagnostics import BatchStatistics
from esvit_core.training.optim.schedules import ScheduleValues
from esvit_core.training.state import TrainState


class StepOutputs(NamedTuple):
    """The outputs of a training step.

    Attributes:
        terms: of the loss, weighted so that their mean over the processes is the mean over the global batch.
        student, teacher: outputs for the last micro-batch.
        grad_norm: norm of the gradient before clipping, scalar tensor.
    """

    terms: ObjectiveTerms
    student: NetworkOutput
    teacher: NetworkOutput
    grad_norm: Tensor


class MetricsLogger:
    """Accumulates the metrics of every step and writes a line of the log every ``training.log_steps`` steps.

    Only writing a line waits for the device. All processes take part, because metrics are averaged over them; only
    rank 0 writes them.

    Args:
        state: of the training.
        log, progress_line: of rank 0; None in the other processes.
        metrics: of the first process of every node; None in the other processes.

    Attributes:
        last_line: the last line of the log; empty before the first.
    """

    def __init__(
        self,
        state: TrainState,
        log: LogWriter | None = None,
        metrics: TrainingMetrics | None = None,
        progress_line: ProgressLine | None = None,
    ) -> None:
        self._state, self._log, self._metrics, self._progress_line = state, log, metrics, progress_line
        self.last_line: dict[str, float | int | None] = {}
        # Sums of total, view, region, gradient norm and number of steps, over the finite steps, kept on the device.
        self._sums = torch.zeros(5, device=state.world.device)
        self._steps = 0
        self._wait_seconds = 0.0
        self._line_time = self._step_time = time.monotonic()

    def step(self, schedule: ScheduleValues, outputs: StepOutputs, wait_seconds: float) -> None:
        """Add one step.

        Raises:
            UserError, Rollback: a step was not finite.
            UserError: the teacher has collapsed.
        """
        terms, grad_norm = outputs.terms, outputs.grad_norm
        region = terms.region if terms.region is not None else torch.zeros_like(terms.view)
        values = torch.stack((terms.total, terms.view, region, grad_norm.to(terms.view), torch.ones_like(region)))
        self._sums += torch.where(grad_norm.isfinite(), values, 0.0)
        self._steps += 1
        self._wait_seconds += wait_seconds
        training, step = self._state.config.training, self._state.progress.step
        if step % training.log_steps == 0 or step == self._state.schedules.steps:
            self._write_line(schedule, outputs)
        now = time.monotonic()
        if self._metrics:
            images = training.batch_size * self._state.world.node_share
            self._metrics.step(step, now - self._step_time, wait_seconds, images)
        if self._progress_line:
            self._progress_line.update(1, **self._progress_values())
        self._step_time = now

    @property
    def loss(self) -> float | None:
        """Mean loss of the last line; None before the first."""
        return self.last_line.get("loss")

    def flush(self) -> None:
        """Send the log up to the current step: it has to be in the store before the checkpoint of this step."""
        if self._log:
            self._log.flush()

    def _write_line(self, schedule: ScheduleValues, outputs: StepOutputs) -> None:
        state, steps = self._state, self._steps
        state.guard.flush()
        seconds = time.monotonic() - self._line_time
        wait = torch.full((1,), self._wait_seconds / max(seconds, 1e-9), device=self._sums.device)
        means = self._sums[:4] / self._sums[4].clamp(min=1)
        loss, view, region, grad_norm, wait_share = state.world.all_reduce_mean_(torch.cat((means, wait))).tolist()
        diagnostics = self._diagnose(schedule, outputs) if self._diagnostics_due() else {}
        self.last_line = {
            "step": state.progress.step,
            "epoch": schedule.epoch,
            "loss": loss,
            "loss_view": view,
            "loss_region": region if state.config.objective.region else None,
            "lr": schedule.lr,
            "weight_decay": schedule.weight_decay,
            "teacher_temp": schedule.teacher_temp,
            "teacher_momentum": schedule.teacher_momentum,
            "grad_norm": grad_norm,
            "images_per_second": steps * state.config.training.batch_size / seconds,
            "data_wait": min(1.0, wait_share),
            **diagnostics,
            "time": time.time(),
        }
        if self._metrics:
            self._metrics.line(self.last_line)
        signs = state.collapse.observe(state.progress.step, diagnostics) if diagnostics else []
        if self._log:
            messages = {kind: [str(sign) for sign in signs if sign.kind == kind] or None for kind in ("warn", "stop")}
            self._log.write({**self.last_line, **messages})
        self._report(signs)
        self._sums.zero_()
        self._steps, self._wait_seconds, self._line_time = 0, 0.0, time.monotonic()

    def _diagnostics_due(self) -> bool:
        steps, step = self._state.config.diagnostics.steps, self._state.progress.step
        return steps is None or step % steps == 0 or step == self._state.schedules.steps

    def _diagnose(self, schedule: ScheduleValues, outputs: StepOutputs) -> dict[str, float | int]:
        state, world = self._state, self._state.world
        statistics = BatchStatistics(
            outputs.student,
            outputs.teacher,
            state.objective,
            schedule.teacher_temp,
            state.config.mixup.use,
            world.size,
        )
        world.all_reduce_mean_(statistics.sums)
        statistics.features = world.all_gather_rows(statistics.features)
        # Singular values on one processor, not on those of all processes of a node at once.
        figures = statistics.diagnostics().figures() if world.is_main else None
        return cast(dict[str, float | int], world.broadcast_object(figures))

    def _report(self, signs: list[CollapseSign]) -> None:
        for sign in signs:
            if sign.kind == "stop":
                raise UserError(f"training: the teacher has collapsed: {sign}")
            if self._progress_line:
                print(f"train: warning: {sign}", flush=True)
            if self._metrics:
                self._metrics.warned(sign.figure)

    def _progress_values(self) -> dict[str, str]:
        line = self.last_line
        if not line:
            return {}
        loss = format_figure(line["loss"] or 0.0)
        if line["loss_region"] is not None:
            view, region = format_figure(line["loss_view"] or 0.0), format_figure(line["loss_region"])
            loss += f" (view {view}, region {region})"
        return {
            "loss": loss,
            "lr": f"{line['lr']:.2e}",
            "images/s": format_figure(round(line["images_per_second"] or 0.0)),
            "waiting_for_data": f"{100 * (line['data_wait'] or 0.0):.0f} %",
        }
