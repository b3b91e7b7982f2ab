"""Exports in the object store, for steps of a pipeline: complete or absent, and found again."""

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

    Repeated with the same backbone it finds what is there and returns.

    Args:
        model: ``s3://`` address of the backbone, or a pointer such as ``champion``.
        format: see :func:`esvit_core.weights.formats.export.export_backbone`.
        destination: ``s3://`` folder for the files and their manifest.
        regions: an ONNX file or exported program gives the regions too.

    Returns:
        The manifest; its ``differences`` are those from the network itself.

    Raises:
        UserError: no such backbone or format, or another export is there.
    """
    source = backbone_uri(model, store)
    wanted = {"backbone": source, "export": format, "regions": regions}
    if (found := store.read_manifest(destination)) is not None:
        if all(found.get(key) == value for key, value in wanted.items()):
            print(f"already done: found {destination}", flush=True)
            return found
        raise UserError(
            f"{destination}: holds the export of {found.get('backbone')} as {found.get('export')}; "
            "name another destination"
        )
    suffix = format_named(format).suffix
    with tempfile.TemporaryDirectory(prefix="esvit-") as folder:
        out = Path(folder) / f"backbone{suffix}"
        done = export_backbone(load_backbone(source, store), format, out, regions)
        files = {path.name: path for path in (out.iterdir() if out.is_dir() else [out])}
        differences = {"view": done.view, "regions": done.regions}
        print(done.told, flush=True)
        return store.publish(destination, files, "export", {**wanted, "differences": differences})
