"""Time the parts of a training step, without code in the step itself.

Hooks on the networks, the objective and the optimizer mark the end of each part; hooks on the tensors between them
divide the backward pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

TEACHER, BACKBONE, HEADS, OBJECTIVE = "teacher forward", "backbone forward", "heads forward", "objective forward"
OBJECTIVE_BACK, HEADS_BACK, BACKBONE_BACK = "objective backward", "heads backward", "backbone backward"
CLIPPING, OPTIMIZER, REST = "gradients", "optimizer", "moving average, rest"
PARTS = (
    *(TEACHER, BACKBONE, HEADS, OBJECTIVE, OBJECTIVE_BACK, HEADS_BACK, BACKBONE_BACK),
    *(CLIPPING, OPTIMIZER, REST),
)


class StepTimer:
    """Adds up the seconds of each part over the steps that it is attached to.

    On a GPU every mark synchronizes with the device to attribute time to the right part, which makes steps a little
    slower.

    Args:
        device: of the networks.
        clock: returns seconds; use :func:`time.process_time` on a busy machine.

    Attributes:
        seconds: total of each of :data:`PARTS`.
        steps: number of steps timed.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.steps = 0
        self._clock = clock
        self._cuda = device.type == "cuda"
        self._last = 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Wrap one step."""
        self._last = self._now()
        yield
        self._mark(REST)
        self.steps += 1

    @contextmanager
    def attached(
        self, student: nn.Module, teacher: nn.Module, objective: nn.Module, optimizer: torch.optim.Optimizer
    ) -> Iterator[None]:
        """Register the hooks for the parts of a step.

        Args:
            student: a multi-crop network: a ``backbone`` and heads, whose output has the fields of
                :class:`~esvit_core.models.multicrop.NetworkOutput`.
            teacher: called before the student.
            objective: called with both outputs.
            optimizer: of the student.
        """
        backbone: Any = student.backbone
        first_parameter = next(p for p in backbone.parameters() if p.requires_grad)  # its gradient is ready last
        handles = [
            teacher.register_forward_pre_hook(lambda *_: self._mark(REST)),
            teacher.register_forward_hook(lambda *_: self._mark(TEACHER)),
            student.head.register_forward_pre_hook(lambda *_: self._mark(BACKBONE)),  # type: ignore[union-attr]
            student.register_forward_hook(self._end_student),
            objective.register_forward_hook(lambda *_: self._mark(OBJECTIVE)),
            first_parameter.register_post_accumulate_grad_hook(lambda _: self._mark(BACKBONE_BACK)),
            optimizer.register_step_pre_hook(lambda *_: self._mark(CLIPPING)),
            optimizer.register_step_post_hook(lambda *_: self._mark(OPTIMIZER)),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _end_student(self, module: nn.Module, args: Any, output: Any) -> None:
        self._mark(HEADS)
        divided = (
            (OBJECTIVE_BACK, (output.view_logits, output.region_logits)),
            (HEADS_BACK, (output.view_features, output.region_features)),
        )
        for part, tensors in divided:
            for tensor in tensors:
                if tensor is not None and tensor.requires_grad:
                    tensor.register_hook(lambda _, part=part: self._mark(part))

    def _mark(self, part: str) -> None:
        now = self._now()
        self.seconds[part] += now - self._last
        self._last = now

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return self._clock()
