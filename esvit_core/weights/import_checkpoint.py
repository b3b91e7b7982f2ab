"""Import a published checkpoint or timm weights into this project's format."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from esvit_core.config import Config
from esvit_core.errors import UserError
from esvit_core.models.factory import create_backbone
from esvit_core.storage import NotFound, ObjectStore, join_uri
from esvit_core.storage.disk import explain_write_errors
from esvit_core.storage.parallel_transfer import sha256_of
from esvit_core.weights.arguments import settings_of
from esvit_core.weights.backbone import describe_backbone, save_backbone, write_backbone
from esvit_core.weights.fit import fit_weights, recognize_architecture
from esvit_core.weights.read_file import from_timm_source, load_file, timm_settings, to_snapshot
from esvit_core.weights.snapshot import Snapshot, part_of
from esvit_core.weights.weight_source import TIMM, split_timm

NETWORKS = ("teacher", "student")


@dataclass(frozen=True)
class Imported:
    """Imported weights.

    Attributes:
        backbone: location of the backbone, a folder or an ``s3://`` prefix.
        checkpoint: address of a checkpoint to continue from; None if none was requested.
        arch: architecture.
        messages: what was imported and what was ignored, one line each.
    """

    backbone: str
    checkpoint: str | None
    arch: str
    messages: tuple[str, ...]


def import_weights(
    file: str,
    out: str,
    store: ObjectStore | None = None,
    config: Config | None = None,
    network: str = "teacher",
    checkpoint: bool = False,
) -> Imported:
    """Read weights and publish the backbone; :func:`esvit_core.load_backbone` loads it.

    Args:
        file: a local or ``s3://`` ``.pth`` or ``.safetensors`` file; ``timm:<name>``; or ``timm:<name>:<file>``, a file with
            weights of this network of timm.
        out: folder or ``s3://bucket/prefix``; the backbone goes to its ``backbone/``, the checkpoint to ``checkpoint/``.
        store: object store; required if ``file`` or ``out`` is at ``s3://``.
        config: configuration whose ``model`` section names the architecture; None: recognize the architecture by names
            and shapes, and take the settings of the command line stored in the file; a network of timm that this project
            does not have is ``timm:<name>``, with the preprocessing that timm states for it.
        network: network whose backbone is imported, ``teacher`` or ``student``.
        checkpoint: also write a checkpoint for ``init.source`` of a run; only supported in the object store.

    Raises:
        UserError: the file cannot be read or is unsafe, the weights fit no architecture or not the named one, or the
            destination already holds something else.
    """
    if checkpoint and not out.startswith("s3://"):
        raise UserError(
            f"--out {out}: a checkpoint can only be written to the object store; to start a run from a file, set init.source to the file"
        )
    with tempfile.TemporaryDirectory(prefix="esvit-") as folder:
        config = config or _timm_configuration(file)
        snapshot, sha256 = _read(file, "swin" if config is None else config.model.arch, store, Path(folder))
        config = config or _configuration(snapshot)
        backbone, messages = _backbone(snapshot, config, network)
        extra = {"imported": {"from": file, "sha256": sha256, "kind": snapshot.kind, "network": network}}
        where = join_uri(out, "backbone") if out.startswith("s3://") else str(Path(out) / "backbone")
        if store is not None and out.startswith("s3://"):
            store.ensure_bucket(out.removeprefix("s3://").partition("/")[0])
            save_backbone(store, where, backbone, config, extra)
        else:
            _write(Path(where), backbone, describe_backbone(backbone, config) | extra)
        checkpoint_uri = None
        if checkpoint and store is not None:
            checkpoint_uri = join_uri(out, "checkpoint")
            _publish_checkpoint(snapshot, sha256, checkpoint_uri, store, Path(folder))
    return Imported(where, checkpoint_uri, config.model.arch, messages)


def _read(file: str, arch: str, store: ObjectStore | None, folder: Path) -> tuple[Snapshot, str | None]:
    if file.startswith(TIMM):
        named = split_timm(file)[1]
        return from_timm_source(file, arch), None if named is None else sha256_of(Path(named))
    path = Path(file)
    if file.startswith("s3://"):
        if store is None:
            raise UserError(f"weights {file}: no object store is configured; set ESVIT_S3_ENDPOINT or ESVIT_STORE_DIR")
        path = folder / file.rpartition("/")[2]
        try:
            store.get_file(file, path)
        except NotFound:
            raise UserError(f"weights {file}: there is no such object") from None
    return to_snapshot(load_file(path), arch, file), sha256_of(path)


def _timm_configuration(file: str) -> Config | None:
    """Return the configuration of ``timm:<name>`` or ``timm:<name>:<file>``; None if its names are recognized later."""
    if not file.startswith(TIMM):
        return None
    name, path = split_timm(file)
    settings = timm_settings(name)
    if path is None and _is_ours(name):
        return None
    return Config.from_mapping(settings, origin=file)


def _is_ours(name: str) -> bool:
    """Return whether this project has the network of timm, so that its architecture is recognized by its weights."""
    return recognize_architecture(timm.create_model(name, pretrained=False).state_dict()) is not None


def _configuration(snapshot: Snapshot) -> Config:
    """Derive the configuration: the architecture from names and shapes, the rest from the file's command line."""
    arch = recognize_architecture(part_of(snapshot.teacher, "backbone"))
    if arch is None:
        raise UserError(
            f"weights {snapshot.origin}: their names and shapes match no known architecture at its default size; "
            "use --arch to see what does not fit, or --recipe to set the sizes"
        )
    settings: dict[str, Any] = settings_of(snapshot.arguments)
    if (prototypes := snapshot.teacher.get("head.last_layer.weight_v")) is not None:
        settings.setdefault("head", {})["out_dim"] = len(prototypes)
    settings["recipe"] = "imported"
    settings["model"] = {"arch": arch}
    return Config.from_mapping(settings, origin=f"command line in {snapshot.origin}")


