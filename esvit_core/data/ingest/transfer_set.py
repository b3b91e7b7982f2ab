"""Prepare a transfer set: from one folder per class, or from the layout in which a set of the paper is distributed."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from esvit_core.config import DataConfig, TransferSet
from esvit_core.data.ingest.prepare import prepare
from esvit_core.data.ingest.published_sets import READERS, VOC_CLASSES, Files
from esvit_core.data.ingest.sources import open_source
from esvit_core.data.shards.manifest import Manifest
from esvit_core.errors import UserError
from esvit_core.storage import NotFound, ObjectStore

_FOLDERS = {"train": "train", "test": "val"}  # test images are those that are measured


def prepare_transfer_set(
    chosen: TransferSet, store: ObjectStore, destination: str, config: DataConfig, base: str | None = None
) -> Manifest:
    """Store the images of a transfer set as shards; existing ones are returned.

    Args:
        chosen: the set; with a ``layout``, its official splits and labels are used.
        store: store of the data, and of an ``s3://`` source.
        destination: ``s3://`` folder of the data.
        config: the ``data`` section of the configuration.
        base: earlier data whose images are reused; unused with a layout.

    Raises:
        UserError: the source cannot be read, or it does not have the layout.
    """
    if chosen.layout is None:
        return prepare(chosen.source, store, destination, config, base=base)
    try:
        return Manifest.read(store, destination)
    except NotFound:
        pass
    with tempfile.TemporaryDirectory(prefix="esvit-") as folder:
        labels = arrange(chosen.layout, chosen.source, Path(folder), store)
        if labels:
            store.put_json(several_labels_uri(destination), labels)
        how = {"labels": "none" if labels else "folder", "splits": "auto"}
        return prepare(folder, store, destination, config.model_copy(update=how))


def several_labels_uri(destination: str) -> str:
    """Return the address of the labels of a set with several labels per image; other sets have no such object."""
    return f"{destination.rstrip('/')}.labels.json"


def arrange(layout: str, source: str, folder: Path, store: ObjectStore | None = None) -> dict[str, Any]:
    """Write the images of a published set to ``train/<class>/`` and ``val/<class>/`` of a folder.

    A set with several labels per image has no folders of classes.

    Args:
        layout: key of :data:`esvit_core.data.ingest.published_sets.READERS`.
        source: the set as it is distributed, unpacked or as one archive.
        folder: an empty folder.
        store: store of an ``s3://`` source.

    Returns:
        Of a set with several labels, ``classes`` and for each image, by its name, 1, 0 (difficult) or -1 of each class;
        otherwise nothing.

    Raises:
        UserError: a file of the layout is missing or cannot be read.
    """
    labels: dict[str, list[int]] = {}
    counts: Counter[str] = Counter()
    with open_source(source, store) as opened:
        entries = {entry.name: entry for entry in opened.entries}
        files = Files(list(entries), lambda name: opened.read(entries[name]), f"{layout} {source}")
        try:
            for item in READERS[layout](files):
                counts[item.split] += 1
                parent = folder / _FOLDERS[item.split]
                name = item.name.replace("/", "_")
                if isinstance(item.label, str):
                    parent /= item.label.replace("/", "_")
                else:
                    labels[name] = list(item.label)
                parent.mkdir(parents=True, exist_ok=True)
                (parent / name).write_bytes(item.data)
        except (KeyError, IndexError, ValueError) as error:
            raise UserError(
                f"{layout} {source}: its lists do not have the expected content ({error!r}); unpack the set as it is distributed"
            ) from None
    if set(counts) != set(_FOLDERS):
        found = ", ".join(f"{count:,} {split}" for split, count in counts.items()) or "none"
        raise UserError(f"{layout} {source}: expected training and test images, found {found}")
    return {"classes": list(VOC_CLASSES), "labels": labels} if labels else {}
