"""Compare one process on all cores with one process per core: images per second, and the share of communication.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --recipe imagenet_swin_tiny_w7 --batch 4

Both use the same global batch, on noise generated in advance. Communication is the time that a process waits for
gradients after its own backward pass; communication that overlaps with the backward pass costs nothing. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, cast

import numpy as np
import torch
from machine import describe

from esvit_core.config import Config
from esvit_core.data.loading.loader import Batch, TrainLoader
from esvit_core.launch.signals import RENDEZVOUS_VARIABLE
from esvit_core.runs.environment import available_cores
from esvit_core.training.allocator import keep_freed_memory
from esvit_core.training.distributed.processes import init_world
from esvit_core.training.loop import training_step
from esvit_core.training.state import assemble_train_state


class OneStep:
    """A stand-in for the loader: an epoch of one step."""

    steps_per_epoch = 1


def work(arguments: argparse.Namespace) -> None:
    """Print the seconds of each step and of its wait for the others: the body of a process."""
    keep_freed_memory()
    world = init_world()
    config = Config.load(arguments.recipe, [f"training.batch_size={arguments.batch}"])
    state = assemble_train_state(config, world, cast(TrainLoader, OneStep()))
    images = arguments.batch // world.size
    kinds = (config.augment.global_crops, *config.augment.local_kinds)
    crops = [torch.randn(images, 3, kind.size, kind.size) for kind in kinds for _ in range(kind.number)]
    waited = 0.0
    finish = state.reducer.finish

    def timed() -> None:
        nonlocal waited
        start = time.perf_counter()
        finish()
        waited += time.perf_counter() - start

    state.reducer.finish = timed  # type: ignore[method-assign]
    rows = []
    for _ in range(arguments.rounds + 1):
        waited, start = 0.0, time.perf_counter()
        training_step(state, Batch(crops, np.arange(images), 0.0), state.schedules.at(20))
        rows.append((time.perf_counter() - start, waited))
    print(json.dumps(rows[1:]), flush=True)
    world.close()


def measure(processes: int, threads: int) -> dict[str, Any]:
    """Measure the median seconds of a step, and the share of them spent waiting."""
    with tempfile.TemporaryDirectory(prefix="esvit-scaling-") as folder:
        environment = {**os.environ, "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": str(threads)}
        environment[RENDEZVOUS_VARIABLE] = folder
        running = [
            subprocess.Popen(
                [sys.executable, __file__, *sys.argv[1:], "--worker"],
                stdout=subprocess.PIPE,
                text=True,
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(processes)
        ]
        outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        sys.exit(f"{processes} processes: one of them failed")
    rows = [row for text in outputs for row in json.loads(text.splitlines()[-1])]
    seconds = statistics.median(row[0] for row in rows)
    return {"seconds": seconds, "waiting": statistics.median(row[1] / row[0] for row in rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--batch", type=int, default=64, help="images per step, over all processes")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return
    cores = available_cores()
    print(f"{arguments.recipe}, batch {arguments.batch}, {cores} cores, {describe(torch.device('cpu'))}", flush=True)
    result = {}
    for processes in (1, arguments.processes):
        found = measure(processes, max(1, cores // processes))
        rate = arguments.batch / found["seconds"]
        print(f"{processes} processes: {rate:8.2f} images/s, {found['waiting']:.1%} of a step waiting for gradients")
        result |= {f"images_per_second_{processes}": round(rate, 2), f"waiting_{processes}": round(found["waiting"], 4)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
