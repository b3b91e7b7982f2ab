"""Publish exports in the object store for pipeline steps: atomic and idempotent."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from esvit_core.errors import UserError
from esvit_core.storage import ObjectStore
from esvit_core.weights.backbone import backbone_uri, load_backbone
from esvit_core.weights.formats.export import export_backbone, format_named


def publish_export(model: str, format: str, destination: str, regions: bool, store: ObjectStore) -> dict[str, Any]:
    """Export a published backbone to the object store.

    A repeated call with the same backbone finds the published export and returns.

    Args:
        model: ``s3://`` address of the backbone, or a pointer such as ``champion``.
        format: see :func:`esvit_core.weights.formats.export.export_backbone`.
        destination: ``s3://`` prefix for the files and their manifest.
        regions: give an ONNX file or exported program the regions, too.
        store: object store.

    Returns:
        The manifest; its ``differences`` are the differences from the original network.

    Raises:
        UserError: the backbone or format does not exist, or the destination holds another export.
    """
    source = backbone_uri(model, store)
    wanted = {"backbone": source, "export": format, "regions": regions}
    if (existing := store.read_manifest(destination)) is not None:
        if all(existing.get(key) == value for key, value in wanted.items()):
            print(f"already done: found {destination}", flush=True)
            return existing
        raise UserError(
            f"{destination}: it already contains the export of {existing.get('backbone')} as {existing.get('export')}; "
            "choose another destination"
        )
    suffix = format_named(format).suffix
    with tempfile.TemporaryDirectory(prefix="esvit-") as folder:
        out = Path(folder) / f"backbone{suffix}"
        done = export_backbone(load_backbone(source, store), format, out, regions)
        files = {path.name: path for path in (out.iterdir() if out.is_dir() else [out])}
        differences = {"view": done.view, "regions": done.regions}
        print(done.summary, flush=True)
        return store.publish(destination, files, "export", {**wanted, "differences": differences})
