"""Objects to and from files: in parallel parts, checked, and never half there."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from minio.datatypes import Part
from minio.error import S3Error

from esvit_core.errors import UserError
from esvit_core.storage.connection import Connection, S3Client
from esvit_core.storage.errors import IntegrityError
from esvit_core.storage.retry import ShortBody
from esvit_core.storage.uri import SCHEME

PART_BYTES = 16 * 2**20  # at most 10,000 parts: objects up to 156 GiB
PARALLEL = 4
_HASH_BLOCK = 2**20


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_range(client: S3Client, bucket: str, key: str, offset: int, length: int | None) -> bytes:
    """Bytes of an object; a body that ends early is an error, which neither minio nor urllib3 make of it."""
    response = client.get_object(bucket, key, offset=offset, length=length or 0)
    try:
        data = bytes(response.read())
    finally:
        response.close()
        response.release_conn()
    promised = int(response.headers.get("Content-Length", len(data)))
    if len(data) != promised:
        raise ShortBody(f"{len(data)} of {promised} bytes received")
    return data


def upload(connection: Connection, bucket: str, key: str, path: Path, content_type: str, sha256: str | None) -> None:
    """Store the file ``path`` as an object.

    Raises:
        UserError: the file cannot be read.
        IntegrityError: it is not the one that ``sha256`` describes.
    """
    uri = f"{SCHEME}{bucket}/{key}"
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if sha256 is not None and hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise IntegrityError(f"{path}: its SHA-256 is not {sha256}, the file changed; make it again")
            if size <= PART_BYTES:
                data = _read_at(file, 0, size)
                connection.call(uri, lambda client: client.put(bucket, key, data, {"Content-Type": content_type}))
            else:
                _upload_parts(connection, bucket, key, file, size, content_type)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); expected a file to store") from error


def _upload_parts(connection: Connection, bucket: str, key: str, file: BinaryIO, size: int, content_type: str) -> None:
    uri = f"{SCHEME}{bucket}/{key}"
    upload_id = connection.call(uri, lambda client: client.begin_upload(bucket, key, {"Content-Type": content_type}))

    def put(number: int) -> Part:
        data = _read_at(file, (number - 1) * PART_BYTES, PART_BYTES)
        etag = connection.call(uri, lambda client: client.put_part(bucket, key, upload_id, number, data))
        return Part(number, etag)

    try:
        with _pool() as pool:
            parts = list(pool.map(put, range(1, -(-size // PART_BYTES) + 1)))
        _finish(connection, bucket, key, upload_id, parts, size)
    except BaseException:  # Ctrl-C too must leave no parts behind
        with contextlib.suppress(Exception):
            connection.call(uri, lambda client: client.abort_upload(bucket, key, upload_id))
        raise


def _finish(connection: Connection, bucket: str, key: str, upload_id: str, parts: list[Part], size: int) -> None:
    def finish(client: S3Client) -> None:
        try:
            client.finish_upload(bucket, key, upload_id, parts)
        except S3Error as error:
            # The answer to an earlier attempt may have been lost: then the upload is gone and the object is there.
            if error.code != "NoSuchUpload" or client.stat_object(bucket, key).size != size:
                raise

    connection.call(f"{SCHEME}{bucket}/{key}", finish)


def download(connection: Connection, bucket: str, key: str, path: Path) -> None:
    """Write the object to ``path``, which appears whole or not at all.

    Raises:
        NotFound: there is no such object.
        UserError: the file cannot be written.
    """
    uri = f"{SCHEME}{bucket}/{key}"
    found = connection.call(uri, lambda client: client.stat_object(bucket, key))
    size, etag = found.size or 0, found.etag or ""

    def get(file: BinaryIO, offset: int) -> None:
        length = min(PART_BYTES, size - offset)
        data = connection.call(uri, lambda client: _read_same(client, bucket, key, offset, length, etag))
        os.pwrite(file.fileno(), data, offset)

    with _appearing(path) as file, _pool() as pool:
        for _ in pool.map(lambda offset: get(file, offset), range(0, size, PART_BYTES)):
            pass


def _read_same(client: S3Client, bucket: str, key: str, offset: int, length: int, etag: str) -> bytes:
    response = client.get_object(bucket, key, offset=offset, length=length)
    try:
        now = response.headers.get("ETag", "").strip('"')
        if now != etag:
            raise IntegrityError(f"{SCHEME}{bucket}/{key}: the object was replaced while it was read; read it again")
        data = bytes(response.read())
    finally:
        response.close()
        response.release_conn()
    if len(data) != length:
        raise ShortBody(f"{len(data)} of {length} bytes received")
    return data


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[BinaryIO]:
    """A temporary file beside ``path`` that takes its name if all goes well and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".part", delete=False) as file:
        try:
            yield file  # type: ignore[misc]
            file.flush()
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for the parts; after a failure the parts that wait are dropped."""
    pool = ThreadPoolExecutor(PARALLEL, thread_name_prefix="store")
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown(wait=True)


def _read_at(file: BinaryIO, offset: int, length: int) -> bytes:
    return os.pread(file.fileno(), length, offset)
