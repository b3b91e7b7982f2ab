"""Time and memory of a training step, part by part: ours, and the same step written the published way.

    python benchmarks/step.py --arch swin_tiny_w7 --batch 8
    python benchmarks/step.py --device cuda --batch 128 --rounds 10

The implementations take turns within one process, step by step, and the ratios are medians over the rounds, so that
other load on the machine falls on all alike. Peak memory is measured with each in a process of its own: resident
memory, interpreter and libraries included, or on a GPU what torch has allocated. The last line is JSON: time ratios
are plain / ours, memory ratios ours / plain. On a CPU the plain step of ``step_bfloat16`` is the float32 one: that is
what the published code computes there. On a GPU it is the plain step under autocast in the given half precision.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from machine import describe, peak_memory, reset_peak_memory
from plain_step import PlainObjective, PlainStep
from step_clock import PARTS, StepClock

from esvit_core.config import Config
from esvit_core.data.loader import Batch, TrainLoader
from esvit_core.losses import Objective
from esvit_core.models.multicrop import NetworkOutput
from esvit_core.training.distributed import World
from esvit_core.training.loop import training_step
from esvit_core.training.parts import assemble
from esvit_core.training.precision import Precision
from esvit_core.training.schedules import Schedules, ScheduleValues

MIB = 2**20


@dataclass
class SameBatch:
    """In place of a loader: an epoch of one step."""

    steps_per_epoch: int = 1


class OurStep:
    """The step of :mod:`esvit_core.training.loop` on crops that are there already."""

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype) -> None:
        self.parts = assemble(config, World(0, 1, device, None), cast(TrainLoader, SameBatch()))
        self.parts.precision = Precision(dtype, "benchmark", device.type)
        self.student, self.teacher = self.parts.student, self.parts.teacher
        self.objective, self.optimizer = self.parts.objective, self.parts.optimizer

    def __call__(self, crops: list[torch.Tensor], at: ScheduleValues) -> torch.Tensor:
        """One step; the loss."""
        batch = Batch(crops, np.arange(len(crops[0])), 0.0)
        return training_step(self.parts, batch, at)[0].total.detach()


def implementation(name: str) -> tuple[Callable[..., object], torch.dtype]:
    """``ours-bfloat16`` and the like."""
    who, dtype = name.split("-")
    makers: dict[str, Callable[..., object]] = {"ours": OurStep, "plain": PlainStep}
    return makers[who], getattr(torch, dtype)


def config_of(arguments: argparse.Namespace) -> Config:
    return Config.from_mapping(
        {
            "model": {"arch": arguments.arch, "drop_path": arguments.drop_path},
            "head": {"out_dim": arguments.prototypes},
            "augment": {"local_crops": {"size": 96, "number": arguments.local_crops, "scale": (0.05, 0.4)}},
            "objective": {"region": not arguments.view_only},
            "optimizer": {"freeze_last_layer_epochs": 0},
            "training": {"batch_size": arguments.batch, "epochs": 100},
        }
    )


def crops_of(config: Config, batch: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    kinds = (config.augment.global_crops, *config.augment.local_kinds)
    return [torch.randn(batch, 3, k.size, k.size, generator=generator) for k in kinds for _ in range(k.number)]


def wait(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def time_steps(names: list[str], arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each round of each implementation; prints the parts."""
    config, device = config_of(arguments), torch.device(arguments.device)
    crops, at = crops_of(config, arguments.batch), Schedules(config, 1).at(20)
    steps, clocks, seconds = {}, {}, {name: [] for name in names}
    for name in names:
        make, dtype = implementation(name)
        steps[name], clocks[name] = make(config, device, dtype), StepClock(device)
        steps[name](crops, at)  # warm
    for _ in range(arguments.rounds):
        for name in names:
            start = wait(device)
            steps[name](crops, at)
            seconds[name].append(wait(device) - start)
    for _ in range(arguments.rounds if device.type == "cuda" else max(1, arguments.rounds // 2)):
        for name, step in steps.items():
            parts = step.student, step.teacher, step.objective, step.optimizer
            with clocks[name].attached(*parts), clocks[name].step():
                step(crops, at)
    print_parts(names, clocks, seconds, arguments.batch)
    return seconds


def print_parts(names: list[str], clocks: dict[str, StepClock], seconds: dict[str, list[float]], batch: int) -> None:
    print(f"{'seconds':24}" + "".join(f"{name:>18}" for name in names))
    for part in PARTS:
        print(f"{part:24}" + "".join(f"{clocks[name].seconds[part] / clocks[name].steps:18.3f}" for name in names))
    medians = {name: statistics.median(seconds[name]) for name in names}
    print(f"{'whole step, median':24}" + "".join(f"{medians[name]:18.3f}" for name in names))
    print(f"{'pictures a second':24}" + "".join(f"{batch / medians[name]:18.2f}" for name in names))


def ratio(above: list[float], below: list[float]) -> float:
    """Median of the rounds' own ratios."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


# The objective alone


def outputs_of(config: Config, batch: int, device: torch.device, dtype: torch.dtype) -> list[NetworkOutput]:
    """What networks of 32 pixels a region would say of the crops, the student's with gradients."""
    generator = torch.Generator().manual_seed(0)
    kinds = (config.augment.global_crops, *config.augment.local_kinds)
    counts = [(k.size // 32) ** 2 for k in kinds for _ in range(k.number)]

    def draw(rows: int, width: int) -> torch.Tensor:
        return (0.3 * torch.randn(rows, width, generator=generator)).to(device, dtype)

    outputs = []
    for regions in (counts, counts[:2]):
        rows, K = batch * sum(regions), config.head.out_dim
        outputs.append(NetworkOutput(draw(len(regions) * batch, K), draw(rows, K), draw(rows, 768), regions))
    for logits in outputs[0][:2]:
        logits.requires_grad_()
    return outputs


def objective_of(who: str, config: Config, device: torch.device) -> Callable[..., torch.Tensor]:
    if who == "plain":
        return PlainObjective(config).to(device)
    ours = Objective(config.objective, config.head.out_dim).to(device)
    return lambda *outputs: ours(*outputs).total


def run_objective(objective: Callable[..., torch.Tensor], outputs: list[NetworkOutput]) -> None:
    for logits in outputs[0][:2]:
        logits.grad = None
    objective(*outputs, 0.05).backward()


def time_objective(arguments: argparse.Namespace) -> float:
    config, device = config_of(arguments), torch.device(arguments.device)
    outputs = outputs_of(config, arguments.batch, device, torch.float32)
    objectives = {who: objective_of(who, config, device) for who in ("plain", "ours")}
    seconds: dict[str, list[float]] = {who: [] for who in objectives}
    for number in range(arguments.rounds + 1):
        for who, objective in objectives.items():
            start = wait(device)
            run_objective(objective, outputs)
            if number:  # the first warms
                seconds[who].append(wait(device) - start)
    medians = {who: statistics.median(values) for who, values in seconds.items()}
    print(f"objective alone, forward and backward: plain {medians['plain']:.3f} s, ours {medians['ours']:.3f} s")
    return ratio(seconds["plain"], seconds["ours"])


# Memory


def measure_memory(arguments: argparse.Namespace) -> None:
    """Body of a process of its own: prints the peak in bytes as its last line."""
    config, device = config_of(arguments), torch.device(arguments.device)
    what, who = arguments.memory_of.split(":")
    if what == "objective":
        outputs, objective = (
            outputs_of(config, arguments.batch, device, torch.float32),
            objective_of(who, config, device),
        )
        before = reset_peak_memory(device)
        run_objective(objective, outputs)
        print(peak_memory(device) - before)
        return
    make, dtype = implementation(who)
    step = make(config, device, dtype)
    crops, at = crops_of(config, arguments.batch), Schedules(config, 1).at(20)
    for _ in range(2):  # the first makes the optimizer's state
        reset_peak_memory(device)
        step(crops, at)
    print(peak_memory(device))


def memory_of(what: str) -> int:
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", what]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        sys.exit(done.stderr)
    return int(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="swin_tiny_w7")
    parser.add_argument("--batch", type=int, default=8, help="pictures a step")
    parser.add_argument("--dtype", choices=["both", "float32", "bfloat16", "float16"], default="both")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--local-crops", type=int, default=8)
    parser.add_argument("--drop-path", type=float, default=0.1)
    parser.add_argument("--view-only", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true", help="leave the processes that measure memory out")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        measure_memory(arguments)
        return
    report(arguments)


def report(arguments: argparse.Namespace) -> None:
    gpu = arguments.device != "cpu"
    print(
        f"{arguments.arch}, batch {arguments.batch}, 2 + {arguments.local_crops} crops, K = {arguments.prototypes:,}, "
        f"{describe(torch.device(arguments.device))}"
    )
    dtypes = ["float32", "bfloat16"] if arguments.dtype == "both" else [arguments.dtype]
    names = [f"{who}-{dtype}" for dtype in dtypes for who in ("plain", "ours")]
    if "ours-float16" in names:  # ours trains in bfloat16 wherever the published code trains in float16
        names[names.index("ours-float16")] = "ours-bfloat16"
    if not gpu and "plain-float32" not in names:
        names.insert(0, "plain-float32")
    seconds = time_steps(names, arguments)
    result: dict[str, float] = {}
    if "ours-float32" in names:
        result["step_float32"] = ratio(seconds["plain-float32"], seconds["ours-float32"])
    if "ours-bfloat16" in names:
        half = [n for n in names if n.startswith("plain") and n != "plain-float32"]
        for name in half:
            print(
                f"ours in bfloat16 against {name}: {ratio(seconds[name], seconds['ours-bfloat16']):.2f} times as fast"
            )
        above = half[0] if gpu else "plain-float32"
        result["step_bfloat16"] = ratio(seconds[above], seconds["ours-bfloat16"])
    if not arguments.no_memory:
        peaks = {name: memory_of(f"step:{name}") for name in names}
        print(f"{'peak memory, MiB':24}" + "".join(f"{peaks[name] / MIB:18,.0f}" for name in names))
        dtype = "float32" if "ours-float32" in names else "bfloat16"
        plain = f"plain-{dtype}" if f"plain-{dtype}" in names else next(n for n in names if n.startswith("plain"))
        result["step_memory"] = peaks[f"ours-{dtype}"] / peaks[plain]
    result["objective_time"] = time_objective(arguments)
    if not arguments.no_memory:
        peaks = {who: memory_of(f"objective:{who}") for who in ("plain", "ours")}
        print(
            f"objective alone, beyond its inputs: plain {peaks['plain'] / MIB:,.0f} MiB, ours {peaks['ours'] / MIB:,.0f} MiB"
        )
        result["objective_memory"] = peaks["ours"] / peaks["plain"]
    print(json.dumps({name: round(value, 3) for name, value in result.items()}))


if __name__ == "__main__":
    main()
