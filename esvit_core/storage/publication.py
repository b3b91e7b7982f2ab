"""Sets of files that are complete or absent: the manifest is written last and read first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esvit_core.errors import UserError
from esvit_core.storage.disk import family_of
from esvit_core.storage.json_text import encode_json
from esvit_core.storage.parallel_transfer import PARALLEL, sha256_of
from esvit_core.storage.store_errors import IntegrityError, NotFound
from esvit_core.storage.uri import join_uri

if TYPE_CHECKING:
    from esvit_core.storage.store import ObjectStore

MANIFEST = "manifest.json"
VERSION = 1


def publish(
    store: ObjectStore,
    prefix_uri: str,
    files: Mapping[str, Path | bytes],
    kind: str,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Store a set of files so that it becomes visible at once.

    Args:
        store: where to.
        prefix_uri: the set's folder, ``s3://bucket/...``.
        files: contents by name (names may have slashes), as local files or as bytes.
        kind: what the set is; its format is ``esvit-<kind>/1``.
        extra: further keys of the manifest.

    Returns:
        The manifest: ``{"format", "files": {name: {"bytes", "sha256"}}, **extra}``. A complete set with the same
        content is left as it is.

    Raises:
        UserError: a complete set with other content is already there (objects are written once) or appeared meanwhile,
            or a file cannot be read.
    """
    manifest = _manifest(files, kind, extra)
    present = read_manifest(store, prefix_uri)
    if present is not None:
        if present == manifest:
            return present
        raise UserError(f"{prefix_uri}: another complete {kind} is already there; publish under a new name")
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
        f"{prefix_uri}: another {kind} was published there at the same time, and its files may be damaged; remove the "
        "set and make it again, with one process at a time"
    )


def describe(directory: Path, kind: str, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The manifest of the files in a local directory, for :func:`put_set`; the arguments as of :func:`publish`."""
    return _manifest({path.name: path for path in sorted(directory.iterdir())}, kind, extra)


def put_set(
    store: ObjectStore, prefix_uri: str, directory: Path, manifest: dict[str, Any], *, damaged: bool = False
) -> None:
    """Store a local directory's files, all of them at a time, and then the manifest that describes them.

    A complete set that is the same stays as it is. One that is another, or is damaged, is removed first; what an
    unfinished one has left is replaced.

    Args:
        damaged: whether the set that is there was found to be damaged, though its manifest may be the same.
    """
    present = _manifest_there(store, prefix_uri)
    if present == manifest and not damaged:
        return
    if present is not None:
        store.remove_prefix(prefix_uri)
    with ThreadPoolExecutor(PARALLEL, thread_name_prefix="set") as pool:
        for done in [pool.submit(store.put_file, join_uri(prefix_uri, n), directory / n) for n in manifest["files"]]:
            done.result()
    store.put_json(join_uri(prefix_uri, MANIFEST), manifest)


def _manifest_there(store: ObjectStore, prefix_uri: str) -> Any:
    """What lies in the manifest's place, whatever it is; None: nothing."""
    try:
        return store.get_json(join_uri(prefix_uri, MANIFEST))
    except NotFound:
        return None
    except UserError:  # no JSON
        return {}


def check_set(directory: Path) -> dict[str, Any]:
    """The manifest beside a local set's files, which are the ones that it describes.

    Raises:
        IntegrityError: they are not.
        PathError, LocalDiskError: they cannot be read.
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
        raise family_of(error)(f"{directory}: cannot be read ({error.strerror or error})") from error
    return manifest


def read_manifest(store: ObjectStore, prefix_uri: str) -> dict[str, Any] | None:
    """The manifest of a complete set, None where the set is absent or incomplete.

    Raises:
        IntegrityError: there is one, but it is not a manifest.
    """
    uri = join_uri(prefix_uri, MANIFEST)
    try:
        manifest = store.get_json(uri)
    except NotFound:
        return None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), str):
        raise IntegrityError(f"{uri}: not a manifest; remove the set and make it again")
    return manifest


def fetch(
    store: ObjectStore, prefix_uri: str, directory: Path, names: Iterable[str] | None = None, verify: bool = True
) -> dict[str, Any]:
    """Download a published set into a local directory.

    Args:
        store: where from.
        prefix_uri: the set's folder.
        directory: made if need be; files that are there already and are right are not fetched again.
        names: only these files.
        verify: compare SHA-256 too, not only sizes.

    Returns:
        The manifest.

    Raises:
        NotFound: no complete set is there.
        IntegrityError: an object is missing, of another size, or of other content than the manifest says.
    """
    manifest = read_manifest(store, prefix_uri)
    if manifest is None:
        raise NotFound(f"{prefix_uri}: no complete set of files is there (no {MANIFEST})")
    entries = _entries(manifest, join_uri(prefix_uri, MANIFEST))
    for name in entries if names is None else names:
        if name not in entries:
            raise NotFound(f"{join_uri(prefix_uri, name)}: not in the set; it has {', '.join(entries)}")
        _fetch_file(store, join_uri(prefix_uri, name), Path(directory) / name, entries[name], verify)
    return manifest


def _fetch_file(store: ObjectStore, uri: str, path: Path, entry: dict[str, Any], verify: bool) -> None:
    if path.is_file() and not _difference(path, entry, verify):
        return
    try:
        store.get_file(uri, path)
    except NotFound:
        raise IntegrityError(f"{uri}: named in the manifest but missing; remove the set and make it again") from None
    if difference := _difference(path, entry, verify):
        path.unlink(missing_ok=True)
        raise IntegrityError(f"{uri}: damaged, {difference}; remove the set and make it again")


def _difference(path: Path, entry: dict[str, Any], verify: bool) -> str | None:
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{size} bytes instead of {entry['bytes']}"
    if verify and (digest := sha256_of(path)) != entry["sha256"]:
        return f"SHA-256 {digest[:12]}... instead of {entry['sha256'][:12]}..."
    return None


def _entries(manifest: dict[str, Any], uri: str) -> dict[str, dict[str, Any]]:
    """The manifest's ``{name: {"bytes": size, "sha256": digest}}``; no name leads out of the set's folder."""
    entries = manifest.get("files")
    if isinstance(entries, dict) and all(
        _is_name(name)
        and isinstance(entry, dict)
        and isinstance(entry.get("bytes"), int)
        and isinstance(entry.get("sha256"), str)
        for name, entry in entries.items()
    ):
        return entries
    raise IntegrityError(f"{uri}: not a list of files; remove the set and make it again")


def _is_name(name: str) -> bool:
    return name != MANIFEST and not {"", ".", ".."} & {*name.split("/")}


def _manifest(files: Mapping[str, Path | bytes], kind: str, extra: Mapping[str, Any] | None) -> dict[str, Any]:
    return {**(extra or {}), "format": f"esvit-{kind}/{VERSION}", "files": _describe(files)}


def _describe(files: Mapping[str, Path | bytes]) -> dict[str, dict[str, Any]]:
    described = {}
    for name, content in files.items():
        if not _is_name(name):
            raise ValueError(f"a published file may not be called {name!r}")
        if isinstance(content, bytes):
            described[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            continue
        try:
            described[name] = {"bytes": content.stat().st_size, "sha256": sha256_of(content)}
        except OSError as error:
            raise UserError(f"{content}: cannot be read ({error.strerror}); expected a file to publish") from error
    return described
