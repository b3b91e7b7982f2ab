"""`esvit plan`: estimate the memory, time and cost of a training."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from esvit_core.config import Config
from esvit_core.planning.checkpoint_cost import Saving, saving
from esvit_core.planning.estimate import Plan, advice, plan_run


def plan(
    config: Config, gpu: str, gpus: int, images: int, price: float | None, utilisation: float, as_json: bool
) -> None:
    """Print the estimate."""
    made = plan_run(config, gpu, gpus, images, utilisation)
    changes = [] if made.fits else advice(config, made)
    if as_json:
        print(json.dumps(_fields(config, made, price, changes), indent=1))
    else:
        print("\n".join(_lines(config, made, images, price, changes)))


def _fields(config: Config, plan: Plan, price: float | None, changes: list[str]) -> dict[str, Any]:
    return {
        "device": plan.device,
        "devices": plan.devices,
        "precision": str(plan.dtype).removeprefix("torch."),
        "parameters": plan.demand.parameters,
        "flops_per_image": plan.demand.flops,
        "bytes": round(plan.bytes),
        "memory": round(plan.memory),
        "fits": plan.fits,
        "images_per_second": plan.images_per_second,
        "source": plan.source,
        "steps": plan.steps,
        "seconds": plan.seconds,
        "checkpoints": asdict(_saving(config, plan)),
        "cost": None if price is None else plan.cost(price),
        "advice": changes,
    }


def _lines(config: Config, plan: Plan, images: int, price: float | None, changes: list[str]) -> list[str]:
    demand, training, precision = plan.demand, config.training, str(plan.dtype).removeprefix("torch.")
    parts = "" if plan.at_once == plan.images_per_process else f", {plan.at_once} at a time"
    fits = "fits" if plan.fits else "does not fit"
    lines = [
        f"{config.recipe}: {config.model.arch}, {demand.parameters / 1e6:.1f} M parameters with heads, "
        f"{demand.flops / 1e9:,.1f} GFLOP per image, {precision}",
        f"on      {plan.devices} x {plan.device}, {plan.images_per_process} images each per step{parts}",
        f"memory  {plan.bytes / 1e9:.1f} of {plan.memory / 1e9:.1f} GB: {fits}",
    ]
    if changes:
        return [*lines, "to make it fit, change one of:", *(f"    {change}" for change in changes)]
    lines += [
        f"speed   {plan.images_per_second:,.1f} images/s ({plan.source})",
        f"time    {_duration(plan.seconds)}: {training.epochs} epochs of {images:,} images, {plan.steps:,} steps",
    ]
    lines += _checkpoint_lines(config, _saving(config, plan))
    if price is not None:
        lines.append(f"cost    {plan.cost(price):,.0f} at {price:g} per GPU-hour")
    return lines


def _saving(config: Config, plan: Plan) -> Saving:
    return saving(config, plan.demand.checkpoint_bytes, plan.seconds / plan.steps)


def _checkpoint_lines(config: Config, made: Saving) -> list[str]:
    every = f"saved   {made.bytes / 1e9:.2g} GB every {made.lost_seconds / 60:.2g} minutes"
    if config.training.checkpoint_minutes != "auto":
        return [
            f"{every}: a training that is killed loses at most that much; {made.bytes_an_hour / 1e9:,.0f} GB per hour"
        ]
    few, many = (amount / 1e9 for amount in made.pod_bytes_an_hour)
    return [
        f"{every}, and when it is asked to stop; {made.bytes_an_hour / 1e9:,.1f} GB per hour",
        f"        in a step's own pod: at most {made.pod_lost_seconds:.0f} s of training lost if the store accepts "
        f"{made.store_rate / 1e6:,.0f} MB/s; {few:,.0f} to {many:,.0f} GB per hour",
    ]


def _duration(seconds: float) -> str:
    if seconds < 5400:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 2 * 86400 else f"{seconds / 86400:.1f} days"
