"""Measure the cost of checkpoints: time of a training step with one every N steps, against none.

    python benchmarks/checkpoints.py [--recipe demo] [--every 20] [--rounds 8]

One process trains on the sample images with a real object store beside it. Stretches with and without a checkpoint
at their end alternate, so that other load on the machine affects both. The upload of a checkpoint runs into the
next stretch: a stretch with a checkpoint is timed after another one with a checkpoint, and a stretch without one after
the last upload has ended. On a busy machine, use the ratio of processor time. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from esvit_core.config import Config
from esvit_core.data.ingest.prepare import prepare
from esvit_core.runs.run import Run
from esvit_core.storage import ObjectStore
from esvit_core.storage.embedded import EmbeddedStore
from esvit_core.storage.upload_queue import UploadQueue
from esvit_core.training.checkpoint import Checkpointer, RetentionPolicy, WrittenCheckpoint
from esvit_core.training.distributed.processes import init_world
from esvit_core.training.loop import training_step
from esvit_core.training.state import build_train_state

IMAGES = Path(__file__).parents[1] / "samples" / "clipart.zip"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--rounds", type=int, default=8, help="number of stretches of each kind")
    arguments = parser.parse_args()
    needed = arguments.every * (3 * arguments.rounds + 1)
    with tempfile.TemporaryDirectory(prefix="esvit-checkpoints-") as folder:
        server = EmbeddedStore(Path(folder) / "store")
        os.environ |= server.start().environment()
        try:
            measure(Config.load(arguments.recipe, arguments.set), arguments.every, arguments.rounds, needed)
        finally:
            server.stop()


def measure(config: Config, every: int, rounds: int, needed: int) -> None:
    store = ObjectStore.from_env()
    store.ensure_bucket(config.bucket)
    run = Run(f"s3://{config.bucket}/runs/cost", store, config)
    prepare(str(IMAGES), store, run.at("data"), config.data)
    state = build_train_state(run, init_world())
    if state.schedules.steps < needed:
        raise SystemExit(f"{needed} steps needed, the recipe has {state.schedules.steps}: raise training.epochs")
    written: list[WrittenCheckpoint] = []
    checkpoints = Checkpointer(UploadQueue(store, run.uri), RetentionPolicy(2), written.append)
    batches = state.batches()
    copies: list[float] = []

    def stretch(save: bool) -> tuple[float, float]:
        """Seconds per step: wall time, and processor time of all threads of this process."""
        start, worked = time.perf_counter(), time.process_time()
        for _ in range(every):
            outputs = training_step(state, next(batches), state.schedule_values())
            state.progress.step += 1
            state.guard.end_step(state.schedule_values(), outputs.terms, outputs.grad_norm, torch.zeros(0).numpy())
        if save:
            copy = time.perf_counter()
            checkpoints.save(state.progress.step, state.stateful)
            copies.append(time.perf_counter() - copy)
        return (time.perf_counter() - start) / every, (time.process_time() - worked) / every

    stretch(save=False)  # warm
    times: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for _ in range(rounds):
        checkpoints.wait()
        times[False].append(stretch(save=False))
        stretch(save=True)  # so that an upload runs during the timed stretch
        times[True].append(stretch(save=True))
    checkpoints.wait()
    without, with_them = (statistics.median(wall for wall, _ in times[kind]) for kind in (False, True))
    pairs = list(zip(times[False], times[True], strict=True))
    ratios = [b[0] / a[0] for a, b in pairs]  # of neighbouring stretches, because other load changes slowly
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    print(
        json.dumps(
            {
                "step_seconds_without": round(without, 4),
                "step_seconds_with": round(with_them, 4),
                "ratio": round(statistics.median(ratios), 4),
                "ratio_quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)],
                "ratio_of_processor_time": round(statistics.median(b[1] / a[1] for a, b in pairs), 4),
                "training_waits_seconds": round(statistics.median(copies), 4),
                "checkpoint_seconds": round(statistics.median(w.seconds for w in written), 3),
                "checkpoint_mib": round(written[-1].bytes / 2**20, 1),
                "every": every,
            }
        )
    )


if __name__ == "__main__":
    main()
