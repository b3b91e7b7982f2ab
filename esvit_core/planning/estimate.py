"""Estimate what a run requires, and suggest changes where it does not fit.

FLOPs and memory are counted. Time and cost need a measured speed: of a GPU the user gives it, and this machine's processor
is measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import psutil
import torch

from esvit_core.config import Config
from esvit_core.errors import UserError
from esvit_core.losses.strategy import wants_lazy_logits
from esvit_core.models.precision import choose_precision
from esvit_core.planning.count_operations import Demand, count_demand
from esvit_core.planning.rehearse import rehearse

FREE_SHARE = 0.92  # of a device's memory; the driver and fragmentation take the rest


@dataclass(frozen=True)
class Gpu:
    """A GPU model, from the vendor's data sheet.

    Attributes:
        name: full name.
        memory: bytes.
    """

    name: str
    memory: float


GPUS = {
    "h200": Gpu("NVIDIA H200 SXM", 141e9),
    "h100": Gpu("NVIDIA H100 SXM", 80e9),
    "a100": Gpu("NVIDIA A100 SXM 80 GB", 80e9),
}


@dataclass(frozen=True)
class Plan:
    """The estimate of a run.

    Attributes:
        device: name of the device.
        on_cpu: whether it is this machine's processor, whose processes share one memory.
        devices: number of devices, with one process each.
        dtype: dtype in which the networks compute.
        demand: what a step requires of each process.
        batch_size: global batch, images.
        images_per_process: images per process and step.
        micro_batch: images that a process computes at a time.
        bytes: peak memory on a device, over all its processes.
        memory: memory of the device, bytes.
        images_per_second: measured speed of all devices together; None: it is not known.
        source: where the speed comes from.
        steps: steps of the whole training.
    """

    device: str
    on_cpu: bool
    devices: int
    dtype: torch.dtype
    demand: Demand
    batch_size: int
    images_per_process: int
    micro_batch: int
    bytes: float
    memory: float
    images_per_second: float | None
    source: str
    steps: int

    @property
    def fits(self) -> bool:
        """Whether a step fits into the memory of the device."""
        return self.bytes <= FREE_SHARE * self.memory

    @property
    def step_seconds(self) -> float | None:
        """Time of a step; None where the speed is not known."""
        return None if self.images_per_second is None else self.batch_size / self.images_per_second

    @property
    def seconds(self) -> float | None:
        """Time of the whole training; None where the speed is not known."""
        return None if self.step_seconds is None else self.steps * self.step_seconds

    def cost(self, price: float) -> float | None:
        """Cost of the training at ``price`` per device-hour; None where the speed is not known."""
        return None if self.seconds is None else price * self.devices * self.seconds / 3600


def plan_run(config: Config, gpu: str, gpus: int, images: int, images_per_second: float | None = None) -> Plan:
    """Estimate the training of ``config``.

    Args:
        config: configuration of the run.
        gpu: a key of :data:`GPUS`, or ``cpu``: this machine, which runs a few real steps to measure its speed.
        gpus: number of GPUs.
        images: number of training images.
        images_per_second: measured speed of all GPUs together; None: it is not known, and neither are time and cost.

    Raises:
        UserError: there are fewer images than a batch needs or more GPUs than images in a batch, the network does not
            exist, or a speed is given for ``cpu``.
    """
    batch_size = config.training.batch_size
    steps = images // batch_size * config.training.epochs
    if steps == 0:
        raise UserError(f"--images {images}: expected at least training.batch_size, which is {batch_size}")
    if gpu == "cpu":
        if images_per_second is not None:
            raise UserError("--images-per-second: no effect with --gpu cpu, whose speed is measured here; leave it out")
        return _on_cpu(config, steps)
    if gpus > batch_size:
        raise UserError(f"--gpus {gpus}: expected at most training.batch_size, which is {batch_size}")
    kind = GPUS[gpu]
    dtype = torch.float32 if config.training.precision == "float32" else torch.bfloat16
    demand = count_demand(config, dtype)
    images_per_process = config.training.largest_share(gpus)
    micro_batch = config.training.micro_batch(gpus)
    stored = micro_batch * demand.logit_bytes
    if config.training.lazy_logits == "auto" and wants_lazy_logits("auto", stored, kind.memory):
        demand = count_demand(_with_lazy_logits(config), dtype)
    return Plan(
        device=kind.name,
        on_cpu=False,
        devices=gpus,
        dtype=dtype,
        demand=demand,
        batch_size=batch_size,
        images_per_process=images_per_process,
        micro_batch=micro_batch,
        bytes=demand.bytes(micro_batch),
        memory=kind.memory,
        images_per_second=images_per_second,
        source="not measured" if images_per_second is None else "from --images-per-second",
        steps=steps,
    )


def _on_cpu(config: Config, steps: int) -> Plan:
    dtype = choose_precision(config.training.precision, torch.device("cpu")).dtype
    demand = count_demand(config, dtype, "cpu")
    rehearsal = rehearse(config, demand.flops)
    images_per_process = config.training.largest_share(rehearsal.processes)
    micro_batch = config.training.micro_batch(rehearsal.processes)
    return Plan(
        device=f"this machine, {rehearsal.threads} threads per process",
        on_cpu=True,
        devices=rehearsal.processes,
        dtype=dtype,
        demand=demand,
        batch_size=config.training.batch_size,
        images_per_process=images_per_process,
        micro_batch=micro_batch,
        bytes=rehearsal.processes * rehearsal.bytes_of(micro_batch),
        memory=float(psutil.virtual_memory().total),
        images_per_second=config.training.batch_size / rehearsal.seconds_of(images_per_process),
        source=f"measured here in steps on {rehearsal.images[0]} and {rehearsal.images[1]} images",
        steps=steps,
    )


def _with_lazy_logits(config: Config) -> Config:
    return config.model_copy(update={"training": config.training.model_copy(update={"lazy_logits": True})})


def advice(config: Config, plan: Plan) -> list[str]:
    """Suggest settings with which a plan that does not fit would fit, each with the memory that results."""
    room, found = FREE_SHARE * plan.memory, []
    processes = plan.devices if plan.on_cpu else 1  # processes that share the memory
    most = plan.demand.most_images(room / processes)
    if most >= 2:
        parts = math.ceil(plan.images_per_process / most)
        found.append(
            f"--set training.max_images_per_process={-(-plan.images_per_process // parts)}: the same batch in {parts} micro-batches"
        )
    if not config.launch.activation_checkpointing:
        launch = config.launch.model_copy(update={"activation_checkpointing": True})
        kind = "cpu" if plan.on_cpu else "cuda"
        less = count_demand(config.model_copy(update={"launch": launch}), plan.dtype, kind)
        amount = processes * less.bytes(plan.micro_batch) / 1e9
        fits = "fits" if 1e9 * amount <= room else "not enough by itself"
        found.append(
            f"--set launch.activation_checkpointing=true: {amount:.1f} GB, {fits}; a third slower, the same numbers"
        )
    if not plan.on_cpu and config.training.lazy_logits is not True:
        amount = count_demand(_with_lazy_logits(config), plan.dtype).bytes(plan.micro_batch)
        if amount < plan.bytes:
            fits = "fits" if amount <= room else "not enough by itself"
            found.append(
                f"--set training.lazy_logits=true: {amount / 1e9:.1f} GB, {fits}; the same numbers up to rounding"
            )
    if most >= 1 and not plan.on_cpu:
        found.append(f"--gpus {plan.devices * math.ceil(plan.images_per_process / most)}")
    if not most:
        found.append("a smaller model or fewer prototypes (head.out_dim): not even one image fits")
    return found
