"""`esvit plan`: what a training requires, estimated before it starts."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from esvit_core.config import Config
from esvit_core.errors import UserError
from esvit_core.planning.checkpoint_cost import CheckpointCost, checkpoint_cost
from esvit_core.planning.estimate import Plan, advice, plan_run

RATE_HINT = "give --images-per-second, from the first minutes of a run (`esvit status` shows it)"


def plan(
    config: Config,
    gpu: str,
    gpus: int,
    images: int,
    price: float | None,
    images_per_second: float | None,
    as_json: bool,
) -> None:
    """Print the estimate.

    Raises:
        UserError: a price is given without the measured speed that the cost follows from.
    """
    if price is not None and gpu != "cpu" and images_per_second is None:
        raise UserError(f"--price {price:g}: the cost of a training on GPUs needs their measured speed; {RATE_HINT}")
    estimate = plan_run(config, gpu, gpus, images, images_per_second)
    changes = [] if estimate.fits else advice(config, estimate)
    if as_json:
        print(json.dumps(_fields(config, estimate, price, changes), indent=1))
    else:
        print("\n".join(_lines(config, estimate, images, price, changes)))


def _fields(config: Config, plan: Plan, price: float | None, changes: list[str]) -> dict[str, Any]:
    return {
        "device": plan.device,
        "devices": plan.devices,
        "precision": str(plan.dtype).removeprefix("torch."),
        "parameters": plan.demand.parameters,
        "flops_per_image": plan.demand.flops,
        "flops": plan.demand.flops * plan.batch_size * plan.steps,
        "bytes": round(plan.bytes),
        "memory": round(plan.memory),
        "fits": plan.fits,
        "images_per_second": plan.images_per_second,
        "source": plan.source,
        "steps": plan.steps,
        "seconds": plan.seconds,
        "checkpoints": asdict(_checkpoint_cost(config, plan)),
        "cost": None if price is None else plan.cost(price),
        "advice": changes,
    }


def _lines(config: Config, plan: Plan, images: int, price: float | None, changes: list[str]) -> list[str]:
    demand, training, dtype = plan.demand, config.training, str(plan.dtype).removeprefix("torch.")
    parts = "" if plan.micro_batch == plan.images_per_process else f", {plan.micro_batch} at a time"
    fits = "fits" if plan.fits else "does not fit"
    lines = [
        f"{config.recipe}: {config.model.arch}, {demand.parameters / 1e6:.1f} M parameters with heads, "
        f"{demand.flops / 1e9:,.1f} GFLOPs per image, {dtype}",
        f"on      {plan.devices} x {plan.device}, {plan.images_per_process} images each per step{parts}",
        f"memory  {plan.bytes / 1e9:.1f} of {plan.memory / 1e9:.1f} GB: {fits}",
    ]
    if changes:
        return [*lines, "to make it fit, one of:", *(f"    {change}" for change in changes)]
    total = demand.flops * plan.batch_size * plan.steps
    lines.append(f"work    {total:.3g} FLOPs: {training.epochs} epochs of {images:,} images, {plan.steps:,} steps")
    if plan.images_per_second is None or plan.seconds is None:
        lines.append(f"speed   not known; for time and cost {RATE_HINT}")
    else:
        lines.append(f"speed   {plan.images_per_second:,.1f} images/s ({plan.source})")
        lines.append(f"time    {_duration(plan.seconds)}")
    lines += _about_checkpoints(config, plan)
    if price is not None and (cost := plan.cost(price)) is not None:
        lines.append(f"cost    {cost:,.0f} at {price:g} per device-hour")
    return lines


def _checkpoint_cost(config: Config, plan: Plan) -> CheckpointCost:
    return checkpoint_cost(config, plan.demand.checkpoint_bytes, plan.step_seconds)


def _about_checkpoints(config: Config, plan: Plan) -> list[str]:
    cost = _checkpoint_cost(config, plan)
    at_least = "at least " if plan.step_seconds is None else ""
    saved = f"saved   {cost.bytes / 1e9:.2g} GB {at_least}every {cost.lost_seconds / 60:.2g} minutes"
    if config.training.checkpoint_minutes != "auto":
        return [
            f"{saved}; a kill without warning loses that much training; {cost.bytes_per_hour / 1e9:,.0f} GB per hour"
        ]
    low, high = (amount / 1e9 for amount in cost.pod_bytes_per_hour)
    return [
        f"{saved}, and on SIGTERM; {at_least}{cost.bytes_per_hour / 1e9:,.1f} GB per hour",
        f"        in a step's own pod: at most {cost.pod_lost_seconds:.0f} s of training lost if the store takes "
        f"{cost.store_rate / 1e6:,.0f} MB/s; {low:,.0f} to {high:,.0f} GB per hour",
    ]


def _duration(seconds: float) -> str:
    if seconds < 5400:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 2 * 86400 else f"{seconds / 86400:.1f} days"
