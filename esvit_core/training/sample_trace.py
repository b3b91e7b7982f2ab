"""Trace of the samples in each step: JSON lines in the folder ``ESVIT_TRACE_DIR``, if it is set.

An attempt is one start of the processes. Each process writes its own file, one line per step, before its gradients are
averaged with those of the others: a process that is killed afterwards has contributed to the step, and another process
may keep the result. A step that was lost has a line too; the attempt that repeats it replaces it.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np

from esvit_core.training.distributed.processes import World

TRACE_VARIABLE = "ESVIT_TRACE_DIR"


class SampleTrace:
    """Writes the trace of this process; does nothing unless ``ESVIT_TRACE_DIR`` is set."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._folder = os.environ.get(TRACE_VARIABLE)
        if self._folder:
            started = world.broadcast_object(time.time_ns())
            Path(self._folder).mkdir(parents=True, exist_ok=True)
            self._path = Path(self._folder) / f"{started:020d}-{world.rank}.jsonl"

    def step(self, step: int, indices: np.ndarray) -> None:
        """Write the samples (B,) of this process in the step that begins now, counted from 1."""
        if self._folder:
            line = {"step": step, "rank": self._world.rank, "world": self._world.size, "indices": indices.tolist()}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def samples_that_count(folder: Path) -> dict[int, list[int]]:
    """Return the samples of every step whose result the run kept, in the order of the global batch.

    Steps that earlier attempts did after the checkpoint from which a later attempt resumed were lost and do not count.

    Returns:
        Samples by step, counted from 1.
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
        kept = {step: samples for step, samples in kept.items() if step < min(joined, default=step + 1)} | joined
    return kept
