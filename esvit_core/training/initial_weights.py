"""Initial weights of a run from another run, a published checkpoint, or timm.

Like the published code (``--pretrained_weights_ckpt``), this loads what fits. A region head that the source lacks keeps
its random initialization, the same in student and teacher, with its center at zero; the optimizer then starts without
state, because its parameters differ.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from esvit_core.config import Config, InitConfig
from esvit_core.data.shards.manifest import Manifest
from esvit_core.errors import UserError
from esvit_core.models.multicrop import MultiCropNetwork
from esvit_core.runs.run import INITIAL, Run, open_run
from esvit_core.storage import ObjectStore
from esvit_core.training.state import TrainState
from esvit_core.weights.fit import fit_weights
from esvit_core.weights.optimizer_state import optimized_names, renumber_state
from esvit_core.weights.read_file import from_timm_source, read_file, timm_settings
from esvit_core.weights.resize_weights import resize_weights
from esvit_core.weights.snapshot import Snapshot, Weights
from esvit_core.weights.weight_source import BACKBONE, CHECKPOINTS, TIMM, kind_of, pin_source, split_timm


def initial_states(run: Run, state: TrainState) -> dict[str, Any] | None:
    """Return the states to start from, with the weights of ``init.source`` loaded; None if there is no source.

    What was loaded is printed and recorded in ``training/initial.json``.

    Raises:
        UserError: the source cannot be read, or does not fit.
    """
    init = pin_source(run.config, run.store).init  # checks that the source is still the same
    if init.source is None:
        return None
    snapshot = read_source(init, run.config, run.store)
    snapshot, resized = _resized(snapshot, state.teacher)
    states, loaded, initialized = merge_states(snapshot, state, init)
    record = {
        "source": init.source,
        "sha256": init.sha256,
        "kind": snapshot.kind,
        "load": init.load,
        "loaded": loaded,
        "entries": sum(name.startswith("backbone.") for name in snapshot.teacher),
        "resized": resized,
        "initialized": initialized,
        "ignored": list(snapshot.ignored),
        "step": states["progress"]["step"],
    }
    run.store.put_json(run.at(INITIAL), record)
    for line in describe_record(record):
        print(f"train: {line}", flush=True)
    return states


def describe_record(record: dict[str, Any]) -> list[str]:
    """Describe what a run starts from, as lines for the log."""
    digest = f", SHA-256 {record['sha256'][:12]}" if record["sha256"] else ""
    loaded = ", ".join(record["loaded"])
    if "entries" in record:
        loaded = loaded.replace("the backbone", f"the backbone ({record['entries']} entries)", 1)
    lines = [f"starting from {record['source']} ({record['kind']}{digest}): {loaded}"]
    if resized := record.get("resized"):
        kinds = Counter(change.partition(" ")[0].rpartition(".")[2] for change in resized)
        changed = ", ".join(f"{name} ({number})" for name, number in kinds.items())
        lines.append(f"resized to the image and window sizes of this run: {changed}")
    if record["initialized"]:
        lines.append(f"newly initialized: {', '.join(record['initialized'])}")
    if record["ignored"]:
        lines.append(f"ignored: {', '.join(record['ignored'])}")
    return lines


def read_source(init: InitConfig, config: Config, store: ObjectStore) -> Snapshot:
    """Read the weights that ``init.source`` names, with the parameter names of this library."""
    source, arch = str(init.source), config.model.arch
    if not source.startswith("s3://"):
        return _read_here(source, arch)
    with tempfile.TemporaryDirectory(prefix="esvit-") as folder:
        local = Path(folder)
        kind = kind_of(source, store)
        if kind == BACKBONE:
            store.fetch(source, local)
            return read_file(local / "model.safetensors", arch)
        if kind is not None:
            return _read_checkpoint(source, init.load, store, local)
        file = local / source.rpartition("/")[2]
        store.get_file(source, file)
        return read_file(file, arch)


def require_fitting(config: Config, network: MultiCropNetwork) -> None:
    """Return if the weights of ``init.source`` fit, as far as they are on this machine.

    Weights in the object store, and those that timm has to fetch, are read when the training starts.

    Args:
        network: the student of ``config``; only the names and shapes of its weights are used.

    Raises:
        UserError: the weights cannot be read, or do not fit; or timm has no such network.
    """
    source = config.init.source or ""
    if source.startswith(TIMM):
        name, file = split_timm(source)
        timm_settings(name)
        here = file is not None
    else:
        here = bool(source) and Path(source).exists()
    if here:
        snapshot, _ = _resized(_read_here(source, config.model.arch), network)
        _fitted(network, snapshot.teacher, snapshot, config)


def _read_here(source: str, arch: str) -> Snapshot:
    if source.startswith(TIMM):
        return from_timm_source(source, arch)
    path = Path(source)
    return read_file(path / "model.safetensors" if path.is_dir() else path, arch)


def _read_checkpoint(uri: str, load: str, store: ObjectStore, folder: Path) -> Snapshot:
    wanted = ["teacher.pt"] if load == "backbone" else ["student.pt", "teacher.pt", "objective.pt"]
    wanted += ["optimizer.pt", "progress.pt"] if load == "all" else []
    manifest = store.fetch(uri, folder, [])
    names = [name for name in wanted if name in manifest["files"]]  # an imported checkpoint may lack some
    store.fetch(uri, folder, names)
    states = {
        name.removesuffix(".pt"): torch.load(folder / name, map_location="cpu", weights_only=True) for name in names
    }
    epoch = manifest.get("epoch")
    if epoch is None and "progress" in states:
        epoch = states["progress"]["step"] / _steps_per_epoch(uri, store)
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
    """Return the steps per epoch of the run that a checkpoint belongs to."""
    source = open_run(checkpoint.partition(CHECKPOINTS)[0], store)
    train = Manifest.read(store, source.at("data")).splits["train"]
    return train.epoch_samples // source.config.training.batch_size


def merge_states(
    snapshot: Snapshot, state: TrainState, init: InitConfig
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Merge ``snapshot`` into the states of a run, as far as ``init.load`` asks for it.

    Returns:
        The states, as in a checkpoint; the names of what was loaded; the names of what keeps its initialization.

    Raises:
        UserError: the source lacks what ``init.load`` asks for, or does not fit.
    """
    states = {name: target.state_dict() for name, target in state.stateful.items()}
    student = (init.load != "backbone" and snapshot.student) or snapshot.teacher
    for name, network, weights in (("student", state.student, student), ("teacher", state.teacher, snapshot.teacher)):
        states[name] = _fitted(network, weights, snapshot, state.config)
    if init.load == "backbone":
        return states, ["the backbone"], ["the heads"]
    has_region, source_has_region = state.student.head_dense is not None, snapshot.has("head_dense")
    loaded: list[str] = ["the backbone", "the view head"]
    initialized: list[str] = []
    (loaded if source_has_region else initialized).extend(["the region head"] if has_region else [])
    centers = {name: value for name, value in snapshot.centers.items() if name in states["objective"]}
    states["objective"] = {**states["objective"], **centers}
    (loaded if centers else initialized).append("the centers")
    if init.load == "all":
        _continue(states, snapshot, state, loaded, initialized)
    return states, loaded, initialized


