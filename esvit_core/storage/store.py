"""The client of an S3 object store: put, get, list, and operations built on them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from minio.error import S3Error

from esvit_core.errors import UserError
from esvit_core.storage import parallel_transfer, pointer, publication
from esvit_core.storage.address import StoreAddress
from esvit_core.storage.connection import Connection, S3Client
from esvit_core.storage.json_text import encode_json
from esvit_core.storage.pointer import Pointer
from esvit_core.storage.retry import RetryPolicy
from esvit_core.storage.store_errors import IntegrityError, InvalidAddress, NotFound
from esvit_core.storage.uri import SCHEME, split_uri

_TYPES = {
    ".json": "application/json",
    ".jsonl": "application/x-ndjson",
    ".html": "text/html; charset=utf-8",
    ".yaml": "application/yaml",
    ".png": "image/png",
    ".tar": "application/x-tar",
}


@dataclass(frozen=True)
class ObjectStat:
    """The attributes of an object in a listing."""

    uri: str
    size: int
    etag: str
    modified: datetime | None


class ObjectStore:
    """The objects of an S3 server, addressed as ``s3://bucket/key``.

    An instance may be shared between threads, passed to other processes, and used after a fork.

    Example:
        >>> store = ObjectStore.from_env()
        >>> store.put_json("s3://esvit/runs/a/figures.json", {"knn": 36.3})
        >>> store.get_json("s3://esvit/runs/a/figures.json")
        {'knn': 36.3}

    Args:
        address: endpoint and credentials.
        policy: how often, and after which waits, failed requests are repeated.
    """

    def __init__(self, address: StoreAddress, policy: RetryPolicy | None = None) -> None:
        self.address = address
        self.connection = Connection(address, policy)

    def __repr__(self) -> str:
        return f"ObjectStore({self.address.url!r})"

    @classmethod
    def from_env(cls, environment: Mapping[str, str] | None = None) -> ObjectStore:
        """Return the store that the ``ESVIT_S3_*`` variables name.

        Raises:
            UserError: a variable is missing or malformed.
        """
        return cls(StoreAddress.from_env(environment))

    def check(self) -> None:
        """Check that the server answers and accepts the key.

        A pod tries for some 25 s: a network policy that allows the connection can take effect after the pod has started.

        Raises:
            StoreUnavailable: there is no answer, or the server is not an S3 server.
            StoreRefused: the key is not accepted.
        """

        def list_buckets(client: S3Client) -> None:
            try:
                client.list_buckets()
            except S3Error as error:
                if error.code != "AccessDenied":  # the key is valid, but may not list all buckets
                    raise

        in_pod = "KUBERNETES_SERVICE_HOST" in os.environ
        self.connection.call("connecting", list_buckets, RetryPolicy(attempts=10 if in_pod else 3))

    def ensure_bucket(self, bucket: str) -> None:
        """Create the bucket if it does not exist."""

        def make(client: S3Client) -> None:
            if client.bucket_exists(bucket):
                return
            try:
                client.make_bucket(bucket)
            except S3Error as error:  # another process created it first
                if error.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                    raise

        split_uri(f"{SCHEME}{bucket}")
        self.connection.call(f"{SCHEME}{bucket}", make)

    def buckets(self) -> tuple[str, ...]:
        """Return the names of the buckets that the key may list."""
        found = self.connection.call("listing the buckets", lambda client: client.list_buckets())
        return tuple(bucket.name for bucket in found)

    def put_bytes(self, uri: str, data: bytes, *, content_type: str | None = None) -> None:
        """Store ``data`` as the object ``uri``, atomically."""
        bucket, key = _object(uri)
        headers = {"Content-Type": content_type or _content_type(key)}
        self.connection.require_room(len(data))
        self.connection.call(uri, lambda client: client.put(bucket, key, data, headers))

    def get_bytes(self, uri: str) -> bytes:
        """Return the whole object.

        Raises:
            NotFound: there is no such object.
        """
        return self._read(uri, 0, None)

    def read_range(self, uri: str, offset: int, length: int) -> bytes:
        """Return ``length`` bytes starting at ``offset``, or fewer if the object ends before.

        Raises:
            NotFound: there is no such object.
        """
        if offset < 0 or length < 0:
            raise ValueError(f"offset and length must not be negative, got {offset} and {length}")
        if length == 0:
            return b""
        return self._read(uri, offset, length)

    def put_json(self, uri: str, value: Any) -> None:
        """Store ``value`` as JSON text."""
        self.put_bytes(uri, encode_json(value), content_type="application/json")

    def get_json(self, uri: str) -> Any:
        """Return the decoded JSON of an object.

        Raises:
            NotFound: there is no such object.
            IntegrityError: the object is not JSON.
        """
        data = self.get_bytes(uri)
        try:
            return json.loads(data)
        except ValueError as error:
            raise IntegrityError(f"{uri}: not JSON ({error}); expected an object that this program wrote") from None

    def put_file(self, uri: str, path: Path, *, sha256: str | None = None) -> None:
        """Store a local file as the object ``uri``; large files are uploaded in parallel parts.

        Args:
            uri: destination.
            path: the file.
            sha256: expected digest of the file, hexadecimal; None: not checked.

        Raises:
            IntegrityError: the file's digest is not ``sha256``.
        """
        bucket, key = _object(uri)
        parallel_transfer.upload(self.connection, bucket, key, Path(path), _content_type(key), sha256)

    def get_file(self, uri: str, path: Path) -> None:
        """Download the object to ``path``, atomically."""
        bucket, key = _object(uri)
        parallel_transfer.download(self.connection, bucket, key, Path(path))

    def exists(self, uri: str) -> bool:
        """Return whether the object exists."""
        try:
            self.stat(uri)
        except NotFound:
            return False
        return True

    def stat(self, uri: str) -> ObjectStat:
        """Return the size, ETag and modification time of an object.

        Raises:
            NotFound: there is no such object.
        """
        bucket, key = _object(uri)
        found = self.connection.call(uri, lambda client: client.stat_object(bucket, key))
        return ObjectStat(uri, found.size or 0, (found.etag or "").strip('"'), found.last_modified)

    def list(self, prefix_uri: str, recursive: bool = True) -> Iterator[ObjectStat]:
        """Yield the objects below a prefix, in the order of their keys.

        Args:
            prefix_uri: treated as a folder: ``s3://b/runs/a`` lists ``runs/a/...`` but not ``runs/ab``.
            recursive: False: only one level; a folder is listed with a trailing slash and size 0.
        """
        # SeaweedFS lists folder by folder, with "a/b" before "a-b"; S3 guarantees the order of the keys.
        yield from sorted(self.list_unordered(prefix_uri, recursive), key=lambda stat: stat.uri)

    def list_unordered(self, prefix_uri: str, recursive: bool = True) -> Iterator[ObjectStat]:
        """Yield the objects below a prefix in the order in which the store lists them, requesting a page at a time.

        Args:
            prefix_uri, recursive: as for :meth:`list`.
        """
        bucket, key = split_uri(prefix_uri)
        prefix, token = f"{key.rstrip('/')}/" if key else "", ""
        while True:
            objects, token = self.connection.call(
                prefix_uri, partial(S3Client.list_page, bucket=bucket, prefix=prefix, recursive=recursive, token=token)
            )
            for item in objects:
                if item.key != prefix:
                    yield ObjectStat(f"{SCHEME}{bucket}/{item.key}", item.size, item.etag, item.modified)
            if not token:
                return

    def remove(self, uri: str) -> None:
        """Delete the object if it exists."""
        bucket, key = _object(uri)
        self.connection.call(uri, lambda client: client.remove_object(bucket, key))

    def remove_all(self, uris: Sequence[str]) -> None:
        """Delete the objects that exist; all must be in one bucket."""
        if uris:
            bucket = _object(uris[0])[0]
            keys = [_object(uri)[1] for uri in uris]
            self.connection.call(uris[0], lambda client: client.remove_all(bucket, keys))

    def remove_prefix(self, uri: str) -> int:
        """Delete all objects below a prefix; return their number.

        Manifests are deleted first, so that no reader takes a partially deleted set for a complete one.

        Raises:
            UserError: the prefix is a whole bucket.
        """
        bucket, key = split_uri(uri)
        if not key:
            raise UserError(f"{uri}: refusing to empty a whole bucket; name a prefix in it")
        found = [item.uri.removeprefix(f"{SCHEME}{bucket}/") for item in self.list(uri)]
        manifests = [name for name in found if name.endswith(f"/{publication.MANIFEST}")]
        for names in (manifests, sorted({*found} - {*manifests})):
            self.connection.call(uri, lambda client, names=names: client.remove_all(bucket, names))  # type: ignore[misc]
        return len(found)

    def abort_uploads(self, uri: str, older_than: timedelta | None = None) -> int:
        """Abort the unfinished uploads of killed processes below a prefix; return their number.

        A process that fails or is interrupted aborts its own uploads, and the embedded server drops unfinished uploads when it
        starts, so this is needed for other servers only.

        Args:
            uri: prefix or bucket.
            older_than: abort only uploads older than this; None: all.
        """
        bucket, key = split_uri(uri)
        before = None if older_than is None else datetime.now(UTC) - older_than
        return parallel_transfer.abort_uploads(self.connection, bucket, key, before)

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        """Store ``data`` unless the object exists; exactly one of several concurrent callers gets True."""
        bucket, key = _object(uri)
        return pointer.put_if_absent(self.connection, bucket, key, data, _content_type(key))

    def read_pointer(self, uri: str) -> Pointer | None:
        """Return the pointer's current state; None if it was never set."""
        bucket, key = _object(uri)
        return pointer.read(self.connection, bucket, key)

    def swap_pointer(self, uri: str, value: dict[str, Any], expected: Pointer | None) -> bool:
        """Set the pointer to ``value`` if it is still in the state ``expected``; one of several concurrent callers wins.

        Args:
            uri: the pointer.
            value: new content.
            expected: result of :meth:`read_pointer`; None: the pointer must not exist.

        Returns:
            False if another caller changed the pointer in between: read it again and decide anew.
        """
        bucket, key = _object(uri)
        return pointer.swap(self.connection, bucket, key, value, expected)

    def publish(
        self, prefix_uri: str, files: Mapping[str, Path | bytes], kind: str, extra: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Store a set of files and make it visible in one step. See :mod:`esvit_core.storage.publication`."""
        return publication.publish(self, prefix_uri, files, kind, extra)

    def read_manifest(self, prefix_uri: str) -> dict[str, Any] | None:
        """Return the manifest of a complete set; None if there is none."""
        return publication.read_manifest(self, prefix_uri)

    def fetch(
        self, prefix_uri: str, directory: Path, names: Sequence[str] | None = None, verify: bool = True
    ) -> dict[str, Any]:
        """Download a published set and check it against its manifest. See :mod:`esvit_core.storage.publication`."""
        return publication.fetch(self, prefix_uri, directory, names, verify)

    def _read(self, uri: str, offset: int, length: int | None) -> bytes:
        bucket, key = _object(uri)
        return self.connection.call(uri, lambda client: client.read(bucket, key, offset, length)).data


def _object(uri: str) -> tuple[str, str]:
    bucket, key = split_uri(uri)
    if not key or key.endswith("/"):
        raise InvalidAddress(f"{uri}: expected the address of an object, s3://bucket/key, not of a folder")
    return bucket, key


def _content_type(key: str) -> str:
    return _TYPES.get(Path(key).suffix.lower(), "application/octet-stream")
