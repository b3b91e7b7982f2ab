"""Publish and load backbones: safetensors plus a small JSON description.

from esvit_core import load_backbone
backbone = load_backbone("champion")          # or "s3://bucket/prefix", or a folder
features = backbone(images)                 # (B, num_features)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import nn

from esvit_core.config import Config, ModelConfig
from esvit_core.errors import UserError
from esvit_core.models.factory import create_backbone
from esvit_core.storage import ObjectStore, join_uri
from esvit_core.storage.session import open_store
from esvit_core.weights.weight_source import BACKBONE, DESCRIPTION

WEIGHTS = "model.safetensors"
DEFAULT_BUCKET = "esvit"
_POINTER_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")


def save_backbone(
    store: ObjectStore, prefix_uri: str, backbone: nn.Module, config: Config, extra: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Publish a backbone at ``prefix_uri``: ``model.safetensors``, ``backbone.json``, and the manifest last.

    A repeated call with the same weights finds the published backbone and returns.

    Args:
        backbone: network created by :func:`esvit_core.models.factory.create_backbone` from ``config``.
        extra: additional entries of ``backbone.json``, such as the run and the step.

    Returns:
        The manifest.
    """
    files = _files(backbone, describe_backbone(backbone, config) | (extra or {}))
    return store.publish(prefix_uri, files, "backbone", {"arch": config.model.arch})


