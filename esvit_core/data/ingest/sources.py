"""Sources of images: a folder, archives and other files of images, a table, or a prefix in an object store.

The files are listed first, then read one at a time in any order. Archives are never unpacked to the paths they contain.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from esvit_core.data.ingest import archives, arrow_files
from esvit_core.data.ingest import fingerprint as fingerprints
from esvit_core.data.ingest.archives import Source, TarSource, ZipSource
from esvit_core.data.ingest.arrow_files import holds_images, require_pyarrow
from esvit_core.data.ingest.combined_source import CombinedSource
from esvit_core.data.ingest.container_sets import ContainerSet, find_containers, is_container_name, open_container
from esvit_core.data.ingest.file_kinds import is_ignored, may_be_image, suffix
from esvit_core.data.ingest.listed_sources import EXPECTED, FolderSource, ListedSource, PrefixSource, walk
from esvit_core.data.ingest.path_tables import PathTable, is_path_table
from esvit_core.data.ingest.published_files import TSV_HEAD, is_image_tsv
from esvit_core.data.ingest.sample_labels import with_sample_labels
from esvit_core.data.ingest.source_lists import split_sources
from esvit_core.data.ingest.source_patterns import is_pattern, list_pattern
from esvit_core.errors import UserError
from esvit_core.storage import ObjectStore, split_uri
from esvit_core.storage.disk import read_at
from esvit_core.storage.uri import SCHEME

_FILE_SUFFIXES = (*archives.SUFFIXES, *arrow_files.SUFFIXES, ".csv", ".tsv")


@contextlib.contextmanager
def open_source(source: str, store: ObjectStore | None = None) -> Iterator[Source]:
    """List a source and make its files readable.

    Args:
        source: folder, tar, zip, table, ``s3://bucket/prefix``, ``s3://bucket/key`` of a file, or a pattern of archives;
            or several of them, see :mod:`esvit_core.data.ingest.source_lists`. ``docs/data.md`` lists the forms.
        store: store of an ``s3://`` source; None: the one that ``ESVIT_S3_*`` name.

    Raises:
        UserError: the source does not exist, cannot be read, is damaged, or is of another type.
    """
    parts = split_sources(source)
    if len(parts) > 1:
        with contextlib.ExitStack() as stack:
            yield CombinedSource([stack.enter_context(open_source(part, store)) for part in parts])
        return
    listed = _list(source, store)
    if listed is None:
        with _local_file(source, store) as path, _open_file(source, path, store) as opened:
            yield opened
    elif containers := find_containers(listed):
        with contextlib.closing(ContainerSet(source, listed, containers)) as opened:
            yield opened
    elif is_pattern(source):
        raise UserError(f"{source}: matches no archives; expected a pattern such as shards/train-*.tar, or a folder")
    else:
        yield listed


def is_listed(source: str, store: ObjectStore | None = None) -> bool:
    """Return whether the listing of a source gives its fingerprint: not that of a file of images."""
    parts = split_sources(source)
    if len(parts) > 1:
        return all(is_listed(part, store) for part in parts)
    if source.startswith(SCHEME) and not is_pattern(source):
        return is_path_table(source) or not _is_file_object(store or ObjectStore.from_env(), source)
    return is_pattern(source) or _is_folder(source) or (is_path_table(source) and not _holds_images(Path(source)))


def check_source(source: str) -> None:
    """Check a source for common mistakes without reading images.

    Raises:
        UserError: the source does not exist, cannot be read, is neither folder nor archive, or contains no images.
    """
    parts = split_sources(source)
    if len(parts) > 1:
        for part in parts:
            check_source(part)
        return
    may_be_containers = False
    with _iterate_names(source) as names:
        for name in names:
            if not is_ignored(name) and may_be_image(name):
                return
            may_be_containers = may_be_containers or is_container_name(name)
    listed = _list(source, None) if may_be_containers else None
    if listed is not None and (containers := find_containers(listed)):
        if any(suffix(entry.name) in arrow_files.SUFFIXES for entry in containers):
            require_pyarrow(source)
        return
    raise UserError(f"{source}: no images in it; expected JPEG, PNG, WebP, GIF, BMP or TIFF files")


def source_fingerprint(source: str, store: ObjectStore | None = None, opened: Source | None = None) -> str:
    """Return a fingerprint of the content of a source, independent of its location.

    See :mod:`esvit_core.data.ingest.fingerprint` for what is read.

    Args:
        source: as for :func:`open_source`.
        store: store of an ``s3://`` source; None: the one that ``ESVIT_S3_*`` name.
        opened: the source if it is already open, to avoid listing it again.

    Returns:
        64 hexadecimal digits.

    Raises:
        UserError: the source does not exist or cannot be read.
    """
    parts = split_sources(source)
    if len(parts) > 1:
        each = opened.parts if isinstance(opened, CombinedSource) else [None] * len(parts)
        prints = [source_fingerprint(part, store, one) for part, one in zip(parts, each, strict=True)]
        return hashlib.sha256("\n".join(prints).encode()).hexdigest()
    if isinstance(opened, ListedSource):
        return opened.fingerprint()
    if (listed := _list(source, store)) is not None:
        return listed.fingerprint()
    if source.startswith(SCHEME):
        store = store or ObjectStore.from_env()
        if is_listed(source, store):
            with open_source(source, store) as table:
                return source_fingerprint(source, store, table)
        return fingerprints.archive_fingerprint(store.stat(source).size, partial(store.read_range, source))
    _require_file(source)
    if is_listed(source):
        with open_source(source, store) as table:
            return source_fingerprint(source, store, table)
    try:
        with Path(source).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return fingerprints.archive_fingerprint(size, lambda offset, length: read_at(file.fileno(), length, offset))
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror}); {EXPECTED} that is readable") from None


def _list(source: str, store: ObjectStore | None) -> FolderSource | PrefixSource | None:
    """List the files of a folder, a prefix or a pattern; None if the source is a single file."""
    if is_pattern(source):
        return list_pattern(source, store)
    if source.startswith(SCHEME):
        store = store or ObjectStore.from_env()
        return None if _is_file_object(store, source) else PrefixSource(store, source)
    return FolderSource(Path(source)) if _is_folder(source) else None


def _is_folder(source: str) -> bool:
    return os.path.isdir(source)  # noqa: PTH112 (Path.is_dir raises if a parent folder is not accessible)


def _require_file(source: str) -> None:
    path = Path(source)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would block forever
            raise UserError(f"{source}: neither a folder nor a regular file; {EXPECTED}")
        with path.open("rb"):
            pass
    except FileNotFoundError:
        raise UserError(f"{source}: does not exist; {EXPECTED}") from None
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror}); {EXPECTED} that is readable") from None


@contextlib.contextmanager
def _local_file(source: str, store: ObjectStore | None) -> Iterator[Path]:
    """Yield a source that is a file, as a file on this machine."""
    if not source.startswith(SCHEME):
        _require_file(source)
        yield Path(source)
        return
    with tempfile.TemporaryDirectory(prefix="esvit-") as folder:
        path = Path(folder) / source.rpartition("/")[2]
        (store or ObjectStore.from_env()).get_file(source, path)
        yield path


@contextlib.contextmanager
def _open_file(source: str, path: Path, store: ObjectStore | None) -> Iterator[Source]:
    if is_path_table(source) and not _holds_images(path):
        yield PathTable(source, path, store)
        return
    with contextlib.closing(open_container(source, path)) as opened:
        if isinstance(opened, TarSource | ZipSource):
            opened.entries = with_sample_labels(opened.entries, opened.read)
        yield opened


def _holds_images(path: Path) -> bool:
    """Return whether a TSV or Parquet file holds images, and does not only name them."""
    if not path.is_file():
        return False
    if path.suffix.lower() == ".parquet":
        return holds_images(path)
    with path.open("rb") as file:
        return path.suffix.lower() == ".tsv" and is_image_tsv(file.read(TSV_HEAD))


@contextlib.contextmanager
def _iterate_names(source: str) -> Iterator[Iterator[str]]:
    """Iterate over the names in a source, reading no more of it than necessary."""
    if is_pattern(source) or source.startswith(SCHEME):
        if (listed := _list(source, None)) is not None:
            yield listed.entries.names()
        else:
            with open_source(source) as opened:
                yield opened.entries.names()
        return
    path = Path(source)
    if _is_folder(source):
        yield (entry.name for entry in walk(path))
        return
    _require_file(source)
    if archives.archive_type(path) == "tar":
        try:
            with tarfile.open(path, "r:*") as tar:  # unlike TarSource, this stops at the first image
                yield (member.name.removeprefix("./") for member in tar if not member.isdir())
        except archives.DAMAGE as error:
            raise archives.damaged_archive(source, error) from None
        return
    with _open_file(source, path, None) as opened:
        yield opened.entries.names()


def _is_file_object(store: ObjectStore, uri: str) -> bool:
    return split_uri(uri)[1].lower().endswith(_FILE_SUFFIXES) and store.exists(uri)
