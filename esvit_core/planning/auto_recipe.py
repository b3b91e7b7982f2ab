"""Gather the facts about data and machine, and resolve the recipe ``auto`` to a configuration."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from esvit_core.config import Config, DataConfig, merge, valid_keys
from esvit_core.config.auto import Facts, allowed_samples, choose, require_enough
from esvit_core.config.auto_choice import Choice
from esvit_core.config.auto_networks import Network, network_like
from esvit_core.config.recipes import domain_text, override, read_recipe
from esvit_core.cpu_flags import cpu_bfloat16
from esvit_core.data.ingest.survey import survey_source
from esvit_core.errors import UserError
from esvit_core.planning.start_network import StartNetwork, find_network
from esvit_core.runs.environment import available_cores
from esvit_core.storage import ObjectStore

_COUNTED = ("model", "augment", "head")  # sections that change the operations of a step
_MEMORY_UNIT = 2**30
MIN_SAMPLES_FROM_WEIGHTS = 20_000  # images times epochs, below which smaller crops are chosen; an assumption


@dataclass(frozen=True)
class AutoRecipe:
    """The recipe ``auto``, resolved.

    Attributes:
        config: the configuration, with the overrides of the user.
        choice: what was chosen and why.
        overrides: the overrides of the user.
        domain: recipe for a kind of images; None: there is none.
    """

    config: Config
    choice: Choice
    overrides: tuple[str, ...]
    domain: str | None = None

    def lines(self) -> list[str]:
        """Return the choice for the user; the overrides take precedence."""
        given = [f"  given: {', '.join(self.overrides)}"] if self.overrides else []
        kind = [] if self.domain is None else [f"  {self.domain}: {_first_line(self.domain)}"]
        return ["recipe auto (change a line with --set):", *self.choice.lines(self._overridden()), *kind, *given]

    def _overridden(self) -> dict[str, str]:
        """Return the values of the overridden settings, by key."""
        values: dict[str, str] = {}
        for item in self.overrides:
            key = item.partition("=")[0].strip()
            value: Any = self.config
            for name in key.split("."):
                value = getattr(value, name)
            values[key] = f"{value:,}" if isinstance(value, int) else str(value)
        return values


def resolve_auto(
    source: str,
    overrides: Iterable[str] = (),
    hours: float | None = None,
    *,
    domain: str | None = None,
    machine: Facts | None = None,
    store: ObjectStore | None = None,
    init_store: ObjectStore | None = None,
) -> AutoRecipe:
    """Choose a recipe for the images of a source on this machine.

    Args:
        source: folder, tar, zip, or ``s3://bucket/prefix``.
        overrides: items ``key=value``, which take precedence.
        hours: time for the whole run; None: one on a CPU, eight on a GPU.
        domain: recipe for a kind of images, whose settings precede the choice.
        machine: what trains; None: this machine.
        store: store of an ``s3://`` source; None: the one that ``ESVIT_S3_*`` name.
        init_store: store of the initial weights, if they are in one.

    Raises:
        UserError: the source cannot be read or has too few images, an override is invalid, or the network of the initial
            weights is not known.
    """
    items, known = tuple(overrides), list(valid_keys())
    given: dict[str, Any] = {} if domain is None else read_recipe(domain)
    for item in items:
        override(given, item, known)
    # A wrong value is an error before the source is listed. The region task excludes mixup, and may not be chosen.
    valid = Config.from_mapping(merge({"objective": {"region": False}}, given), "--set")
    if valid.init.source is not None and valid.init.load != "backbone":
        raise UserError(
            f"init.load {valid.init.load}: recipe auto starts from a backbone, with new heads; name the recipe of the source "
            "with --recipe, such as esvit-runs/<run id>/config.yaml"
        )
    facts = replace(machine or machine_facts(), **data_facts(source, valid.data, store), hours=hours)
    choice = _choose(facts, given, valid, init_store)
    config = Config.from_mapping(merge(choice.values, given), origin="recipe auto")
    return AutoRecipe(config, choice, items, domain)


def data_facts(source: str, data: DataConfig, store: ObjectStore | None = None) -> dict[str, Any]:
    """Return the facts about the images, as arguments of :class:`~esvit_core.config.auto.Facts`.

    Raises:
        UserError: the source cannot be read, or has fewer than 50 images.
    """
    survey = survey_source(source, data, store)
    require_enough(survey.images, source)
    images, held_out = survey.images, survey.held_out
    if data.max_images is not None and data.max_images < images:
        held_out = None if held_out is None else round(held_out * data.max_images / images)
        images = data.max_images
    side = min(survey.short_side, data.store_short_side or survey.short_side)
    return {"images": images, "held_out": held_out, "labelled": survey.classes > 1, "short_side": side}


def machine_facts() -> Facts:
    """Return the facts about this machine; those about the data are still zero."""
    cores, memory = available_cores(), psutil.virtual_memory().total
    nothing: dict[str, Any] = {"images": 0, "held_out": None, "labelled": False, "short_side": 0}
    if any(Path("/dev").glob("nvidia[0-9]*")):  # without a GPU, torch, which takes seconds, is not imported
        import torch

        if torch.cuda.is_available():
            gpu = torch.cuda.get_device_properties(0)
            return Facts(
                **nothing,
                device="cuda",
                devices=torch.cuda.device_count(),
                memory=_whole(gpu.total_memory),
                cores=cores,
                bfloat16=torch.cuda.is_bf16_supported(including_emulation=False),
                multiprocessors=gpu.multi_processor_count,
                capability=10 * gpu.major + gpu.minor,
            )
    return Facts(**nothing, device="cpu", devices=1, memory=_whole(memory), cores=cores, bfloat16=bool(cpu_bfloat16()))


def _first_line(domain: str) -> str:
    """Return what a recipe for a kind of images changes, and why."""
    return domain_text(domain).splitlines()[0].removeprefix("#").strip()


def _choose(facts: Facts, given: dict[str, Any], valid: Config, store: ObjectStore | None) -> Choice:
    training = given.get("training", {})
    fixed: dict[str, Any] = {
        name: training[name] for name in ("epochs", "batch_size") if isinstance(training.get(name), int)
    }
    network, source = None, valid.init.source
    if source is not None and "arch" not in given.get("model", {}):
        network = _start_network(facts, find_network(source, valid.bucket, store), fixed)
    if any(section in given for section in _COUNTED if section != "augment") or _crops(given):
        network = _with_overrides(facts, choose(facts, network, from_weights=source is not None, **fixed), given)
    return choose(facts, network, from_weights=source is not None, **fixed)


def _crops(given: dict[str, Any]) -> bool:
    """Return whether sizes or numbers of crops are given."""
    augment = given.get("augment", {})
    kinds = [augment.get("global_crops", {}), augment.get("local_crops", {})]
    return any(not isinstance(kind, dict) or {"size", "number"} & kind.keys() for kind in kinds)


def _start_network(facts: Facts, start: StartNetwork, fixed: dict[str, Any]) -> Network:
    """Return the network of the initial weights, with the largest crops for which the time suffices."""
    kinds = start.crops(facts.short_side)
    side, local = kinds[0]
    base = choose(facts, **fixed).values
    crops = {"global_crops": {"size": side}, "local_crops": {"size": local[0], "number": local[1]}}
    largest = _counted(facts, {**base, "model": start.model, "augment": crops})
    for side, local in kinds:
        share = _pixels(side, local) / _pixels(*kinds[0])
        network = replace(
            largest,
            side=side,
            local=local,
            flops=share * largest.flops,
            image_bytes=(share * largest.image_bytes[0], share * largest.image_bytes[1]),
        )
        if allowed_samples(facts, network) >= MIN_SAMPLES_FROM_WEIGHTS:
            break
    return network


def _pixels(side: int, local: tuple[int, int]) -> int:
    """Return the pixels of an image's crops, weighted by the operations: the student's count three times."""
    return 4 * 2 * side**2 + 3 * local[1] * local[0] ** 2


def _with_overrides(facts: Facts, choice: Choice, given: dict[str, Any]) -> Network:
    """Count the operations of the chosen network with the overrides of the user."""
    values = choice.values
    if "arch" in given.get("model", {}):  # the sizes belong to the chosen architecture
        values = {**values, "model": {}}
    return _counted(facts, merge(values, given))


def _counted(facts: Facts, values: dict[str, Any]) -> Network:
    """Count the operations and bytes of the network of a recipe."""
    import torch

    from esvit_core.planning.count_operations import count_demand

    config = Config.from_mapping(values, origin="recipe auto")
    dtype = torch.bfloat16 if facts.bfloat16 and config.training.precision != "float32" else torch.float32
    demand = count_demand(config, dtype, facts.device)
    model = {name: value for name, value in config.model.model_dump(mode="json").items() if value is not None}
    kinds = config.augment.local_kinds
    return network_like(
        name=f"{config.model.arch}, {demand.parameters / 1e6:.1f} M parameters with heads",
        model=model,
        side=config.augment.global_crops.size,
        local=(kinds[0].size, sum(kind.number for kind in kinds)) if kinds else None,
        flops=demand.flops,
        image_bytes=demand.image_bytes / (1 if dtype == torch.bfloat16 else 2),
        fixed_bytes=demand.fixed_bytes,
    )


def _whole(memory: float) -> float:
    """Round memory to whole GiB: machines of the same kind differ by a little."""
    return round(memory / _MEMORY_UNIT) * _MEMORY_UNIT
