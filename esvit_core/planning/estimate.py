"""The estimate of a run, and what to change where it does not fit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import psutil
import torch

from esvit_core.config import Config
from esvit_core.errors import UserError
from esvit_core.models.precision import choose_precision
from esvit_core.planning.count_operations import Demand, count_demand, shares
from esvit_core.planning.rehearse import Rehearsal, rehearse

UTILISATION = 0.10  # of a GPU's peak: assumed, not measured; window attention in many small products stays far from it
FREE_SHARE = 0.92  # of a device's memory: the rest is the driver's, or lost between tensors


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, from its maker's data sheet.

    Attributes:
        name: in full.
        flops: dense operations a second, in bfloat16 on its tensor cores and in float32 beside them.
        memory: bytes.
    """

    name: str
    flops: dict[torch.dtype, float]
    memory: float


GPUS = {
    "h200": Gpu("NVIDIA H200 SXM", {torch.bfloat16: 989e12, torch.float32: 67e12}, 141e9),
    "h100": Gpu("NVIDIA H100 SXM", {torch.bfloat16: 989e12, torch.float32: 67e12}, 80e9),
    "a100": Gpu("NVIDIA A100 SXM 80 GB", {torch.bfloat16: 312e12, torch.float32: 19.5e12}, 80e9),
}


@dataclass(frozen=True)
class Plan:
    """The estimate of a run.

    Attributes:
        device: what it runs on, in words.
        on_cpu: it is this machine's processors, whose processes share one memory.
        devices: how many of them, a process each.
        dtype: of the networks' arithmetic.
        demand: of each process.
        images_per_process: of each process and step.
        at_once: of these worked off at a time.
        bytes: most memory held on a device, of all processes on it.
        memory: of the device, bytes.
        images_per_second: of all devices.
        source: where speed and memory come from.
        steps, seconds: of the whole training.
    """

    device: str
    on_cpu: bool
    devices: int
    dtype: torch.dtype
    demand: Demand
    images_per_process: int
    at_once: int
    bytes: float
    memory: float
    images_per_second: float
    source: str
    steps: int
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether a step finds the memory that it needs."""
        return self.bytes <= FREE_SHARE * self.memory

    def cost(self, price: float) -> float:
        """What the training costs at ``price`` for each device and hour."""
        return price * self.devices * self.seconds / 3600


def plan_run(config: Config, gpu: str, gpus: int, images: int, utilisation: float = UTILISATION) -> Plan:
    """Estimate the training of ``config``.

    Args:
        config: of the run.
        gpu: one of :data:`GPUS`, or ``cpu``: this machine, which takes a few real steps.
        gpus: how many.
        images: training images.
        utilisation: share of a GPU's peak that the step reaches.

    Raises:
        UserError: the batch does not go round, the images do not make one, or the recipe has no such network.
    """
    steps = images // config.training.batch_size * config.training.epochs
    if steps == 0:
        raise UserError(
            f"--images {images}: expected at least training.batch_size, which is {config.training.batch_size}"
        )
    if gpu == "cpu":
        return _on_cpu(config, steps)
    if gpus > config.training.batch_size:
        raise UserError(f"--gpus {gpus}: expected at most training.batch_size, which is {config.training.batch_size}")
    kind = GPUS[gpu]
    dtype = torch.float32 if config.training.precision == "float32" else torch.bfloat16
    demand = count_demand(config, dtype)
    images_per_process, at_once = shares(config, gpus)
    rate = gpus * utilisation * kind.flops[dtype] / demand.flops
    source = f"counted operations, at {utilisation:.0%} of the GPU's peak: assumed, not measured"
    return Plan(
        device=kind.name,
        on_cpu=False,
        devices=gpus,
        dtype=dtype,
        demand=demand,
        images_per_process=images_per_process,
        at_once=at_once,
        bytes=demand.bytes(at_once),
        memory=kind.memory,
        images_per_second=rate,
        source=source,
        steps=steps,
        seconds=steps * config.training.batch_size / rate,
    )


def _on_cpu(config: Config, steps: int) -> Plan:
    dtype = choose_precision(config.training.precision, torch.device("cpu")).dtype
    demand = count_demand(config, dtype, "cpu")
    seen: Rehearsal = rehearse(config, demand.flops)
    images_per_process, at_once = shares(config, seen.processes)
    seconds = seen.seconds_of(images_per_process)
    return Plan(
        device=f"this machine, {seen.threads} threads a process",
        on_cpu=True,
        devices=seen.processes,
        dtype=dtype,
        demand=demand,
        images_per_process=images_per_process,
        at_once=at_once,
        bytes=seen.processes * seen.bytes_of(at_once),
        memory=float(psutil.virtual_memory().total),
        images_per_second=config.training.batch_size / seconds,
        source=f"steps on {seen.images[0]} and {seen.images[1]} images that were taken here",
        steps=steps,
        seconds=steps * seconds,
    )


def advice(config: Config, plan: Plan) -> list[str]:
    """What to change so that a plan that does not fit does: settings, each with the memory that it leads to."""
    room, found = FREE_SHARE * plan.memory, []
    processes = plan.devices if plan.on_cpu else 1  # that share the memory
    most = plan.demand.most_images(room / processes)
    if most >= 2:
        parts = math.ceil(plan.images_per_process / most)
        found.append(
            f"--set training.max_images_per_process={-(-plan.images_per_process // parts)}: the same batch in {parts} parts"
        )
    if not config.launch.activation_checkpointing:
        launch = config.launch.model_copy(update={"activation_checkpointing": True})
        kind = "cpu" if plan.on_cpu else "cuda"
        less = count_demand(config.model_copy(update={"launch": launch}), plan.dtype, kind)
        amount = processes * less.bytes(plan.at_once) / 1e9
        fits = "fits" if 1e9 * amount <= room else "not enough alone"
        found.append(
            f"--set launch.activation_checkpointing=true: {amount:.1f} GB, {fits}; a third more time, the same numbers"
        )
    if most >= 1 and not plan.on_cpu:
        found.append(f"--gpus {plan.devices * math.ceil(plan.images_per_process / most)}")
    if not most:
        found.append("a smaller model or fewer prototypes (head.out_dim): not one image fits")
    return found
