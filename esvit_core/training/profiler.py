"""Profile a few steps of a training: the time of each part, and a trace.

The trace is torch.profiler's, for https://ui.perfetto.dev or chrome://tracing. The parts are those of
:mod:`esvit_core.training.step_timer`, which on a GPU synchronizes at each mark, so profiled steps are slower.
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

from esvit_core.training.step_timer import StepTimer

PROFILE = "profile"  # below the run
WARM_UP = 3  # steps before the first profiled step
OPERATORS = 30  # operators in the summary


@dataclass(frozen=True)
class Profile:
    """The profile of a few steps.

    Attributes:
        summary: ``steps``, ``seconds_a_step`` by part, and ``operators``: the most expensive ones, each with its calls
            and its own seconds per step, on the CPU and on the device.
        trace: of torch.profiler, gzipped JSON.
    """

    summary: dict[str, Any]
    trace: bytes


class Profiler:
    """Profiles the steps of a training after :meth:`start`, without changing any result.

    Args:
        device: of the networks.
        student, teacher, objective, optimizer: of the training.
    """

    def __init__(
        self,
        device: torch.device,
        student: nn.Module,
        teacher: nn.Module,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self._modules = student, teacher, objective, optimizer
        self._timer = StepTimer(device)
        self._cuda = device.type == "cuda"
        self._steps = self._warm_up = 0
        self._torch: profile | None = None
        self._on_profile: Callable[[Profile], None]

    def start(self, steps: int, on_profile: Callable[[Profile], None]) -> None:
        """Profile the next ``steps`` after a few for warm-up, then call ``on_profile`` with the result."""
        self._steps, self._warm_up, self._on_profile = steps, WARM_UP, on_profile

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Wrap each step of the training."""
        if not self._steps or self._warm_up:
            self._warm_up -= bool(self._steps)
            yield
            return
        if self._torch is None:
            self._torch = profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * self._cuda])
            self._torch.start()
        with self._timer.attached(*self._modules), self._timer.step():
            yield
        self._steps -= 1
        if not self._steps:
            self.close()

    def close(self) -> None:
        """Report the steps profiled so far; a training may end before the last requested step."""
        if self._torch is None:
            return
        ended, self._torch, self._steps = self._torch, None, 0
        ended.stop()
        steps = self._timer.steps
        summary = {
            "steps": steps,
            "seconds_a_step": {part: seconds / steps for part, seconds in self._timer.seconds.items()},
            "operators": _operators(ended, steps),
        }
        with tempfile.TemporaryDirectory(prefix="esvit-") as folder:
            path = Path(folder) / "trace.json.gz"
            ended.export_chrome_trace(str(path))
            self._on_profile(Profile(summary, path.read_bytes()))


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
    return sorted(found, key=lambda operator: -max(operator["cpu_seconds"], operator["device_seconds"]))[:OPERATORS]
