"""Measure the cost of diagnostics and metrics: their time as a share of the training's.

    python benchmarks/diagnostics.py [--rounds 5] [--cases demo,swin_tiny_w7]

In a round, this process runs one training step, one measurement of its outputs, and the metrics of a step, of a log line
and of a scrape. Diagnostics are measured at the default interval: their share is the median measurement over the median
step times the steps between two measurements. Metrics count as if every step were logged and scraped, which is an upper
bound. Images are noise, and loading is left out, which only makes the shares larger. On a CPU the processor time of one
thread is measured, so that other load does not count. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from types import SimpleNamespace
from typing import cast

import torch
from prometheus_client import generate_latest

from esvit_core.config import Config
from esvit_core.data.loading.loader import Batch, TrainLoader
from esvit_core.monitoring.metrics import TrainingMetrics
from esvit_core.training.allocator import keep_freed_memory
from esvit_core.training.diagnostics import BatchStatistics
from esvit_core.training.distributed.processes import init_world
from esvit_core.training.loop import training_step
from esvit_core.training.optim.schedules import ScheduleValues
from esvit_core.training.state import assemble_train_state, make_deterministic

# Swin-T with all prototypes, and few images and crops: the smaller the step, the larger the share of the diagnostics.
CASES = {
    "demo": ("demo", []),
    "swin_tiny_w7": (
        "imagenet_swin_tiny_w7",
        ["training.batch_size=4", "augment.local_crops={size: 96, number: 2, scale: [0.05, 0.4]}"],
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", default=",".join(CASES))
    arguments = parser.parse_args()
    keep_freed_memory()  # as a training process does
    make_deterministic()
    torch.set_num_threads(1)
    shares, of_metrics = {}, {}
    for name in arguments.cases.split(","):
        recipe, overrides = CASES[name]
        config = Config.load(recipe, overrides)
        step, measurement, metrics = measure(config, arguments.rounds)
        interval = config.diagnostics.steps or config.training.log_steps
        shares[name] = round(100 * measurement / (interval * step), 3)
        of_metrics[name] = round(100 * metrics / step, 3)
        print(
            f"{name}: step {step:.3f} s, diagnostics {measurement:.4f} s every {interval} steps: {shares[name]} %, "
            f"metrics {metrics:.4f} s every step: {of_metrics[name]} %",
            flush=True,
        )
    print(json.dumps({"percent_of_training": shares, "metrics_percent_of_training": of_metrics}))


def measure(config: Config, rounds: int) -> tuple[float, float, float]:
    """Measure the median seconds of a step, of the diagnostics and of the metrics."""
    state = assemble_train_state(config, init_world(), cast(TrainLoader, SimpleNamespace(steps_per_epoch=1)))
    at = ScheduleValues(1e-4, 0.04, config.optimizer.teacher_momentum, config.objective.teacher_temp, epoch=1)
    generator = torch.Generator().manual_seed(0)
    crops = [
        torch.randn(config.training.batch_size, 3, kind.size, kind.size, generator=generator)
        for kind in (config.augment.global_crops, config.augment.local_crops)
        for _ in range(kind.number)
    ]
    batch = Batch(crops, torch.arange(config.training.batch_size), 0.0)
    clock = time.process_time if state.world.device.type == "cpu" else time.perf_counter
    metrics = TrainingMetrics("benchmark", config.recipe, 1, rounds)
    times: dict[str, list[float]] = {"step": [], "diagnostics": [], "metrics": []}
    for number in range(rounds + 1):
        start = clock()
        outputs = training_step(state, batch, at)
        float(outputs.terms.view)  # waits for the device
        between = clock()
        figures = (
            BatchStatistics(outputs.student, outputs.teacher, state.objective, at.teacher_temp).diagnostics().figures()
        )
        diagnosed = clock()
        metrics.step(number, 0.1, 0.01, config.training.batch_size)
        metrics.line({"loss": 1.0, "loss_view": 1.0, "loss_region": 1.0, "lr": at.lr, "grad_norm": 1.0, **figures})
        generate_latest(metrics.registry)
        times["metrics"].append(clock() - diagnosed)
        times["diagnostics"].append(diagnosed - between)
        times["step"].append(between - start)
        del outputs
    step, diagnostics, of_metrics = (statistics.median(seconds[1:]) for seconds in times.values())
    return step, diagnostics, of_metrics  # without the first round, which allocates memory


if __name__ == "__main__":
    main()
