"""Bring a published checkpoint, or weights of timm, into the format that everything here reads."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from esvit_core.weights.fit import fitting, recognise
from esvit_core.weights.read_file import adapted, from_timm_registry, load_file
from esvit_core.weights.snapshot import Snapshot, part_of
from esvit_core.weights.weight_source import TIMM

NETWORKS = ("teacher", "student")


@dataclass(frozen=True)
class Imported:
    """What was brought in.

    Attributes:
        backbone: where it is, a folder or an ``s3://`` prefix.
        checkpoint: where a checkpoint to continue from is; None where none was asked for.
        arch: the architecture.
        told: what was taken and what was not, a line each.
    """

    backbone: str
    checkpoint: str | None
    arch: str
    told: tuple[str, ...]


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
        file: a ``.pth`` or ``.safetensors`` file, here or at ``s3://``, or ``timm:<name>``.
        out: folder, or ``s3://bucket/prefix``: the backbone goes below ``backbone/`` in it, the checkpoint below
            ``checkpoint/``.
        store: needed where one of the two is at ``s3://``.
        config: its ``model`` section names the architecture; None: found by names and shapes, with the recipe as far
            as the file's own command line tells it.
        network: whose backbone, ``teacher`` or ``student``.
        checkpoint: write one, too, for ``init.source`` of a run; into the store only.

    Raises:
        UserError: the file cannot be read or is refused, no architecture of ours or not the named one fits, or
            there is something else already where it is to go.
    """
    if checkpoint and not out.startswith("s3://"):
        raise UserError(
            f"--out {out}: a checkpoint goes into the store only; from a file a run starts as it is (init.source)"
        )
    with tempfile.TemporaryDirectory(prefix="esvit-") as folder:
        snapshot, sha256 = _read(file, "swin" if config is None else config.model.arch, store, Path(folder))
        config = config or _configuration(snapshot)
        backbone, told = _backbone(snapshot, config, network)
        extra = {"imported": {"from": file, "sha256": sha256, "kind": snapshot.kind, "network": network}}
        where = join_uri(out, "backbone") if out.startswith("s3://") else str(Path(out) / "backbone")
        if store is not None and out.startswith("s3://"):
            store.ensure_bucket(out.removeprefix("s3://").partition("/")[0])
            save_backbone(store, where, backbone, config, extra)
        else:
            _write(Path(where), backbone, describe_backbone(backbone, config) | extra)
        kept = None
        if checkpoint and store is not None:
            kept = join_uri(out, "checkpoint")
            _publish_checkpoint(snapshot, sha256, kept, store, Path(folder))
    return Imported(where, kept, config.model.arch, told)


def _read(file: str, arch: str, store: ObjectStore | None, folder: Path) -> tuple[Snapshot, str | None]:
    if file.startswith(TIMM):
        return from_timm_registry(file.removeprefix(TIMM), arch), None
    path = Path(file)
    if file.startswith("s3://"):
        if store is None:
            raise UserError(f"weights {file}: no object store is named; set ESVIT_S3_ENDPOINT or ESVIT_STORE_DIR")
        path = folder / file.rpartition("/")[2]
        try:
            store.get_file(file, path)
        except NotFound:
            raise UserError(f"weights {file}: there is no such object") from None
    return adapted(load_file(path), arch, file), sha256_of(path)


def _configuration(snapshot: Snapshot) -> Config:
    """The recipe as far as the file tells it: the architecture from names and shapes, the rest from its command line."""
    arch = recognise(part_of(snapshot.teacher, "backbone"))
    if arch is None:
        raise UserError(
            f"weights {snapshot.origin}: their names and shapes are those of no architecture of ours at its own size; "
            "name it with --arch to see what does not fit, or give the sizes with --recipe"
        )
    settings: dict[str, Any] = settings_of(snapshot.arguments)
    if (prototypes := snapshot.teacher.get("head.last_layer.weight_v")) is not None:
        settings.setdefault("head", {})["out_dim"] = len(prototypes)
    settings["recipe"] = "imported"
    settings["model"] = {"arch": arch}
    return Config.from_mapping(settings, origin=f"command line in {snapshot.origin}")


def _backbone(snapshot: Snapshot, config: Config, network: str) -> tuple[nn.Module, tuple[str, ...]]:
    """The backbone with the weights in it, and what is to be said."""
    weights = snapshot.teacher if network == "teacher" else snapshot.student
    if weights is None:
        raise UserError(f"weights {snapshot.origin}: there is no student in it, only one network; leave --network out")
    backbone = create_backbone(config.model, config.augment.global_crops.size, drop_path=0.0)
    own = part_of(weights, "backbone")
    backbone.load_state_dict(fitting(backbone, own, snapshot.origin, f"model.arch {config.model.arch}"))
    which = network if snapshot.student is not None else "only network"
    told = [f"{snapshot.kind}, {config.model.arch}: the {which}'s backbone, {len(own)} entries"]
    if snapshot.epoch is not None:
        told.append(f"trained for {snapshot.epoch:g} epochs")
    here = {"head": "the view head", "head_dense": "the region head"}
    if heads := [words for part, words in here.items() if snapshot.has(part)]:
        told.append(f"no part of a backbone: {' and '.join(heads)}")
    if snapshot.passed_over:
        told.append(f"passed over: {', '.join(snapshot.passed_over)}")
    return backbone, tuple(told)


def _write(folder: Path, backbone: nn.Module, description: Mapping[str, Any]) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out {folder.parent}: {folder.name} is there already; name a new folder")
    try:
        write_backbone(folder, backbone, dict(description))
    except OSError as error:
        raise UserError(f"--out {folder.parent}: cannot be written to ({error.strerror})") from None


def _publish_checkpoint(snapshot: Snapshot, sha256: str | None, uri: str, store: ObjectStore, folder: Path) -> None:
    """The states that there are, named as :mod:`esvit_core.training.checkpoint` does."""
    present = store.read_manifest(uri)
    if present is not None and sha256 is not None and present.get("sha256") == sha256:
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
