"""Measure the accuracy of `esvit plan`: plan a training on this machine, run it, and compare the two.

    python benchmarks/plan.py
    python benchmarks/plan.py --recipe imagenet_swin_tiny_w7 --set training.batch_size=8 --images 32

Images are noise. The first quarter of the training's steps is not counted, because processes start then and memory is
touched for the first time. The last line is JSON: planned / measured, of images per second and of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from esvit_core.config import Config
from esvit_core.data.ingest.prepare import prepare
from esvit_core.launch.launcher import launch_training
from esvit_core.planning.estimate import plan_run
from esvit_core.runs.log import read_log
from esvit_core.runs.run import start_run
from esvit_core.storage.session import open_store


def draw(folder: Path, count: int, short: int) -> Path:
    """Write images of coarse noise with an aspect ratio of 3 to 4."""
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = rng.integers(0, 256, (short // 8, short // 6, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=90)
    return folder


class Memory(threading.Thread):
    """Samples the total memory of the training processes ten times per second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._end = threading.Event()

    def run(self) -> None:
        while not self._end.wait(0.1):
            held = 0
            for process in psutil.Process().children(recursive=True):
                try:
                    if "esvit_core.training" in process.cmdline():
                        held += process.memory_info().rss
                except psutil.Error:
                    continue
            self.peak = max(self.peak, held)

    def end(self) -> int:
        self._end.set()
        self.join()
        return self.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--epochs", type=int, default=4)
    arguments = parser.parse_args()
    changes = [*arguments.set, f"training.epochs={arguments.epochs}", "training.log_steps=1", "data.val_fraction=0"]
    config = Config.load(arguments.recipe, changes)
    start = time.monotonic()
    plan = plan_run(config, "cpu", 1, arguments.images)
    print(
        f"planned in {time.monotonic() - start:.0f} s: {plan.images_per_second:.2f} images/s, {plan.bytes / 2**30:.2f} GiB"
    )
    with tempfile.TemporaryDirectory(prefix="esvit-plan-") as folder:
        images = Path(folder) / "images"
        images.mkdir()
        draw(images, arguments.images, min(config.data.store_short_side or 375, 375))
        with open_store(Path(folder) / "store") as store:
            os.environ.update(store.address.environment())
            run = start_run(config, str(images), store=store)
            prepare(str(images), store, run.at("data"), config.data)
            memory = Memory()
            memory.start()
            launch_training(run.uri, config)
            peak = memory.end()
            lines = read_log(store, run.uri)
    steady = [line["images_per_second"] for line in lines[len(lines) // 4 :]]
    rate = statistics.median(float(value) for value in steady if value)
    print(f"measured: {rate:.2f} images/s, {peak / 2**30:.2f} GiB")
    print(json.dumps({"speed": round(plan.images_per_second / rate, 3), "memory": round(plan.bytes / peak, 3)}))


if __name__ == "__main__":
    main()
