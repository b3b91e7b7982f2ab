"""Where the time of a training goes: a few steps timed part by part, and a trace of them.

The trace is torch.profiler's, for https://ui.perfetto.dev or chrome://tracing. The parts are those of
:mod:`esvit_core.training.step_timer`, which on a GPU waits for the device at each mark: profiled steps are slower ones.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from esvit_core.training.step_timer import StepClock

PROFILE = "profile"  # below the run
WARM_UP = 3  # steps that are passed over first
OPERATORS = 30  # named in the summary


@dataclass(frozen=True)
class Profile:
    """Of a few steps.

    Attributes:
        summary: ``steps``, ``seconds_a_step`` by part, and ``operators``: the most expensive ones, each with its calls
            and its own seconds a step, on the processor and on the device.
        trace: of torch.profiler, gzipped JSON.
    """

    summary: dict[str, Any]
    trace: bytes


class Profiler:
    """Watches the steps of a training once :meth:`begin` has been called; changes none of their numbers.

    Args:
        device: of the networks.
        student, teacher, objective, optimizer: whose steps they are.
    """

    def __init__(
        self,
        device: torch.device,
        student: nn.Module,
        teacher: nn.Module,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self._parts = student, teacher, objective, optimizer
        self._clock = StepClock(device)
        self._cuda = device.type == "cuda"
        self._steps = self._warm_up = 0
        self._torch: profile | None = None
        self._keep: Callable[[Profile], None]

    def begin(self, steps: int, keep: Callable[[Profile], None]) -> None:
        """Profile as many ``steps`` after a few that are passed over, and give the result to ``keep``."""
        self._steps, self._warm_up, self._keep = steps, WARM_UP, keep

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around each step."""
        if not self._steps or self._warm_up:
            self._warm_up -= bool(self._steps)
            yield
            return
        if self._torch is None:
            self._torch = profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * self._cuda])
            self._torch.start()
        with self._clock.attached(*self._parts), self._clock.step():
            yield
        self._steps -= 1
        if not self._steps:
            self.close()

    def close(self) -> None:
        """Give away what there is, also when the training ends before the last step asked for."""
        if self._torch is None:
            return
        ended, self._torch, self._steps = self._torch, None, 0
        ended.stop()
        steps = self._clock.steps
        summary = {
            "steps": steps,
            "seconds_a_step": {part: seconds / steps for part, seconds in self._clock.seconds.items()},
            "operators": _operators(ended, steps),
        }
        with tempfile.TemporaryDirectory(prefix="esvit-") as folder:
            path = Path(folder) / "trace.json.gz"
            ended.export_chrome_trace(str(path))
            self._keep(Profile(summary, path.read_bytes()))


def _operators(ended: profile, steps: int) -> list[dict[str, Any]]:
    found = [
        {
            "name": event.key,
            "calls": event.count / steps,
            "cpu_seconds": event.self_cpu_time_total / 1e6 / steps,
            "device_seconds": event.self_device_time_total / 1e6 / steps,
        }
        for event in ended.key_averages()
    ]
    return sorted(found, key=lambda one: -max(one["cpu_seconds"], one["device_seconds"]))[:OPERATORS]
