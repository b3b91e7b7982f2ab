"""The recipe ``auto`` on a cluster: the step that prepares the data chooses, for the pods that the training will get."""

from __future__ import annotations

from typing import Any

from esvit_core.config import Config
from esvit_core.config.auto import Facts, choose, split_recipe
from esvit_core.config.kubernetes_names import AUTO, quantity_bytes, quantity_cores
from esvit_core.config.parameters import COMPILED_SECTIONS, parse_cluster, resolve, split_items
from esvit_core.planning.auto_recipe import resolve_auto
from esvit_core.storage import ObjectStore

# What is assumed of a cluster's GPU, which the step that chooses does not see: the numbers of an A100, and little memory.
_GPU: dict[str, Any] = {"multiprocessors": 108, "capability": 80, "memory": 16 * 2.0**30}
_CORES, _MEMORY = 8, 64 * 2.0**30  # of a pod without a limit
_MANY_IMAGES, _LARGE_SIDE = 1_000_000, 500  # for which pods are sized before the images are known


def resolve_parameters(
    recipe: str, settings: str, transfer: str, cluster: str, source: str, store: ObjectStore
) -> tuple[Config, list[str]]:
    """Build the configuration from a pipeline's parameters, see :func:`esvit_core.config.parameters.resolve`.

    Args:
        recipe: also ``auto``, ``auto:hours=8``, or a recipe for a kind of images.
        settings: overrides of the recipe.
        transfer: labelled data sets.
        cluster: the sections with which the pipeline was compiled, as YAML; empty: it was not compiled for a cluster.
        source: the images, for which ``auto`` chooses.
        store: object store.

    Returns:
        The configuration, and what ``auto`` chose and why, in lines; no lines with another recipe.

    Raises:
        UserError: a parameter is invalid, or the images cannot be read.
    """
    auto = split_recipe(recipe)
    if auto is None:
        return resolve(recipe, settings, transfer, cluster, store.get_bytes), []
    domain, hours = auto
    items = [item for item in split_items(settings, "settings") if not item.strip().startswith(COMPILED_SECTIONS)]
    machine = pod_facts(Config.from_mapping(parse_cluster(cluster), "cluster")) if cluster else None
    found = resolve_auto(source, items, hours, domain=domain, machine=machine, store=store, init_store=store)
    values = found.config.model_dump(mode="json", exclude=set(COMPILED_SECTIONS))
    text = Config.from_mapping(values).model_dump_json(exclude=set(COMPILED_SECTIONS))
    # Settings are applied again: those of the compiled sections are still missing, or refused.
    return resolve(text, settings, transfer, cluster, store.get_bytes), found.lines()


def pod_facts(config: Config) -> Facts:
    """Return the facts about the pods of a training; those about the data are still zero.

    Args:
        config: its section ``cluster`` has the pods.
    """
    pod = config.cluster.train
    nothing: dict[str, Any] = {"images": 0, "held_out": None, "labelled": False, "short_side": 0, "bfloat16": True}
    cores = next(
        (max(1, int(quantity_cores(str(q)))) for q in (pod.cpu_limit, pod.cpu) if q not in (AUTO, None)), _CORES
    )
    if pod.accelerators:
        devices = pod.accelerators * config.launch.nodes
        return Facts(**nothing, **_GPU, device="cuda", devices=devices, cores=cores * config.launch.nodes)
    known = [quantity_bytes(str(q)) for q in (pod.memory_limit, pod.memory) if q not in (AUTO, None)]
    return Facts(**nothing, device="cpu", devices=1, memory=float(known[0]) if known else _MEMORY, cores=cores)


def sizing_config(config: Config, hours: float | None) -> Config:
    """Return a configuration by which pods are sized before the images are known: the largest that ``auto`` may choose.

    Args:
        config: its sections ``cluster`` and ``launch`` are kept.
        hours: time for the run.
    """
    facts = pod_facts(config)
    found = {**vars(facts), "images": _MANY_IMAGES, "short_side": _LARGE_SIDE, "hours": hours}
    choice = choose(Facts(**found))
    return Config.from_mapping(choice.values).model_copy(
        update={section: getattr(config, section) for section in COMPILED_SECTIONS}
    )
