"""Which samples each step saw: JSON lines on this machine, written where ``ESVIT_TRACE_DIR`` asks for them.

An attempt is one start of the processes. Each process writes a file of its own, a line a step before its gradients meet
those of the others: one that is killed after that has its part in the step, and another may keep the result. A step
that came to nothing has a line too, and the attempt that repeats it takes its place.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np

from esvit_core.training.distributed.processes import World

TRACE_VARIABLE = "ESVIT_TRACE_DIR"


class Trace:
    """Writes the trace of this process; does nothing where none is asked for."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._folder = os.environ.get(TRACE_VARIABLE)
        if self._folder:
            started = world.from_first(time.time_ns())
            Path(self._folder).mkdir(parents=True, exist_ok=True)
            self._path = Path(self._folder) / f"{started:020d}-{world.rank}.jsonl"

    def step(self, step: int, indices: np.ndarray) -> None:
        """Note the samples (B,) of this process in the step that it has begun, counted from 1."""
        if self._folder:
            line = {"step": step, "rank": self._world.rank, "world": self._world.size, "indices": indices.tolist()}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def samples_that_count(folder: Path) -> dict[int, list[int]]:
    """The samples of every step whose result the run kept, in the order of the global batch.

    Where an attempt went back to a checkpoint, what the ones before it did from there on was lost and does not count.

    Returns:
        By step, counted from 1.
    """
    attempts: dict[str, dict[int, dict[int, list[int]]]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        attempt = attempts.setdefault(path.name.partition("-")[0], {})
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            attempt.setdefault(line["step"], {})[line["rank"]] = line["indices"]
    kept: dict[int, list[int]] = {}
    for _, steps in sorted(attempts.items()):
        joined = {step: [n for _, own in sorted(ranks.items()) for n in own] for step, ranks in steps.items()}
        kept = {step: seen for step, seen in kept.items() if step < min(joined, default=step + 1)} | joined
    return kept
