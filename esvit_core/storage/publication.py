"""Publish sets of files that are either complete or absent: the manifest is written last and read first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from esvit_core.errors import UserError
from esvit_core.storage.disk import disk_error_class
from esvit_core.storage.json_text import encode_json
from esvit_core.storage.parallel_transfer import PARALLEL, sha256_of
from esvit_core.storage.store_errors import IntegrityError, NotFound
from esvit_core.storage.uri import join_uri

MANIFEST = "manifest.json"
VERSION = 1


class Objects(Protocol):
    """The operations that publication needs; :class:`esvit_core.storage.store.ObjectStore` provides them."""

    def get_json(self, uri: str) -> Any: ...
    def get_file(self, uri: str, path: Path) -> None: ...
    def put_bytes(self, uri: str, data: bytes) -> None: ...
    def put_file(self, uri: str, path: Path, *, sha256: str | None = None) -> None: ...
    def put_json(self, uri: str, value: Any) -> None: ...
    def put_if_absent(self, uri: str, data: bytes) -> bool: ...
    def remove_prefix(self, uri: str) -> int: ...


def publish(
    store: Objects,
    prefix_uri: str,
    files: Mapping[str, Path | bytes],
    kind: str,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Store a set of files and make it visible in one step.

    Args:
        store: destination store.
        prefix_uri: folder of the set, ``s3://bucket/...``.
        files: contents by name, as local files or as bytes; a name may contain slashes.
        kind: type of the set; its format is ``esvit-<kind>/1``.
        extra: additional keys of the manifest.

    Returns:
        The manifest: ``{"format", "files": {name: {"bytes", "sha256"}}, **extra}``. An existing complete set with the
        same content is left unchanged.

    Raises:
        UserError: the prefix already holds a complete set with different content (objects are written once), another
            process published one concurrently, or a file cannot be read.
    """
    manifest = _manifest(files, kind, extra)
    present = read_manifest(store, prefix_uri)
    if present is not None:
        if present == manifest:
            return present
        raise UserError(
            f"{prefix_uri}: already holds a complete {kind} with different content; publish under a new name"
        )
    for name, content in files.items():
        uri = join_uri(prefix_uri, name)
        if isinstance(content, bytes):
            store.put_bytes(uri, content)
        else:
            store.put_file(uri, content, sha256=manifest["files"][name]["sha256"])
    if store.put_if_absent(join_uri(prefix_uri, MANIFEST), encode_json(manifest)):
        return manifest
    if read_manifest(store, prefix_uri) == manifest:
        return manifest
    raise UserError(
        f"{prefix_uri}: another process published a different {kind} here at the same time, and its files may be "
        "damaged; remove the set and create it again with one process at a time"
    )