def _resized(snapshot: Snapshot, network: MultiCropNetwork) -> tuple[Snapshot, list[str]]:
    """Resize position embeddings and bias tables to those of ``network``; return also what was resized."""
    own = network.state_dict()
    teacher, resized = resize_weights(own, snapshot.teacher)
    student = None if snapshot.student is None else resize_weights(own, snapshot.student)[0]
    return replace(snapshot, teacher=teacher, student=student), resized


def _continue(
    states: dict[str, Any], snapshot: Snapshot, state: TrainState, loaded: list[str], initialized: list[str]
) -> None:
    """Merge the optimizer and the progress."""
    optimizer = None
    if snapshot.optimizer is not None and snapshot.student is not None:
        source_names = optimized_names(snapshot.student, state.student)
        optimizer = renumber_state(snapshot.optimizer, source_names, optimized_names(states["student"], state.student))
    if optimizer is not None and _kind(optimizer) != _kind(states["optimizer"]):
        optimizer = None
    if optimizer is not None:
        settings = [{k: v for k, v in group.items() if k != "params"} for group in states["optimizer"]["param_groups"]]
        groups = zip(optimizer["param_groups"], settings, strict=True)
        states["optimizer"] = {**optimizer, "param_groups": [{**own, "params": g["params"]} for g, own in groups]}
    (initialized if optimizer is None else loaded).append("the optimizer")
    if snapshot.epoch is None:
        raise UserError(
            f"init.source {snapshot.origin}: it does not contain the number of epochs trained; set init.load=heads"
        )
    epochs, steps = state.config.training.epochs, state.schedules.steps_per_epoch
    if snapshot.epoch >= epochs:
        raise UserError(
            f"init.source {snapshot.origin}: it was trained for {snapshot.epoch:g} epochs, the run has {epochs}; "
            "raise training.epochs to continue, or set init.load=heads to start at epoch 0"
        )
    step = round(snapshot.epoch * steps)
    states["progress"] = {**states["progress"], "step": step, "images": step * state.config.training.batch_size}
    loaded.append(f"the progress, epoch {snapshot.epoch:g} of {epochs}")


def _kind(optimizer: dict[str, Any]) -> set[str]:
    """Return the settings that distinguish AdamW, SGD and LARS."""
    return {"betas", "momentum", "eta"} & optimizer["param_groups"][0].keys()


def _only(weights: Weights, prefixes: tuple[str, ...]) -> Weights:
    return {name: value for name, value in weights.items() if name.startswith(prefixes)}


def _fitted(network: MultiCropNetwork, weights: Weights, snapshot: Snapshot, config: Config) -> Weights:
    """Return the network's state with as much of ``weights`` as ``init.load`` asks for.

    Heads that are missing as a whole keep their initialization.
    """
    prefixes: tuple[str, ...] = ("backbone.",)
    if config.init.load != "backbone":
        if not snapshot.has("head"):
            raise UserError(f"init.source {snapshot.origin}: it has no heads; set init.load=backbone")
        prefixes += ("head.",) if network.head_dense is None else ("head.", "head_dense.")
    weights = _only(weights, prefixes)
    own = network.state_dict()
    initialized = {
        name: own[name]
        for name in own
        for part in ("head", "head_dense")
        if name.startswith(f"{part}.") and not any(given.startswith(f"{part}.") for given in weights)
    }
    into = f"model.arch {config.model.arch} with head.out_dim {config.head.out_dim}"
    return fit_weights(network, {**weights, **initialized}, snapshot.origin, into)
