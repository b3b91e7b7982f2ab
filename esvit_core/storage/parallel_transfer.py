"""Transfer objects to and from files in parallel parts, verified and atomic."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from minio.datatypes import Part
from minio.error import S3Error

from esvit_core.storage.connection import WRITER, Connection, ReadBytes, S3Client
from esvit_core.storage.disk import disk_error_class, is_full, read_at, write_at
from esvit_core.storage.store_errors import IntegrityError, NotFound, StoreFull
from esvit_core.storage.uri import SCHEME

T = TypeVar("T")

PART_BYTES = 8 * 2**20  # S3 allows 10,000 parts: objects of up to 78 GiB
PARALLEL = 4


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def upload(connection: Connection, bucket: str, key: str, path: Path, content_type: str, sha256: str | None) -> None:
    """Store the file ``path`` as an object.

    Raises:
        PathError, LocalDiskError: the file cannot be read.
        IntegrityError: the file's digest is not ``sha256``, or the file changes while it is read.
    """
    headers = {"Content-Type": content_type}
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if sha256 is not None and hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise IntegrityError(f"{path}: SHA-256 is not the expected {sha256}; create the file again")
            connection.require_room(size)
            if size <= PART_BYTES:
                data = _read_part(path, file, 0, size)
                connection.call(f"{SCHEME}{bucket}/{key}", lambda client: client.put(bucket, key, data, headers))
            else:
                try:
                    _upload_parts(connection, bucket, key, path, file, size, headers)
                except NotFound:  # the server was restarted and dropped unfinished uploads
                    _upload_parts(connection, bucket, key, path, file, size, headers)
    except OSError as error:
        raise disk_error_class(error)(
            f"{path}: cannot be read ({error.strerror or error}); expected a file to store"
        ) from error


def _upload_parts(
    connection: Connection, bucket: str, key: str, path: Path, file: BinaryIO, size: int, headers: dict[str, Any]
) -> None:
    uri = f"{SCHEME}{bucket}/{key}"
    mark = uuid.uuid4().hex
    upload_id = connection.call(uri, lambda client: client.begin_upload(bucket, key, {**headers, WRITER: mark}))

    def put(number: int) -> Part:
        offset = (number - 1) * PART_BYTES
        data = _read_part(path, file, offset, min(PART_BYTES, size - offset))
        connection.require_room(len(data))
        etag = connection.call(uri, lambda client: client.put_part(bucket, key, upload_id, number, data))
        return Part(number, etag)

    def finish(client: S3Client) -> None:
        try:
            client.finish_upload(bucket, key, upload_id, parts)
        except S3Error as error:
            # The response to an earlier attempt may have been lost: then the upload is complete and the object is ours.
            if error.code != "NoSuchUpload" or client.writer(bucket, key)[1] != mark:
                raise

    try:
        parts = _in_parallel(put, range(1, -(-size // PART_BYTES) + 1))
        connection.call(uri, finish)
    except BaseException:  # also Ctrl-C must not leave parts behind
        with contextlib.suppress(Exception):
            connection.call(uri, lambda client: client.abort_upload(bucket, key, upload_id))
        raise


def abort_uploads(connection: Connection, bucket: str, prefix: str, before: datetime | None) -> int:
    """Abort unfinished uploads and remove their parts; return the number of uploads.

    Args:
        before: only uploads that were started earlier; None: all.
    """
    uri = f"{SCHEME}{bucket}/{prefix}"
    pending = connection.call(uri, lambda client: client.pending_uploads(bucket, prefix))
    old = [item for item in pending if before is None or item.initiated_time < before]
    for item in old:
        with contextlib.suppress(NotFound):
            connection.call(
                uri,
                lambda client, item=item: client.abort_upload(bucket, item.object_name, item.upload_id),  # type: ignore[misc]
            )
    return len(old)


def download(connection: Connection, bucket: str, key: str, path: Path) -> None:
    """Download the object to ``path`` atomically.

    Raises:
        NotFound: there is no such object.
        StoreFull: the file's disk is full.
        PathError, LocalDiskError: the file cannot be written.
    """
    uri = f"{SCHEME}{bucket}/{key}"

    def read(offset: int) -> ReadBytes:
        return connection.call(uri, lambda client: client.read(bucket, key, offset, PART_BYTES))

    first = read(0)

    def get(offset: int, file: BinaryIO) -> None:
        part = read(offset) if offset else first
        if part.etag != first.etag:
            raise IntegrityError(f"{uri}: the object was replaced while being read; read it again")
        write_at(file.fileno(), part.data, offset)

    try:
        with _atomic_file(path) as file:
            _in_parallel(lambda offset: get(offset, file), range(0, first.size, PART_BYTES))
    except OSError as error:
        if is_full(error):
            raise StoreFull(f"{path}: the disk is full, {first.size} bytes needed; free some space there") from error
        raise disk_error_class(error)(f"{path}: cannot be written ({error.strerror or error})") from error


@contextlib.contextmanager
def _atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file beside ``path``, which is renamed to ``path`` on success and removed otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with temporary.open("xb") as file:
            yield file
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _in_parallel(work: Callable[[int], T], items: Sequence[int]) -> list[T]:
    """Return the results in order. After a failure no new item is started, and running ones are waited for."""
    if len(items) == 1:
        return [work(items[0])]
    pool = ThreadPoolExecutor(PARALLEL, thread_name_prefix="store")
    try:
        return list(pool.map(work, items))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _read_part(path: Path, file: BinaryIO, offset: int, length: int) -> bytes:
    data = read_at(file.fileno(), length, offset)
    if len(data) != length:
        raise IntegrityError(f"{path}: was truncated during the upload; do not modify a file while it is stored")
    return data