def _backbone(snapshot: Snapshot, config: Config, network: str) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the backbone with the weights, and messages for the user."""
    weights = snapshot.teacher if network == "teacher" else snapshot.student
    if weights is None:
        raise UserError(f"weights {snapshot.origin}: it contains one network, no student; remove --network")
    backbone = create_backbone(config.model, config.augment.global_crops.size, drop_path=0.0)
    own = part_of(weights, "backbone")
    backbone.load_state_dict(fit_weights(backbone, own, snapshot.origin, f"model.arch {config.model.arch}"))
    which = network if snapshot.student is not None else "only network"
    messages = [f"{snapshot.kind}, {config.model.arch}: the {which}'s backbone, {len(own)} entries"]
    if snapshot.epoch is not None:
        messages.append(f"trained for {snapshot.epoch:g} epochs")
    head_names = {"head": "the view head", "head_dense": "the region head"}
    if heads := [name for part, name in head_names.items() if snapshot.has(part)]:
        messages.append(f"not part of a backbone: {' and '.join(heads)}")
    if snapshot.ignored:
        messages.append(f"ignored: {', '.join(snapshot.ignored)}")
    return backbone, tuple(messages)


def _write(folder: Path, backbone: nn.Module, description: Mapping[str, Any]) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out {folder.parent}: {folder.name} already exists; choose a new folder")
    try:
        write_backbone(folder, backbone, dict(description))
    except OSError as error:
        raise UserError(f"--out {folder.parent}: cannot be written to ({error.strerror})") from None


def _publish_checkpoint(snapshot: Snapshot, sha256: str | None, uri: str, store: ObjectStore, folder: Path) -> None:
    """Publish the available states under the names of :mod:`esvit_core.training.checkpoint`."""
    existing = store.read_manifest(uri)
    if existing is not None and sha256 is not None and existing.get("sha256") == sha256:
        return
    states = {
        "teacher": snapshot.teacher,
        "student": snapshot.student,
        "objective": snapshot.centers or None,
        "optimizer": snapshot.optimizer,
    }
    files = {}
    for name, state in states.items():
        if state is not None:
            files[f"{name}.pt"] = folder / f"{name}.pt"
            with explain_write_errors(files[f"{name}.pt"], RuntimeError):
                torch.save(state, files[f"{name}.pt"])
    store.publish(uri, files, "checkpoint", {"epoch": snapshot.epoch, "sha256": sha256})
