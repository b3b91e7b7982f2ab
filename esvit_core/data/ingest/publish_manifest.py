"""The last step of a preparation: its manifest appears, or that of another one of the same content is taken."""

from __future__ import annotations

import contextlib
from collections.abc import Collection

from esvit_core.data.shards.manifest import MANIFEST, Manifest
from esvit_core.errors import InfrastructureError, UserError
from esvit_core.storage import NotFound, ObjectStore, StoreError, join_uri


def find_data(store: ObjectStore, destination: str, fingerprint: str, settings: dict[str, object]) -> Manifest | None:
    """The data that were prepared before at a place; None where there are none.

    Args:
        fingerprint: of the source of the data that are wanted.
        settings: the data section of their configuration.

    Raises:
        UserError: there are other data.
    """
    try:
        present = Manifest.read(store, destination)
    except NotFound:
        return None
    if (present.source_fingerprint, present.settings) == (fingerprint, settings):
        return present
    raise UserError(
        f"{destination}: holds the images of {present.source}, which are others or were prepared differently; "
        "choose another run"
    )


def objects_below(store: ObjectStore, destination: str) -> dict[str, int]:
    """Sizes of the objects below a folder, by name."""
    start = len(join_uri(destination)) + 1
    return {stat.uri[start:]: stat.size for stat in store.list(destination)}


def publish_data(store: ObjectStore, destination: str, manifest: Manifest, written: Collection[str]) -> Manifest:
    """Let prepared data appear, unless those of another preparation have appeared first; then take these.

    What no manifest needs is removed: by the one whose manifest it is, all that others have left; by one that came
    too late, what it has written itself.

    Args:
        store: where the data are.
        destination: folder of the data.
        manifest: that names what was stored.
        written: names of the objects that this preparation has stored.

    Returns:
        The manifest that is there now.

    Raises:
        InfrastructureError: an object that the manifest names is not there.
        UserError: data of another content appeared first.
    """
    there = objects_below(store, destination)
    if MANIFEST in there:
        return _adopt(store, destination, manifest, written)
    for name, file in manifest.files.items():
        if there.get(name) != file.bytes:
            raise InfrastructureError(
                f"{join_uri(destination, name)}: was removed while the data were prepared; prepare them again"
            )
    if not manifest.publish(store, destination):
        return _adopt(store, destination, manifest, written)
    _remove(store, destination, there.keys() - manifest.files.keys())
    return manifest


def _adopt(store: ObjectStore, destination: str, manifest: Manifest, written: Collection[str]) -> Manifest:
    present = Manifest.read(store, destination)
    _remove(store, destination, {*written} - present.files.keys())
    find_data(store, destination, manifest.source_fingerprint, manifest.settings)
    print("prepare: another preparation of the same content was finished first; its data are taken", flush=True)
    return present


def _remove(store: ObjectStore, destination: str, names: Collection[str]) -> None:
    """Remove objects that nothing needs; where that fails they stay until the run is removed."""
    with contextlib.suppress(StoreError):
        store.remove_all([join_uri(destination, name) for name in sorted(names)])
