"""Time and memory of a training step, part by part: ours, and the same step written the published way.

    python benchmarks/step.py --arch swin_tiny_w7 --batch 8
    python benchmarks/step.py --device cuda --batch 128 --rounds 10

Each implementation has a process of its own, and they take turns, step by step, while the others sleep; the ratios
are medians over the rounds, so that other load on the machine falls on all alike. On a machine that is busy with
other things ``--clock cpu`` compares processor time instead. Peak memory is resident memory, interpreter and libraries
included, or on a GPU what torch has allocated. The last line is JSON: time ratios are plain / ours, memory ratios
ours / plain. On a CPU the plain step of ``step_bfloat16`` is the float32 one: that is what the published code
computes there. On a GPU it is the plain step under autocast in the half precision that was asked for.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from machine import describe, peak_memory, reset_peak_memory
from plain_step import PlainObjective, PlainStep

from esvit_core.config import Config
from esvit_core.data.loader import Batch, TrainLoader
from esvit_core.losses import Objective
from esvit_core.models.multicrop import NetworkOutput
from esvit_core.training.allocator import keep_freed_memory
from esvit_core.training.clock import PARTS, StepClock
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


def implementation(name: str) -> tuple[Callable[..., Any], torch.dtype]:
    """``ours-bfloat16`` and the like."""
    who, dtype = name.split("-")
    makers: dict[str, Callable[..., Any]] = {"ours": OurStep, "plain": PlainStep}
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


# One process an implementation


def work(arguments: argparse.Namespace) -> None:
    """Body of a worker: answers each word on its input with a line of JSON."""
    who, _ = arguments.worker.split("-")
    if who == "ours":  # as a training process does first
        keep_freed_memory()
    what = ObjectiveWork(who, arguments) if arguments.worker.endswith("-objective") else StepWork(arguments)
    for line in sys.stdin:
        print(json.dumps(getattr(what, line.strip())()), flush=True)


class StepWork:
    """Whole steps, steps by parts, and their peak memory."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.config, self.device = config_of(arguments), torch.device(arguments.device)
        make, dtype = implementation(arguments.worker)
        self.take_step = make(self.config, self.device, dtype)
        self.inputs = crops_of(self.config, arguments.batch), Schedules(self.config, 1).at(20)
        self.now = CLOCKS[arguments.clock]

    def run(self) -> float:
        start = self._wait()
        self.take_step(*self.inputs)
        return self._wait() - start

    def parts(self) -> dict[str, float]:
        clock, step = StepClock(self.device, self.now), self.take_step
        with clock.attached(step.student, step.teacher, step.objective, step.optimizer), clock.step():
            step(*self.inputs)
        return clock.seconds

    def memory(self) -> int:
        reset_peak_memory(self.device)
        self.take_step(*self.inputs)
        return peak_memory(self.device)

    def _wait(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return self.now()


class ObjectiveWork:
    """The objective alone, forward and backward."""

    def __init__(self, who: str, arguments: argparse.Namespace) -> None:
        self.config, self.device = config_of(arguments), torch.device(arguments.device)
        self.outputs = outputs_of(self.config, arguments.batch, self.device, torch.float32)
        self.objective = objective_of(who, self.config, self.device)
        self.now = CLOCKS[arguments.clock]

    def run(self) -> float:
        start = StepWork._wait(self)  # type: ignore[arg-type]
        run_objective(self.objective, self.outputs)
        return StepWork._wait(self) - start  # type: ignore[arg-type]

    def memory(self) -> int:
        """Beyond what is given."""
        for logits in self.outputs[0][:2]:
            logits.grad = None
        before = reset_peak_memory(self.device)
        run_objective(self.objective, self.outputs)
        return peak_memory(self.device) - before


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class Worker:
    """The other end of :func:`work`."""

    def __init__(self, name: str) -> None:
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", name]
        self.name = name
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, word: str) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} failed")
        return json.loads(line)

    def end(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def in_turn(names: list[str], arguments: argparse.Namespace) -> Measured:
    """Let the named implementations take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    parts: dict[str, dict[str, float]] = {}
    memory = {}
    workers = [Worker(name) for name in names]
    for worker in workers:  # the objective's memory is that of its first run, before anything is kept
        first = worker("memory")
        memory[worker.name] = first if "objective" in worker.name else worker("memory")
    for _ in range(arguments.rounds):
        for worker in workers:
            seconds[worker.name].append(worker("run"))
    for worker in workers:
        if "objective" not in worker.name:
            parts[worker.name] = worker("parts")
        worker.end()
    return Measured(seconds, parts, memory)


@dataclass
class Measured:
    """Of each implementation the seconds of every round, one round by parts, and the peak memory in bytes."""

    seconds: dict[str, list[float]]
    parts: dict[str, dict[str, float]]
    memory: dict[str, int]

    def ratio(self, above: str, below: str) -> float:
        """How many times as fast ``below`` is: the median of the rounds' own ratios."""
        rounds = zip(self.seconds[above], self.seconds[below], strict=True)
        return statistics.median(a / b for a, b in rounds)

    def table(self, batch: int) -> None:
        names = list(self.seconds)
        medians = {name: statistics.median(values) for name, values in self.seconds.items()}
        print(f"{'seconds':24}" + "".join(f"{name:>18}" for name in names))
        for part in PARTS:
            print(f"{part:24}" + "".join(f"{self.parts[name][part]:18.3f}" for name in names))
        print(f"{'whole step, median':24}" + "".join(f"{medians[name]:18.3f}" for name in names))
        print(f"{'pictures a second':24}" + "".join(f"{batch / medians[name]:18.2f}" for name in names))
        print(f"{'peak memory, MiB':24}" + "".join(f"{self.memory[name] / MIB:18,.0f}" for name in names))


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
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
    else:
        print(json.dumps({name: round(value, 3) for name, value in report(arguments).items()}))


def implementations(arguments: argparse.Namespace) -> list[str]:
    """Names of those to compare, ``plain-float32`` and the like."""
    gpu = arguments.device != "cpu"
    dtypes = ["float32", "bfloat16"] if arguments.dtype == "both" else [arguments.dtype]
    names = [f"{who}-{dtype}" for dtype in dtypes for who in ("plain", "ours")]
    if not gpu and arguments.dtype == "both":
        names.remove("plain-bfloat16")
    if "ours-float16" in names:  # ours trains in bfloat16 wherever the published code trains in float16
        names[names.index("ours-float16")] = "ours-bfloat16"
    if not gpu and "plain-float32" not in names:
        names.insert(0, "plain-float32")
    return names


def report(arguments: argparse.Namespace) -> dict[str, float]:
    """Print the tables; the figures of the last line."""
    gpu, names = arguments.device != "cpu", implementations(arguments)
    print(
        f"{arguments.arch}, batch {arguments.batch}, 2 + {arguments.local_crops} crops, K = {arguments.prototypes:,}, "
        f"{describe(torch.device(arguments.device))}, {arguments.rounds} rounds, {arguments.clock} time",
        flush=True,
    )
    steps = in_turn(names, arguments)
    steps.table(arguments.batch)
    result: dict[str, float] = {}
    if "ours-float32" in names:
        result["step_float32"] = steps.ratio("plain-float32", "ours-float32")
    if "ours-bfloat16" in names:
        half = [name for name in names if name.startswith("plain") and name != "plain-float32"]
        for name in half:
            print(f"ours-bfloat16 against {name}: {steps.ratio(name, 'ours-bfloat16'):.2f} times as fast")
        result["step_bfloat16"] = steps.ratio(half[0] if gpu and half else "plain-float32", "ours-bfloat16")
    for name in names:
        base = next(n for n in names if n.startswith("plain"))
        share = steps.memory[name] / steps.memory[base]
        if name != base:
            print(f"{name} against {base}: {steps.ratio(base, name):.2f} times as fast, {share:.2f} of its memory")
    ours = names[-1]  # what `training.precision: auto` takes: the half precision, where it was measured
    plain = next(name for name in names if name.startswith("plain"))
    result["step_memory"] = steps.memory[ours] / steps.memory[plain]
    objectives = in_turn(["plain-objective", "ours-objective"], arguments)
    for name, values in objectives.seconds.items():
        beyond = objectives.memory[name] / MIB
        print(f"{name}, forward and backward: {statistics.median(values):.3f} s, {beyond:,.0f} MiB beyond its inputs")
    result["objective_time"] = objectives.ratio("plain-objective", "ours-objective")
    result["objective_memory"] = objectives.memory["ours-objective"] / objectives.memory["plain-objective"]
    return result


if __name__ == "__main__":
    main()