def write_backbone(folder: Path, backbone: nn.Module, description: dict[str, Any]) -> None:
    """Write the same files into a local folder.

    Args:
        folder: created if it does not exist.
        backbone: the network.
        description: content of ``backbone.json``, from :func:`describe_backbone` or a loaded backbone's
            ``backbone_config``; its entry ``weights`` is replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in _files(backbone, description).items():
        (folder / name).write_bytes(content)


def _files(backbone: nn.Module, description: dict[str, Any]) -> dict[str, bytes]:
    # safetensors needs contiguous CPU tensors that share no memory.
    state = {name: value.detach().cpu().clone().contiguous() for name, value in backbone.state_dict().items()}
    weights = safetensors.torch.save(state, metadata={"format": BACKBONE})
    entry = {"file": WEIGHTS, "bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
    return {WEIGHTS: weights, DESCRIPTION: (json.dumps(description | {"weights": entry}, indent=1) + "\n").encode()}


def describe_backbone(backbone: nn.Module, config: Config) -> dict[str, Any]:
    """Describe the network and its preprocessing, for ``backbone.json``."""
    return {
        "format": BACKBONE,
        "arch": config.model.arch,
        "model": config.model.model_dump(mode="json"),
        "img_size": config.model.img_size or config.augment.global_crops.size,
        "num_features": int(backbone.num_features),  # type: ignore[arg-type]
        "parameters": sum(p.numel() for p in backbone.parameters()),
        "eval_resize": config.evaluation.resize,
        "eval_crop": config.evaluation.crop,
        "store_short_side": config.data.store_short_side,
        "mean": list(config.augment.mean),
        "std": list(config.augment.std),
        "recipe": config.recipe,
        "config_digest": config.digest(),
    }


def load_backbone(where: str | Path, store: ObjectStore | None = None) -> nn.Module:
    """Load a published backbone as a timm-style module in eval mode.

    Args:
        where: ``s3://bucket/prefix``; a folder; or the name of a pointer such as ``"champion"`` in the bucket
            ``ESVIT_BUCKET`` (default ``esvit``).
        store: object store; default: the store named by ``ESVIT_S3_*``, or the one with its data in
            ``ESVIT_STORE_DIR``.

    Returns:
        A module with ``forward_features``, ``forward_head`` and ``num_features``; ``module(x)`` returns the view feature
        (B, num_features); ``module.backbone_config`` is the content of ``backbone.json``, which includes the
        preprocessing (``eval_resize``, ``eval_crop``, ``mean``, ``std``).

    Raises:
        UserError: the pointer, prefix or folder does not exist, the file is damaged (SHA-256), or the format is unknown.
    """
    text = str(where)
    if isinstance(where, Path) or Path(text).is_dir():
        return _load_directory(Path(where), text)
    if not text.startswith("s3://") and not _POINTER_NAME.fullmatch(text):
        raise UserError(
            f"backbone {text}: no such folder; expected a folder, s3://bucket/prefix, or a pointer such as champion"
        )
    with _store_for(text, store) as opened, tempfile.TemporaryDirectory(prefix="esvit-") as folder:
        uri = backbone_uri(text, opened)
        if opened.read_manifest(uri) is None:
            raise UserError(
                f"backbone {uri}: no complete backbone is published there; expected {DESCRIPTION} and {WEIGHTS}"
            )
        opened.fetch(uri, Path(folder))
        return _load_directory(Path(folder), uri)


def _load_directory(folder: Path, shown: str) -> nn.Module:
    description = read_description(folder, shown)
    try:
        weights = (folder / WEIGHTS).read_bytes()
    except OSError as error:
        raise UserError(
            f"backbone {shown}: {WEIGHTS} cannot be read ({error.strerror}); copy the whole folder"
        ) from None
    if hashlib.sha256(weights).hexdigest() != description["weights"]["sha256"]:
        raise UserError(f"backbone {shown}: {WEIGHTS} is damaged (its SHA-256 differs); fetch or publish it again")
    # The module must be trainable even if the caller is in inference mode.
    with torch.inference_mode(False):
        try:
            model = ModelConfig.model_validate(description["model"])
        except ValidationError as error:
            reason = error.errors()[0]
            raise UserError(
                f"backbone {shown}: this version does not know its architecture ({reason['loc']}: {reason['msg']})"
            ) from None
        backbone = create_backbone(model, img_size=description["img_size"], drop_path=0.0)
        try:
            backbone.load_state_dict(safetensors.torch.load(weights), strict=True)
        except (RuntimeError, SafetensorError) as error:
            raise UserError(f"backbone {shown}: the weights do not fit {description['arch']}: {error}") from None
    backbone.backbone_config = description  # type: ignore[assignment]
    return backbone.eval()


def read_description(folder: Path, shown: str | None = None) -> dict[str, Any]:
    """Read the ``backbone.json`` of a published backbone.

    Raises:
        UserError: it does not exist, or this version does not support its format.
    """
    shown = shown or str(folder)
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        found = description.get("format")
    except FileNotFoundError:
        raise UserError(
            f"backbone {shown}: it contains no {DESCRIPTION}; expected a folder with a published backbone"
        ) from None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"backbone {shown}: {DESCRIPTION} cannot be read ({error}); copy or publish it again") from None
    if found != BACKBONE:
        raise UserError(f"backbone {shown}: unknown format {found!r}; this version reads {BACKBONE}")
    missing = {"arch", "model", "img_size", "weights"} - description.keys()
    if missing:
        raise UserError(f"backbone {shown}: {DESCRIPTION} lacks {', '.join(sorted(missing))}; publish it again")
    return description


def backbone_uri(name: str, store: ObjectStore) -> str:
    """Return the address of a published backbone.

    Args:
        name: the address itself, or a pointer in the bucket ``ESVIT_BUCKET``.
        store: object store.

    Raises:
        UserError: there is no such pointer, or it does not name a backbone.
    """
    if name.startswith("s3://"):
        return name.rstrip("/")
    bucket = os.environ.get("ESVIT_BUCKET", DEFAULT_BUCKET)
    uri = join_uri(f"s3://{bucket}", "pointers", name)
    pointer = store.read_pointer(uri)
    if pointer is None:
        raise UserError(
            f"backbone {name}: no such pointer ({uri}), and no folder of that name; "
            "promote a run first, or set ESVIT_BUCKET to another bucket"
        )
    if not isinstance(pointer.value.get("backbone"), str):
        raise UserError(f"backbone {name}: the pointer {uri} does not name a backbone; promote a run again")
    return pointer.value["backbone"]


@contextlib.contextmanager
def _store_for(where: str, store: ObjectStore | None) -> Iterator[ObjectStore]:
    if store is not None:
        yield store
        return
    directory = os.environ.get("ESVIT_STORE_DIR")
    if not os.environ.get("ESVIT_S3_ENDPOINT") and not directory:
        raise UserError(
            f"backbone {where}: no object store is configured; set ESVIT_S3_ENDPOINT and its keys, "
            "or ESVIT_STORE_DIR to the store folder of a run on this machine"
        )
    if directory and not os.environ.get("ESVIT_S3_ENDPOINT") and not Path(directory).is_dir():
        raise UserError(f"backbone {where}: ESVIT_STORE_DIR names {directory}, which is not a folder")
    with open_store(Path(directory) if directory else None) as opened:
        yield opened
