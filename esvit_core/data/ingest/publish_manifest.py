"""Publish a preparation's manifest, or adopt that of another preparation of the same content."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping

from esvit_core.data.shards.format import stored_objects
from esvit_core.data.shards.manifest import MANIFEST, Manifest, StoredFile
from esvit_core.errors import InfrastructureError, UserError
from esvit_core.storage import NotFound, ObjectStore, StoreError, join_uri


def find_data(store: ObjectStore, destination: str) -> Manifest | None:
    """Return the manifest of the prepared data at ``destination``, whatever they are; None if there are none."""
    try:
        return Manifest.read(store, destination)
    except NotFound:
        return None


def require_same(present: Manifest, destination: str, fingerprint: str, settings: dict[str, object]) -> None:
    """Raise an error if prepared data are not the expected ones.

    Args:
        present: their manifest.
        destination: their folder.
        fingerprint: fingerprint of the expected data's source.
        settings: the ``data`` section of the expected data's configuration.

    Raises:
        UserError: they are others.
    """
    if (present.source_fingerprint, present.settings) != (fingerprint, settings):
        raise UserError(
            f"{destination}: already holds images of {present.source} with different content or settings; "
            "choose another run"
        )


def objects_below(store: ObjectStore, destination: str) -> dict[str, int]:
    """Return the sizes of the objects below a folder, by name."""
    start = len(join_uri(destination)) + 1
    return {stat.uri[start:]: stat.size for stat in store.list(destination)}


def publish_data(
    store: ObjectStore,
    destination: str,
    manifest: Manifest,
    objects: Mapping[str, StoredFile],
    written: Collection[str],
) -> Manifest:
    """Publish prepared data, or adopt the data of another preparation that was published first.

    Objects that no manifest needs are removed: by the preparation that published its manifest, everything that others left
    behind; by a preparation that came second, the objects it stored itself.

    Args:
        store: store of the data.
        destination: folder of the data.
        manifest: describes the stored objects.
        objects: all objects that it needs, by name.
        written: names of the objects that this preparation stored.

    Returns:
        The manifest that is now published.

    Raises:
        InfrastructureError: an object that the manifest needs is missing.
        UserError: data of different content were published first.
    """
    there = objects_below(store, destination)
    if MANIFEST in there:
        return _adopt(store, destination, manifest, written)
    for name, file in objects.items():
        if there.get(name) != file.bytes:
            raise InfrastructureError(
                f"{join_uri(destination, name)}: removed while the data were being prepared; prepare them again"
            )
    if not manifest.publish(store, destination):
        return _adopt(store, destination, manifest, written)
    remove_objects(store, destination, there.keys() - objects.keys())
    return manifest


def _adopt(store: ObjectStore, destination: str, manifest: Manifest, written: Collection[str]) -> Manifest:
    present = Manifest.read(store, destination)
    remove_objects(store, destination, {*written} - stored_objects(store, destination, present).keys())
    require_same(present, destination, manifest.source_fingerprint, manifest.settings)
    print("prepare: another preparation of the same content finished first; using its data", flush=True)
    return present


def remove_objects(store: ObjectStore, destination: str, names: Collection[str]) -> None:
    """Remove objects that no manifest needs; if that fails they stay until the run is removed."""
    with contextlib.suppress(StoreError):
        store.remove_all([join_uri(destination, name) for name in sorted(names)])
