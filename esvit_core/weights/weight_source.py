"""Resolve the source of a run's initial weights once, and pin it by SHA-256.

A pointer such as ``champion`` moves, a run in progress writes further checkpoints, and files are replaced. Therefore the
source is resolved when a run is started: ``init.source`` becomes a fixed address, ``init.sha256`` the digest of its
content.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from esvit_core.config import Config
from esvit_core.errors import UserError
from esvit_core.storage import NotFound, ObjectStore, join_uri
from esvit_core.storage.parallel_transfer import sha256_of

TIMM = "timm:"
FILES = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".safetensors")
BACKBONE, CHECKPOINT = "esvit-backbone/1", "esvit-checkpoint/1"
DESCRIPTION = "backbone.json"  # beside the weights of a published backbone
CHECKPOINTS = "/training/checkpoints/"  # in the address of a run's checkpoint
_TIMM_SOURCE = re.compile(r"timm:([^:/]+)(?::(.+))?")
_POINTER = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
_EXPECTED = (
    "expected a pointer such as champion, s3://bucket/runs/<id>, a .pth or .safetensors file, or timm:<name>[:<file>]"
)


def pin_source(config: Config, store: ObjectStore) -> Config:
    """Return the configuration with a resolved source of weights; without a source it does not change.

    Raises:
        UserError: the source does not exist, or it has changed since the run was started.
    """
    if config.init.source is None:
        return config
    source, sha256 = find(config.init.source, config.init.load, config.bucket, store)
    if config.init.sha256 not in (None, sha256):
        raise UserError(
            f"init.source {source}: it has changed since the run was started (SHA-256 {sha256} instead of "
            f"{config.init.sha256}); start another run without init.sha256, or restore the old weights"
        )
    return config.model_copy(update={"init": config.init.model_copy(update={"source": source, "sha256": sha256})})


class WeightsNotFound(UserError):  # noqa: N818
    """The source that a setting names contains no weights."""


def find(
    source: str, load: str, bucket: str, store: ObjectStore, setting: str = "init.source"
) -> tuple[str, str | None]:
    """Resolve the address of weights and the SHA-256 of their content.

    Args:
        source: value of ``init.source``.
        load: value of ``init.load``; from a run, ``backbone`` takes the published backbone, other values the newest
            checkpoint.
        bucket: bucket of the pointers.
        store: object store.
        setting: name of the source in error messages.

    Returns:
        A file, a folder, an ``s3://`` address of a file, backbone or checkpoint, ``timm:<name>:<file>``, or
        ``timm:<name>``, which has no digest because timm's registry defines its content.

    Raises:
        WeightsNotFound: the source does not exist.
    """
    if source.startswith(TIMM):
        return _of_timm(source, setting)
    if source.startswith("s3://"):
        return _in_the_store(source.rstrip("/"), load, store, setting)
    path = Path(source)
    if path.is_dir():
        return str(path.resolve()), _digest_of_folder(path, setting)
    if path.is_file():
        return str(path.resolve()), sha256_of(path)
    if not _POINTER.fullmatch(source):
        raise WeightsNotFound(f"{setting} {source}: no such file or folder; {_EXPECTED}")
    uri = join_uri(f"s3://{bucket}", "pointers", source)
    pointer = store.read_pointer(uri)
    if pointer is None or not isinstance(pointer.value.get("backbone"), str):
        raise WeightsNotFound(f"{setting} {source}: no such file, and no pointer {uri}; {_EXPECTED}")
    return _in_the_store(pointer.value["backbone"], load, store, setting)


def split_timm(source: str) -> tuple[str, str | None]:
    """Split ``timm:<name>`` or ``timm:<name>:<file>`` into the name and the file; None if there is no file.

    Raises:
        WeightsNotFound: there is no name.
    """
    found = _TIMM_SOURCE.fullmatch(source)
    if found is None:
        raise WeightsNotFound(f"weights {source}: expected timm:<name>, or timm:<name>:<file> for weights of a file")
    return found[1], found[2]


def kind_of(uri: str, store: ObjectStore) -> str | None:
    """Return the format of the complete publication at ``uri``, backbone or checkpoint; None if there is none."""
    manifest = store.read_manifest(uri)
    return None if manifest is None else manifest["format"]


def _of_timm(source: str, setting: str) -> tuple[str, str | None]:
    name, file = split_timm(source)
    if file is None:
        return source, None
    if not Path(file).is_file():
        raise WeightsNotFound(f"{setting} {source}: no such file {file}; expected timm:<name>:<file>, a file on disk")
    return f"{TIMM}{name}:{Path(file).resolve()}", sha256_of(Path(file))


def _in_the_store(uri: str, load: str, store: ObjectStore, setting: str) -> tuple[str, str]:
    if uri.endswith(FILES):
        return uri, _digest_of_object(uri, store, setting)
    if (manifest := store.read_manifest(uri)) is not None:
        if manifest["format"] not in (BACKBONE, CHECKPOINT):
            raise WeightsNotFound(
                f"{setting} {uri}: it contains {manifest['format']}; expected a backbone or a checkpoint"
            )
        return uri, _digest_of(manifest)
    backbone = join_uri(uri, "backbone")
    manifest = store.read_manifest(backbone) if load == "backbone" else None
    if manifest is not None and manifest["format"] == BACKBONE:  # not the features that a run may have instead
        return backbone, _digest_of(manifest)
    root = join_uri(uri, "training/checkpoints")
    steps = {stat.uri.removeprefix(root).strip("/").partition("/")[0] for stat in store.list(root)}
    for step in sorted((step for step in steps if step.isdigit()), key=int, reverse=True):
        if (manifest := store.read_manifest(join_uri(root, step))) is not None:
            return join_uri(root, step), _digest_of(manifest)
    raise WeightsNotFound(
        f"{setting} {uri}: there is neither a run with a complete checkpoint nor a published backbone"
    )


def _digest_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest["files"], sort_keys=True).encode()).hexdigest()


def _digest_of_folder(path: Path, setting: str) -> str:
    try:
        return sha256_of(path / "model.safetensors")
    except OSError:
        raise WeightsNotFound(
            f"{setting} {path}: it contains no model.safetensors; expected a folder with a published backbone, or a file"
        ) from None


def _digest_of_object(uri: str, store: ObjectStore, setting: str) -> str:
    with tempfile.TemporaryDirectory(prefix="esvit-") as folder:
        path = Path(folder) / os.path.basename(uri)  # noqa: PTH119 (an address, no path)
        try:
            store.get_file(uri, path)
        except NotFound:
            raise WeightsNotFound(f"{setting} {uri}: there is no such object") from None
        return sha256_of(path)