def describe(directory: Path, kind: str, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the manifest of the files in a local directory, for :func:`put_set`; see :func:`publish` for the arguments."""
    return _manifest({path.name: path for path in sorted(directory.iterdir())}, kind, extra)


def put_set(
    store: Objects, prefix_uri: str, directory: Path, manifest: dict[str, Any], *, damaged: bool = False
) -> None:
    """Store the files of a local directory in parallel, then the manifest that describes them.

    An identical complete set is left unchanged. A different or damaged set is removed first; the files of an incomplete
    one are overwritten.

    Args:
        damaged: the existing set is known to be damaged, although its manifest may be identical.
    """
    present = _existing_manifest(store, prefix_uri)
    if present == manifest and not damaged:
        return
    if present is not None:
        store.remove_prefix(prefix_uri)
    with ThreadPoolExecutor(PARALLEL, thread_name_prefix="set") as pool:
        for done in [pool.submit(store.put_file, join_uri(prefix_uri, n), directory / n) for n in manifest["files"]]:
            done.result()
    store.put_json(join_uri(prefix_uri, MANIFEST), manifest)


def _existing_manifest(store: Objects, prefix_uri: str) -> Any:
    """Return the JSON at the manifest's address, valid or not; None if there is none."""
    try:
        return store.get_json(join_uri(prefix_uri, MANIFEST))
    except NotFound:
        return None
    except UserError:  # not JSON
        return {}


def check_set(directory: Path) -> dict[str, Any]:
    """Return the manifest of a local set after checking its files against it.

    Raises:
        IntegrityError: a file is missing or differs from the manifest.
        PathError, LocalDiskError: the files cannot be read.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        for name, entry in _entries(manifest, str(path)).items():
            if difference := _difference(directory / name, entry, verify=True):
                raise IntegrityError(f"{directory / name}: damaged, {difference}")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, AttributeError) as error:
        raise IntegrityError(f"{directory}: not a complete set ({error})") from None
    except OSError as error:
        raise disk_error_class(error)(f"{directory}: cannot be read ({error.strerror or error})") from error
    return manifest


def read_manifest(store: Objects, prefix_uri: str) -> dict[str, Any] | None:
    """Return the manifest of a complete set; None if the set is absent or incomplete.

    Raises:
        IntegrityError: the object at the manifest's address is not a manifest.
    """
    uri = join_uri(prefix_uri, MANIFEST)
    try:
        manifest = store.get_json(uri)
    except NotFound:
        return None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), str):
        raise IntegrityError(f"{uri}: not a manifest; remove the set and create it again")
    return manifest


def fetch(
    store: Objects, prefix_uri: str, directory: Path, names: Iterable[str] | None = None, verify: bool = True
) -> dict[str, Any]:
    """Download a published set into a local directory.

    Args:
        store: source store.
        prefix_uri: folder of the set.
        directory: destination; created if necessary. Files that are already there and match the manifest are kept.
        names: fetch only these files.
        verify: compare SHA-256 digests in addition to sizes.

    Returns:
        The manifest.

    Raises:
        NotFound: the prefix holds no complete set.
        IntegrityError: an object is missing, or its size or content differs from the manifest.
    """
    manifest = read_manifest(store, prefix_uri)
    if manifest is None:
        raise NotFound(f"{prefix_uri}: no complete set of files here ({MANIFEST} is missing)")
    entries = _entries(manifest, join_uri(prefix_uri, MANIFEST))
    for name in entries if names is None else names:
        if name not in entries:
            raise NotFound(f"{join_uri(prefix_uri, name)}: not in the set, which contains {', '.join(entries)}")
        _fetch_file(store, join_uri(prefix_uri, name), Path(directory) / name, entries[name], verify)
    return manifest


def _fetch_file(store: Objects, uri: str, path: Path, entry: dict[str, Any], verify: bool) -> None:
    if path.is_file() and not _difference(path, entry, verify):
        return
    try:
        store.get_file(uri, path)
    except NotFound:
        raise IntegrityError(f"{uri}: listed in the manifest but missing; remove the set and create it again") from None
    if difference := _difference(path, entry, verify):
        path.unlink(missing_ok=True)
        raise IntegrityError(f"{uri}: damaged, {difference}; remove the set and create it again")


def _difference(path: Path, entry: dict[str, Any], verify: bool) -> str | None:
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{size} bytes instead of {entry['bytes']}"
    if verify and (digest := sha256_of(path)) != entry["sha256"]:
        return f"SHA-256 {digest[:12]}... instead of {entry['sha256'][:12]}..."
    return None


def _entries(manifest: dict[str, Any], uri: str) -> dict[str, dict[str, Any]]:
    """Return the manifest's ``{name: {"bytes": size, "sha256": digest}}``; no name may lead out of the set's folder."""
    entries = manifest.get("files")
    if isinstance(entries, dict) and all(
        _is_name(name)
        and isinstance(entry, dict)
        and isinstance(entry.get("bytes"), int)
        and isinstance(entry.get("sha256"), str)
        for name, entry in entries.items()
    ):
        return entries
    raise IntegrityError(f"{uri}: not a list of files; remove the set and create it again")


def _is_name(name: str) -> bool:
    return name != MANIFEST and not {"", ".", ".."} & {*name.split("/")}


def _manifest(files: Mapping[str, Path | bytes], kind: str, extra: Mapping[str, Any] | None) -> dict[str, Any]:
    return {**(extra or {}), "format": f"esvit-{kind}/{VERSION}", "files": _describe(files)}


def _describe(files: Mapping[str, Path | bytes]) -> dict[str, dict[str, Any]]:
    described = {}
    for name, content in files.items():
        if not _is_name(name):
            raise ValueError(f"{name!r} is not a valid name for a published file")
        if isinstance(content, bytes):
            described[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            continue
        try:
            described[name] = {"bytes": content.stat().st_size, "sha256": sha256_of(content)}
        except OSError as error:
            raise UserError(f"{content}: cannot be read ({error.strerror}); expected a file to publish") from error
    return described
