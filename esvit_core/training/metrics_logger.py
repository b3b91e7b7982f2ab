"""What is known of a training while it runs: log, metrics, progress line, and the reasons to stop it."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor

from esvit_core.errors import UserError
from esvit_core.losses.objective import ObjectiveTerms
from esvit_core.models.multicrop import NetworkOutput
from esvit_core.monitoring.metrics import TrainingMetrics
from esvit_core.monitoring.progress_line import Progress, format_figure
from esvit_core.runs.log import LogWriter
from esvit_core.training.collapse import Sign
from esvit_core.training.diagnostics import BatchStatistics
from esvit_core.training.optim.schedules import ScheduleValues
from esvit_core.training.state import Parts


class StepOutputs(NamedTuple):
    """What a step leaves.

    Attributes:
        terms: of the loss, so weighted that their mean over the processes is that over the global batch.
        student, teacher: what they said of the last micro-batch.
        grad_norm: norm of the gradient before clipping.
    """

    terms: ObjectiveTerms
    student: NetworkOutput
    teacher: NetworkOutput
    grad_norm: Tensor


class Watch:
    """Looks at every step, and every ``training.log_steps`` steps waits for the device to read the figures.

    All processes take part, for their figures are averaged; only the first has somewhere to write them.

    Args:
        parts: of the run.
        log, progress: of the first process, None in the others.
        metrics: of the first process of every node, None in the others.
    """

    def __init__(
        self,
        parts: Parts,
        log: LogWriter | None = None,
        metrics: TrainingMetrics | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._parts, self._log, self._metrics, self._progress = parts, log, metrics, progress
        self.last_line: dict[str, float | int | None] = {}
        # total, view, region, gradient norm, steps: summed where they are made, over the steps that were finite.
        self._sums = torch.zeros(5, device=parts.world.device)
        self._steps = 0
        self._wait_seconds = 0.0
        self._line_time = self._step_time = time.monotonic()

    def step(self, at: ScheduleValues, outputs: StepOutputs, wait_seconds: float) -> None:
        """Take in one step.

        Raises:
            UserError, RollBack: a step was not finite.
            UserError: the teacher has collapsed.
        """
        terms, grad_norm = outputs.terms, outputs.grad_norm
        region = terms.region if terms.region is not None else torch.zeros_like(terms.view)
        figures = torch.stack((terms.total, terms.view, region, grad_norm.to(terms.view), torch.ones_like(region)))
        self._sums += torch.where(grad_norm.isfinite(), figures, 0.0)
        self._steps += 1
        self._wait_seconds += wait_seconds
        training, step = self._parts.config.training, self._parts.position.step
        if step % training.log_steps == 0 or step == self._parts.schedules.steps:
            self._line(at, outputs)
        now = time.monotonic()
        if self._metrics:
            images = training.batch_size * self._parts.world.node_share
            self._metrics.step(step, now - self._step_time, wait_seconds, images)
        if self._progress:
            self._progress.update(1, **self._shown())
        self._step_time = now

    @property
    def loss(self) -> float | None:
        """Mean of the last line."""
        return self.last_line.get("loss")

    def flush(self) -> None:
        """Send the log up to the present step off: a checkpoint must not be in the store before it."""
        if self._log:
            self._log.flush()

    def _line(self, at: ScheduleValues, outputs: StepOutputs) -> None:
        parts, steps = self._parts, self._steps
        parts.guard.settle()
        seconds = time.monotonic() - self._line_time
        wait = torch.full((1,), self._wait_seconds / max(seconds, 1e-9), device=self._sums.device)
        figures = parts.world.mean_(torch.cat((self._sums[:4] / self._sums[4].clamp(min=1), wait))).tolist()
        diagnostics = self._diagnose(at, outputs) if self._diagnostics_due() else {}
        self.last_line = {
            "step": parts.position.step,
            "epoch": at.epoch,
            "loss": figures[0],
            "loss_view": figures[1],
            "loss_region": figures[2] if parts.config.objective.region else None,
            "lr": at.lr,
            "weight_decay": at.weight_decay,
            "teacher_temp": at.teacher_temp,
            "teacher_momentum": at.teacher_momentum,
            "grad_norm": figures[3],
            "images_per_second": steps * parts.config.training.batch_size / seconds,
            "data_wait": min(1.0, figures[4]),
            **diagnostics,
            "time": time.time(),
        }
        if self._metrics:
            self._metrics.line(self.last_line)
        signs = parts.collapse.observe(parts.position.step, diagnostics) if diagnostics else []
        if self._log:
            told = {kind: [str(sign) for sign in signs if sign.kind == kind] or None for kind in ("warn", "stop")}
            self._log.write({**self.last_line, **told})
        self._tell(signs)
        self._sums.zero_()
        self._steps, self._wait_seconds, self._line_time = 0, 0.0, time.monotonic()

    def _diagnostics_due(self) -> bool:
        steps, step = self._parts.config.diagnostics.steps, self._parts.position.step
        return steps is None or step % steps == 0 or step == self._parts.schedules.steps

    def _diagnose(self, at: ScheduleValues, outputs: StepOutputs) -> dict[str, float | int]:
        parts, world = self._parts, self._parts.world
        statistics = BatchStatistics(
            outputs.student, outputs.teacher, parts.objective, at.teacher_temp, parts.config.mixup.use, world.size
        )
        world.mean_(statistics.sums)
        statistics.features = world.rows_of_all(statistics.features)
        return statistics.diagnostics().figures()

    def _tell(self, signs: list[Sign]) -> None:
        for sign in signs:
            if sign.kind == "stop":
                raise UserError(f"training: the teacher has collapsed: {sign}")
            if self._progress:
                print(f"train: warning: {sign}", flush=True)
            if self._metrics:
                self._metrics.warned(sign.figure)

    def _shown(self) -> dict[str, str]:
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
