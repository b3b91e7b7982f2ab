"""Measure time and memory of a training step, part by part: ours, and the same step as in the published code.

    python benchmarks/step.py --arch swin_tiny_w7 --batch 8
    python benchmarks/step.py --device cuda --batch 128 --rounds 10
    python benchmarks/step.py --reference ../esvit
    python benchmarks/step.py --reference ../esvit --recipe esvit-runs/<run>/config.yaml

With ``--reference``, ours is compared with the step of a checkout of the published code itself.

Each implementation runs in its own process. First, each one's peak memory is measured alone: ``--rounds 0`` ends there,
for batches with which the machine cannot hold all implementations at once. Then they take turns, two steps each, of which
the second is timed, while the others sleep; the ratios are medians over the rounds, so that other load on the machine
affects all alike. On a busy machine, ``--clock cpu`` compares processor time instead. Peak memory is resident memory,
including interpreter and libraries, or on a GPU the memory allocated by torch. The last line is JSON: time ratios are
plain / ours, memory ratios ours / plain. On a CPU, ``step_bfloat16`` compares with the plain step in float32, because
that is what the published code computes there. On a GPU, it compares with the plain step under autocast in the requested
half precision.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from machine import describe, peak_memory, reset_peak_memory
from plain_step import PlainObjective, PlainStep
from published_step import PublishedStep, load, published_objective

from esvit_core.config import Config
from esvit_core.data.loading.loader import Batch, TrainLoader
from esvit_core.losses import Objective
from esvit_core.losses.strategy import select_strategy
from esvit_core.models.multicrop import NetworkOutput
from esvit_core.planning.fake_network import fake_crops, fake_network
from esvit_core.runs.environment import TORCH_ENVIRONMENT
from esvit_core.training.allocator import keep_freed_memory
from esvit_core.training.distributed.processes import World
from esvit_core.training.loop import training_step
from esvit_core.training.optim.schedules import Schedules, ScheduleValues
from esvit_core.training.state import apply_activation_checkpointing_, assemble_train_state
from esvit_core.training.step_timer import PARTS, StepTimer

MIB = 2**20


@dataclass
class SameBatch:
    """A stand-in for the loader: an epoch of one step."""

    steps_per_epoch: int = 1


class OurStep:
    """The step of :mod:`esvit_core.training.loop` on given crops."""

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype) -> None:
        training = config.training.model_copy(update={"precision": str(dtype).removeprefix("torch.")})
        config = config.model_copy(update={"training": training})
        self.state = assemble_train_state(config, World(0, 1, device, None), cast(TrainLoader, SameBatch()))
        if config.launch.activation_checkpointing:
            apply_activation_checkpointing_(self.state.student, config.model.arch)
        self.student, self.teacher = self.state.student, self.state.teacher
        self.objective, self.optimizer = self.state.objective, self.state.optimizer

    def __call__(self, crops: list[torch.Tensor], at: ScheduleValues) -> torch.Tensor:
        """Run one step and return the loss."""
        batch = Batch(crops, np.arange(len(crops[0])), 0.0)
        return training_step(self.state, batch, at)[0].total.detach()


def make_step(options: argparse.Namespace, config: Config, device: torch.device) -> Any:
    """Build the step that ``options.worker`` names, such as ``ours-bfloat16``."""
    who, dtype = options.worker.split("-")
    makers: dict[str, Callable[..., Any]] = {
        "ours": OurStep,
        "plain": PlainStep,
        "published": lambda *args: PublishedStep(*args, options.reference),
    }
    return makers[who](config, device, getattr(torch, dtype))


def config_of(options: argparse.Namespace) -> Config:
    if options.recipe is not None:
        return Config.load(options.recipe, ["optimizer.freeze_last_layer_epochs=0"])
    return Config.from_mapping(
        {
            "model": {"arch": options.arch, "drop_path": options.drop_path},
            "head": {"out_dim": options.prototypes},
            "augment": {"local_crops": {"size": 96, "number": options.local_crops, "scale": (0.05, 0.4)}},
            "objective": {"region": not options.view_only},
            "optimizer": {"freeze_last_layer_epochs": 0},
            "training": {"batch_size": options.batch, "epochs": 100},
            "launch": {"activation_checkpointing": options.activation_checkpointing},
        }
    )


def crops_of(config: Config, batch: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 3, size, size, generator=generator) for size in config.augment.crop_sizes]


# The objective alone


def outputs_of(config: Config, batch: int, device: torch.device, dtype: torch.dtype) -> list[NetworkOutput]:
    """Random outputs with as many regions as the network has; those of the student require gradients."""
    generator = torch.Generator().manual_seed(0)
    with fake_network(config) as network:
        counts = network(fake_crops(1, config.augment.crop_sizes)).regions_per_crop

    def draw(rows: int, width: int) -> torch.Tensor:
        return (0.3 * torch.randn(rows, width, generator=generator)).to(device, dtype)

    outputs = []
    for regions in (counts, counts[:2]):
        views, rows, K = batch * len(regions), batch * sum(regions), config.head.out_dim
        outputs.append(NetworkOutput(draw(views, K), draw(rows, K), draw(rows, 768), regions))
    for logits in outputs[0][:2]:
        logits.requires_grad_()
    return outputs


def objective_of(who: str, config: Config, device: torch.device, reference: Path | None) -> Callable[..., torch.Tensor]:
    if who == "plain":
        return PlainObjective(config).to(device)
    if who == "published":
        assert reference is not None
        published = published_objective(load(reference)[2], config).to(device)
        form = as_published if config.objective.region else lambda output: output.view_logits
        return lambda student, teacher, _: published(form(student), form(teacher), 0, None)
    strategy = select_strategy(device, config.head.out_dim)
    ours = Objective(config.objective, config.head.out_dim, strategy=strategy).to(device)
    return lambda *outputs: ours(*outputs).total


def as_published(output: NetworkOutput) -> tuple[Any, ...]:
    """View logits, region logits, region features, and the number of regions of a global and of a local crop."""
    return output.view_logits, output.region_logits, output.region_features, output.regions_per_crop[::2][:2]


def run_objective(objective: Callable[..., torch.Tensor], outputs: list[NetworkOutput]) -> None:
    for logits in outputs[0][:2]:
        logits.grad = None
    objective(*outputs, 0.05).backward()


# One process per implementation


def work(options: argparse.Namespace) -> None:
    """Answer each command on standard input with a line of JSON: the body of a worker."""
    who, _ = options.worker.split("-")
    if who == "ours":  # as a training process does
        keep_freed_memory()
    what = ObjectiveWork(who, options) if options.worker.endswith("-objective") else StepWork(options)
    for line in sys.stdin:
        print(json.dumps(getattr(what, line.strip())()), flush=True)


class StepWork:
    """Time whole steps and their parts, and measure their peak memory."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.config, self.device = config_of(options), torch.device(options.device)
        self.take_step = make_step(options, self.config, self.device)
        self.inputs = crops_of(self.config, options.batch), Schedules(self.config, 1).at(20)
        self.now = CLOCKS[options.clock]

    def run(self) -> float:
        start = self._wait()
        self.take_step(*self.inputs)
        return self._wait() - start

    def parts(self) -> dict[str, float]:
        clock, step = StepTimer(self.device, self.now), self.take_step
        if not hasattr(step.student, "backbone"):  # the published network does not have these parts
            return {}
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
    """Time the forward and backward pass of the objective alone, and measure its memory."""

    def __init__(self, who: str, options: argparse.Namespace) -> None:
        self.config, self.device = config_of(options), torch.device(options.device)
        self.outputs = outputs_of(self.config, options.batch, self.device, torch.float32)
        self.objective = objective_of(who, self.config, self.device, options.reference)
        self.now = CLOCKS[options.clock]

    def run(self) -> float:
        start = StepWork._wait(self)  # type: ignore[arg-type]
        run_objective(self.objective, self.outputs)
        return StepWork._wait(self) - start  # type: ignore[arg-type]

    def memory(self) -> int:
        """Peak memory beyond the inputs, bytes."""
        for logits in self.outputs[0][:2]:
            logits.grad = None
        before = reset_peak_memory(self.device)
        run_objective(self.objective, self.outputs)
        return peak_memory(self.device) - before


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class Worker:
    """A process that runs :func:`work`, and its commands."""

    def __init__(self, name: str) -> None:
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", name]
        self.name = name
        environment = {**TORCH_ENVIRONMENT, **os.environ} if name.startswith("ours") else None
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

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


