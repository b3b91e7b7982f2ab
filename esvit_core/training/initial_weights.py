"""What a run starts from when it is not from nothing: another run, a published checkpoint, weights of timm.

As the published code goes on (``--pretrained_weights_ckpt``): what fits is taken; a region head that the source
lacks starts as it was drawn, alike in student and teacher, with its center at zero, and the optimizer then starts
anew, because its parameters are others.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from esvit_core.config import Config, InitConfig
from esvit_core.data.shards.manifest import Manifest
from esvit_core.errors import UserError
from esvit_core.models.multicrop import MultiCropNetwork
from esvit_core.runs.run import Run, open_run
from esvit_core.storage import ObjectStore
from esvit_core.training.state import Parts
from esvit_core.weights.fit import fit_weights
from esvit_core.weights.optimizer_state import optimized_names, renumber_state
from esvit_core.weights.read_file import from_timm_registry, read_file
from esvit_core.weights.snapshot import Snapshot, Weights
from esvit_core.weights.weight_source import BACKBONE, CHECKPOINTS, TIMM, kind_of, pin_source

RECORD = "training/initial.json"


def starting_states(run: Run, parts: Parts) -> dict[str, Any] | None:
    """States of a run's parts with the weights of ``init.source`` in them; None where there is no source.

    What was taken is printed and kept in ``training/initial.json``.

    Raises:
        UserError: the source cannot be read, or does not fit.
    """
    init = pin_source(run.config, run.store).init  # and that is still there
    if init.source is None:
        return None
    snapshot = read_source(init, run.config, run.store)
    states, taken, anew = combined(snapshot, parts, init)
    record = {
        "source": init.source,
        "sha256": init.sha256,
        "kind": snapshot.kind,
        "take": init.take,
        "taken": taken,
        "anew": anew,
        "passed_over": list(snapshot.ignored),
        "step": states["position"]["step"],
    }
    run.store.put_json(run.at(RECORD), record)
    for line in told(record):
        print(f"train: {line}", flush=True)
    return states


def told(record: dict[str, Any]) -> list[str]:
    """What a run started from, in words."""
    digest = f", SHA-256 {record['sha256'][:12]}" if record["sha256"] else ""
    lines = [f"starting from {record['source']} ({record['kind']}{digest}): {', '.join(record['taken'])}"]
    if record["anew"]:
        lines.append(f"started anew: {', '.join(record['anew'])}")
    if record["passed_over"]:
        lines.append(f"passed over: {', '.join(record['passed_over'])}")
    return lines


def read_source(init: InitConfig, config: Config, store: ObjectStore) -> Snapshot:
    """Read what ``init.source`` names, under our names."""
    source, arch = str(init.source), config.model.arch
    if source.startswith(TIMM):
        return from_timm_registry(source.removeprefix(TIMM), arch)
    if not source.startswith("s3://"):
        path = Path(source)
        return read_file(path / "model.safetensors" if path.is_dir() else path, arch)
    with tempfile.TemporaryDirectory(prefix="esvit-") as folder:
        here = Path(folder)
        kind = kind_of(source, store)
        if kind == BACKBONE:
            store.fetch(source, here)
            return read_file(here / "model.safetensors", arch)
        if kind is not None:
            return _read_checkpoint(source, init.take, store, here)
        file = here / source.rpartition("/")[2]
        store.get_file(source, file)
        return read_file(file, arch)


def _read_checkpoint(uri: str, take: str, store: ObjectStore, folder: Path) -> Snapshot:
    wanted = ["teacher.pt"] if take == "backbone" else ["student.pt", "teacher.pt", "objective.pt"]
    wanted += ["optimizer.pt", "position.pt"] if take == "all" else []
    manifest = store.fetch(uri, folder, [])
    names = [name for name in wanted if name in manifest["files"]]  # an imported one need not have them all
    store.fetch(uri, folder, names)
    states = {
        name.removesuffix(".pt"): torch.load(folder / name, map_location="cpu", weights_only=True) for name in names
    }
    epoch = manifest.get("epoch")
    if epoch is None and "position" in states:
        epoch = states["position"]["step"] / _steps_per_epoch(uri, store)
    return Snapshot(
        uri,
        "checkpoint",
        states["teacher"],
        states.get("student"),
        states.get("objective", {}),
        states.get("optimizer"),
        epoch,
    )


def _steps_per_epoch(checkpoint: str, store: ObjectStore) -> int:
    """Of the run that a checkpoint belongs to."""
    source = open_run(checkpoint.partition(CHECKPOINTS)[0], store)
    train = Manifest.read(store, source.at("data")).splits["train"]
    return train.samples // source.config.training.batch_size


def combined(snapshot: Snapshot, parts: Parts, init: InitConfig) -> tuple[dict[str, Any], list[str], list[str]]:
    """The states of a run's parts with what is to be taken from ``snapshot``.

    Returns:
        The states, as a checkpoint holds them; what was taken; what started anew.

    Raises:
        UserError: the source lacks what is to be taken, or it does not fit.
    """
    states = {name: thing.state_dict() for name, thing in parts.stateful.items()}
    if init.take == "backbone":
        for name, network in (("student", parts.student), ("teacher", parts.teacher)):
            states[name] = _with(network, _only(snapshot.teacher, ("backbone.",)), snapshot, parts.config)
        return states, ["the backbone"], ["the heads"]
    if not snapshot.has("head"):
        raise UserError(f"init.source {snapshot.origin}: it has no heads; set init.take=backbone")
    region_here, region_there = parts.student.head_dense is not None, snapshot.has("head_dense")
    kept = ("backbone.", "head.", "head_dense.") if region_here else ("backbone.", "head.")
    student = snapshot.student or snapshot.teacher
    for name, network, weights in (("student", parts.student, student), ("teacher", parts.teacher, snapshot.teacher)):
        states[name] = _with(network, _only(weights, kept), snapshot, parts.config)
    taken: list[str] = ["the backbone", "the view head"]
    anew: list[str] = []
    (taken if region_there else anew).extend(["the region head"] if region_here else [])
    centers = {name: value for name, value in snapshot.centers.items() if name in states["objective"]}
    states["objective"] = {**states["objective"], **centers}
    (taken if centers else anew).append("the centers")
    if init.take == "all":
        _continue(states, snapshot, parts, taken, anew)
    return states, taken, anew


def _continue(states: dict[str, Any], snapshot: Snapshot, parts: Parts, taken: list[str], anew: list[str]) -> None:
    """Optimizer and position."""
    optimizer = None
    if snapshot.optimizer is not None and snapshot.student is not None:
        there = optimized_names(snapshot.student, parts.student)
        optimizer = renumber_state(snapshot.optimizer, there, optimized_names(states["student"], parts.student))
    if optimizer is not None and _kind(optimizer) != _kind(states["optimizer"]):
        optimizer = None
    if optimizer is not None:
        settings = [{k: v for k, v in group.items() if k != "params"} for group in states["optimizer"]["param_groups"]]
        groups = zip(optimizer["param_groups"], settings, strict=True)
        states["optimizer"] = {**optimizer, "param_groups": [{**own, "params": g["params"]} for g, own in groups]}
    (anew if optimizer is None else taken).append("the optimizer")
    if snapshot.epoch is None:
        raise UserError(f"init.source {snapshot.origin}: it does not say how far it was trained; set init.take=heads")
    epochs, steps = parts.config.training.epochs, parts.schedules.steps_per_epoch
    if snapshot.epoch >= epochs:
        raise UserError(
            f"init.source {snapshot.origin}: it was trained for {snapshot.epoch:g} epochs, the run has {epochs}; "
            "raise training.epochs to go on, or set init.take=heads to begin at the first"
        )
    step = round(snapshot.epoch * steps)
    states["position"] = {**states["position"], "step": step, "images": step * parts.config.training.batch_size}
    taken.append(f"the position, epoch {snapshot.epoch:g} of {epochs}")


def _kind(optimizer: dict[str, Any]) -> set[str]:
    """What tells AdamW, SGD and LARS apart."""
    return {"betas", "momentum", "eta"} & optimizer["param_groups"][0].keys()


def _only(weights: Weights, prefixes: tuple[str, ...]) -> Weights:
    return {name: value for name, value in weights.items() if name.startswith(prefixes)}


def _with(network: MultiCropNetwork, weights: Weights, snapshot: Snapshot, config: Config) -> Weights:
    """The network's state with ``weights``; heads that are missing altogether stay as they were drawn."""
    own = network.state_dict()
    drawn = {
        name: own[name]
        for name in own
        for part in ("head", "head_dense")
        if name.startswith(f"{part}.") and not any(there.startswith(f"{part}.") for there in weights)
    }
    into = f"model.arch {config.model.arch} with head.out_dim {config.head.out_dim}"
    return fit_weights(network, {**weights, **drawn}, snapshot.origin, into)
