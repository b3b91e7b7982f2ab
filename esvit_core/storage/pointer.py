"""Pointers: the only mutable objects, changed by compare-and-swap.

The server compares: a put with ``If-None-Match: *`` creates an object, a put with ``If-Match: <etag>`` replaces one, and
the server rejects either (412) if the object is in another state. SeaweedFS 4.48 decides under a lock of the path, so
exactly one of several concurrent writers succeeds (``tests/storage/test_pointer.py`` tests this); AWS and MinIO behave
the same. The writer also checks the object first, so a server that ignores the headers does not overwrite it blindly.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any

from minio.error import S3Error

from esvit_core.storage.connection import WRITER, Connection, ReadBytes, S3Client
from esvit_core.storage.json_text import encode_json
from esvit_core.storage.store_errors import IntegrityError
from esvit_core.storage.uri import SCHEME


@dataclass(frozen=True)
class Pointer:
    """The state of a pointer when it was read.

    Args:
        value: content of the pointer.
        etag: identifies this state.
    """

    value: dict[str, Any]
    etag: str


def put_if_absent(connection: Connection, bucket: str, key: str, data: bytes, content_type: str) -> bool:
    """Create the object; return False if it already exists."""
    return _put_if(connection, bucket, key, data, content_type, None)


def swap(connection: Connection, bucket: str, key: str, value: dict[str, Any], expected: Pointer | None) -> bool:
    """Replace the state ``expected`` by ``value``; return False if the pointer is no longer in that state."""
    etag = None if expected is None else expected.etag
    return _put_if(connection, bucket, key, encode_json(value), "application/json", etag)


def read(connection: Connection, bucket: str, key: str) -> Pointer | None:
    """Return the pointer's current state; None if it was never set."""
    uri = f"{SCHEME}{bucket}/{key}"

    def get(client: S3Client) -> ReadBytes | None:
        try:
            return client.read(bucket, key)
        except S3Error as error:
            if error.code == "NoSuchKey":
                return None
            raise

    found = connection.call(uri, get)
    if found is None:
        return None
    try:
        value = json.loads(found.data)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise IntegrityError(f"{uri}: not a pointer; remove the object if it is not needed")
    return Pointer(value, found.etag)


def _put_if(
    connection: Connection, bucket: str, key: str, data: bytes, content_type: str, expected: str | None
) -> bool:
    """Put the object if its ETag is ``expected`` (None: if it does not exist); return whether it was put."""
    condition = {"If-None-Match": "*"} if expected is None else {"If-Match": f'"{expected}"'}
    # If the connection breaks after the server has stored the object, the repeated request finds its own result. The mark
    # distinguishes it from another writer's.
    mark = uuid.uuid4().hex
    headers = {"Content-Type": content_type, WRITER: mark, **condition}

    def put(client: S3Client) -> bool:
        etag, writer = client.writer(bucket, key)
        if writer == mark:
            return True
        if etag != expected:
            return False
        try:
            client.put(bucket, key, data, headers)
            return True
        except S3Error as error:
            if error.code not in ("PreconditionFailed", "NoSuchKey"):
                raise
            return client.writer(bucket, key)[1] == mark

    connection.require_room(len(data))
    return connection.call(f"{SCHEME}{bucket}/{key}", put)
