"""Measure how much training is lost when a step's pod is deleted, and the cost of the checkpoints that limit it.

    python benchmarks/lost_work.py [--minutes 8] [--set KEY=VALUE ...]

Trains a Swin-T with its heads of 65,536 prototypes (a checkpoint of about 1 GB) in one process beside a real object
store, as in a step's own pod: with `training.checkpoint_minutes: auto` and the pod's limit. The crops are small, so that
a step takes seconds without a GPU; the state is that of the full recipe. At each moment the work at risk is the time
since the state of the newest complete checkpoint was copied. At the end the process gets SIGTERM and a second later
SIGKILL, as in a pod, and the log lines that have arrived in the store are read. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from esvit_core.config import Config
from esvit_core.data.ingest.prepare import prepare
from esvit_core.runs.events import read_events
from esvit_core.runs.log import read_log
from esvit_core.runs.run import start_run
from esvit_core.storage import ObjectStore
from esvit_core.storage.embedded import EmbeddedStore
from esvit_core.training.checkpoint_interval import LOST_SECONDS_VARIABLE, POD_LOST_SECONDS

IMAGES = Path(__file__).parents[1] / "samples" / "clipart.zip"
SETTINGS = [
    "model={arch: swin_tiny_w7}",
    "head={out_dim: 65536, hidden_dim: 2048, bottleneck_dim: 256}",
    "augment.global_crops.size=64",
    "augment.local_crops.size=32",
    "augment.local_crops.number=2",
    "objective.region=true",
    "training.batch_size=2",
    "training.epochs=100",
    "training.checkpoint_steps=1000000",
    "training.checkpoint_minutes=auto",
    "training.log_steps=1",
    "diagnostics.steps=1000",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    config = Config.load(arguments.recipe, [*SETTINGS, *arguments.set])
    with tempfile.TemporaryDirectory(prefix="esvit-lost-work-") as folder:
        server = EmbeddedStore(Path(folder) / "store")
        os.environ |= server.start().environment()
        os.environ["ESVIT_PENDING_DIR"] = f"{folder}/pending"
        try:
            print(json.dumps(measure(config, 60 * arguments.minutes)))
        finally:
            server.stop()


def measure(config: Config, seconds: float) -> dict[str, object]:
    store = ObjectStore.from_env()
    store.ensure_bucket(config.bucket)
    run = start_run(config, str(IMAGES), f"s3://{config.bucket}/runs/lost", store)
    prepare(str(IMAGES), store, run.at("data"), config.data)
    environment = os.environ | {LOST_SECONDS_VARIABLE: f"{POD_LOST_SECONDS:g}"}
    process = subprocess.Popen(
        [sys.executable, "-m", "esvit_core.training", "--run", run.uri], env=environment, stdout=subprocess.DEVNULL
    )
    complete: list[tuple[float, int]] = []  # time at which each checkpoint was complete, and its step
    began = None
    while process.poll() is None and (began is None or time.time() - began < seconds):
        pointer = store.read_pointer(run.at("training/latest"))
        step = int(pointer.value["step"]) if pointer else 0
        if step and (not complete or complete[-1][1] != step):
            complete.append((time.time(), step))
            began = began or time.time()
        time.sleep(0.2)
    killed = time.time()
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    process.kill()
    process.wait()
    lines = {int(line["step"]): float(line["time"]) for line in read_log(store, run.uri)}
    # Just before a checkpoint is complete, the time since the previous checkpoint's state was copied is at risk.
    at_risk = [when - lines[before[1]] for before, (when, _) in itertools.pairwise(complete)]
    steps = sorted(lines)
    paces = [lines[b] - lines[a] for a, b in itertools.pairwise(steps) if b == a + 1]
    manifest = store.read_manifest(run.at(f"training/checkpoints/{complete[-1][1]:08d}")) or {"files": {}}
    size = sum(file["bytes"] for file in manifest["files"].values())
    hours = (complete[-1][0] - complete[0][0]) / 3600
    return {
        "checkpoint_bytes": size,
        "checkpoints": len(complete),
        "seconds": round(3600 * hours, 1),
        "bytes_per_hour": round(size * (len(complete) - 1) / hours),
        "step_seconds": round(statistics.median(paces), 2),
        "longest_step_seconds": round(max(paces), 2),
        "at_risk_seconds": [round(value, 1) for value in at_risk],
        "at_risk_max": round(max(at_risk), 1),
        "copied_to_complete_seconds": [round(when - lines[step], 1) for when, step in complete],
        "last_line_before_the_signal_seconds": round(killed - max(lines.values()), 2),
        "event_log": [entry.kind for entry in read_events(store, run.uri)],
    }


if __name__ == "__main__":
    main()
