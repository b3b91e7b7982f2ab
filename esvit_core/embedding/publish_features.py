"""Publish features in the object store atomically, so that a repeated pipeline step finds them."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from esvit_core.data.ingest.sources import source_fingerprint
from esvit_core.embedding.embed import EmbedSettings, embed
from esvit_core.errors import UserError
from esvit_core.storage import ObjectStore
from esvit_core.weights.backbone import backbone_uri, load_backbone

FEATURES = "features.parquet"


def publish_features(
    model: str, data: str, destination: str, settings: EmbedSettings, store: ObjectStore
) -> dict[str, Any]:
    """Write the features of images to ``features.parquet`` in the object store; see :func:`.embed.embed`.

    If the same features were published before, they are left unchanged and their manifest is returned.

    Args:
        model: ``s3://`` address of the backbone, or a pointer such as ``champion``.
        data: folder, archive or ``s3://`` prefix.
        destination: ``s3://`` folder for the file, the list of bad images, and the manifest.

    Returns:
        The manifest, with the numbers of ``images`` and ``bad`` files.

    Raises:
        UserError: as :func:`.embed.embed`; or the destination holds other features.
    """
    source = backbone_uri(model, store)
    wanted = {"backbone": source, "fingerprint": source_fingerprint(data, store), "settings": asdict(settings)}
    if (found := store.read_manifest(destination)) is not None:
        if all(found.get(key) == value for key, value in wanted.items()):
            print(f"already done: found {destination}", flush=True)
            return found
        raise UserError(
            f"{destination}: already holds features of {found.get('data')} from {found.get('backbone')} with other images, "
            "backbone or settings; choose another destination"
        )
    with tempfile.TemporaryDirectory(prefix="esvit-") as folder:
        result = embed(load_backbone(source, store), data, Path(folder) / FEATURES, settings, store)
        files = {path.name: path for path in Path(folder).iterdir()}
        print(result.describe(), flush=True)
        metadata = {"data": data, "images": result.images, "width": result.width, "bad": len(result.bad)}
        return store.publish(destination, files, "features", {**wanted, **metadata})