def in_turn(names: list[str], options: argparse.Namespace) -> Measured:
    """Measure the named implementations in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    parts: dict[str, dict[str, float]] = {name: {} for name in names}
    memory = {}
    for name in names:  # each alone: together they may need more memory than the machine has
        worker = Worker(name)
        memory[name] = worker("memory")  # for the objective, the first run counts, before memory is cached
        if "objective" not in name:
            memory[name] = worker("memory")
        worker.end()
    workers = [Worker(name) for name in names] if options.rounds else []
    for _ in range(options.rounds):
        for worker in workers:
            worker("run")  # after sleeping, caches are cold and freed memory is gone, unlike in a training
            seconds[worker.name].append(worker("run"))
    for worker in workers:
        if "objective" not in worker.name:
            worker("run")  # as above
            parts[worker.name] = worker("parts")
        worker.end()
    return Measured(seconds, parts, memory)


@dataclass
class Measured:
    """For each implementation: seconds of every round, seconds of each part in one round, peak memory in bytes."""

    seconds: dict[str, list[float]]
    parts: dict[str, dict[str, float]]
    memory: dict[str, int]

    def ratio(self, above: str, below: str) -> float:
        """How many times as fast ``below`` is: the median of the ratios of the rounds; NaN without rounds."""
        rounds = zip(self.seconds[above], self.seconds[below], strict=True)
        return _median(a / b for a, b in rounds)

    def table(self, batch: int) -> None:
        names = list(self.seconds)
        medians = {name: _median(values) for name, values in self.seconds.items()}
        print(f"{'seconds':24}" + "".join(f"{name:>18}" for name in names))
        for part in PARTS if any(self.parts.values()) else ():
            print(f"{part:24}" + "".join(f"{_figure(self.parts[name].get(part)):>18}" for name in names))
        print(f"{'whole step, median':24}" + "".join(f"{_figure(medians[name]):>18}" for name in names))
        print(f"{'images per second':24}" + "".join(f"{_figure(batch / medians[name], 2):>18}" for name in names))
        print(f"{'peak memory, MiB':24}" + "".join(f"{self.memory[name] / MIB:18,.0f}" for name in names))


def _median(values: Iterable[float]) -> float:
    return statistics.median(found) if (found := list(values)) else math.nan


def _figure(value: float | None, digits: int = 3) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="swin_tiny_w7")
    parser.add_argument("--batch", type=int, default=8, help="images per step")
    parser.add_argument("--dtype", choices=["both", "float32", "bfloat16", "float16"], default="both")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--local-crops", type=int, default=8)
    parser.add_argument("--drop-path", type=float, default=0.1)
    parser.add_argument("--view-only", action="store_true")
    parser.add_argument(
        "--activation-checkpointing", action="store_true", help="run ours with launch.activation_checkpointing"
    )
    parser.add_argument(
        "--reference", type=Path, help="checkout of the published code to compare with, instead of the plain step"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timing; 0: measure memory only")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--recipe", help="a recipe, instead of the options for network, crops, batch and prototypes")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.recipe is not None:
        config = config_of(options)
        options.arch, options.batch, options.prototypes = (
            config.model.arch,
            config.training.batch_size,
            config.head.out_dim,
        )
        options.local_crops = sum(kind.number for kind in config.augment.local_kinds)
    return options


def main() -> None:
    options = arguments()
    if options.worker:
        work(options)
    else:
        print(json.dumps({name: round(value, 3) for name, value in report(options).items() if not math.isnan(value)}))


def implementations(options: argparse.Namespace) -> list[str]:
    """Names of the implementations to compare, such as ``plain-float32``; the first is the one to compare ours with."""
    gpu, other = options.device != "cpu", "published" if options.reference else "plain"
    dtypes = ["float32", "bfloat16"] if options.dtype == "both" else [options.dtype]
    names = [f"{who}-{dtype}" for dtype in dtypes for who in (other, "ours")]
    if not gpu and options.dtype == "both":
        names.remove(f"{other}-bfloat16")
    if "ours-float16" in names:  # ours uses bfloat16 where the published code uses float16
        names[names.index("ours-float16")] = "ours-bfloat16"
    if not gpu and f"{other}-float32" not in names:
        names.insert(0, f"{other}-float32")
    return names


def report(options: argparse.Namespace) -> dict[str, float]:
    """Print the tables and return the figures of the last line."""
    gpu, names = options.device != "cpu", implementations(options)
    print(
        f"{options.arch}, batch {options.batch}, 2 + {options.local_crops} crops, K = {options.prototypes:,}, "
        f"{describe(torch.device(options.device))}, {options.rounds} rounds, {options.clock} time",
        flush=True,
    )
    steps = in_turn(names, options)
    steps.table(options.batch)
    base, result = names[0], dict[str, float]()  # the other implementation, in float32 if that was measured
    other = base.split("-")[0]
    half = [name for name in names if name.startswith(other) and not name.endswith("float32")]
    if "ours-float32" in names:
        result["step_float32"] = steps.ratio(base, "ours-float32")
    if "ours-bfloat16" in names:
        result["step_bfloat16"] = steps.ratio(half[0] if gpu and half else base, "ours-bfloat16")
    for name in names[1:]:
        share = steps.memory[name] / steps.memory[base]
        print(f"{name} against {base}: {_figure(steps.ratio(base, name), 2)} times as fast, {share:.2f} of its memory")
    # For the precision that `training.precision: auto` selects: half precision, if it was measured.
    result["step_memory"] = steps.memory[names[-1]] / steps.memory[base]
    objectives = in_turn([f"{other}-objective", "ours-objective"], options)
    for name, values in objectives.seconds.items():
        beyond = objectives.memory[name] / MIB
        print(f"{name}, forward and backward: {_figure(_median(values))} s, {beyond:,.0f} MiB beyond its inputs")
    result["objective_time"] = objectives.ratio(f"{other}-objective", "ours-objective")
    result["objective_memory"] = objectives.memory["ours-objective"] / objectives.memory[f"{other}-objective"]
    return result


if __name__ == "__main__":
    main()
