"""Pointers: the only objects that change, and they change by compare-and-swap."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any

from minio.error import S3Error

from esvit_core.storage.connection import Connection, S3Client
from esvit_core.storage.uri import SCHEME

_WRITER = "x-amz-meta-esvit-writer"


@dataclass(frozen=True)
class Pointer:
    """What a pointer said when it was read.

    Args:
        value: its content.
        etag: names this state of it.
    """

    value: dict[str, Any]
    etag: str


def put_if_absent(connection: Connection, bucket: str, key: str, data: bytes, content_type: str) -> bool:
    """Create the object; False if there is one already."""
    return _conditional_put(connection, bucket, key, data, {"Content-Type": content_type, "If-None-Match": "*"})


def read(connection: Connection, bucket: str, key: str) -> Pointer | None:
    """The pointer's present state, None where it was never set."""

    def get(client: S3Client) -> Pointer | None:
        try:
            response = client.get_object(bucket, key)
        except S3Error as error:
            if error.code == "NoSuchKey":
                return None
            raise
        try:
            return Pointer(json.loads(response.read()), response.headers.get("ETag", "").strip('"'))
        finally:
            response.close()
            response.release_conn()

    return connection.call(f"{SCHEME}{bucket}/{key}", get)


def swap(connection: Connection, bucket: str, key: str, value: dict[str, Any], expected: Pointer | None) -> bool:
    """Replace the state ``expected`` by ``value``; False if it is no longer the present one."""
    data = (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
    condition = {"If-None-Match": "*"} if expected is None else {"If-Match": f'"{expected.etag}"'}
    return _conditional_put(connection, bucket, key, data, {"Content-Type": "application/json", **condition})


def _conditional_put(connection: Connection, bucket: str, key: str, data: bytes, headers: dict[str, str]) -> bool:
    # A connection that breaks after the server has stored the object makes the repeated request meet its own
    # result. The mark tells that apart from another writer's.
    mark = uuid.uuid4().hex

    def put(client: S3Client) -> bool:
        try:
            client.put(bucket, key, data, {**headers, _WRITER: mark})
            return True
        except S3Error as error:
            if error.code == "NoSuchKey" and "If-Match" in headers:
                return False
            if error.code != "PreconditionFailed":
                raise
        try:
            return client.stat_object(bucket, key).metadata.get(_WRITER) == mark
        except S3Error as error:
            if error.code == "NoSuchKey":
                return False
            raise

    return connection.call(f"{SCHEME}{bucket}/{key}", put)
