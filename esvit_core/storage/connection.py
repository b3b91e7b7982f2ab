"""Requests to one S3 endpoint, with retries, and one-line error messages."""

from __future__ import annotations

import functools
import os
import ssl
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import certifi
import urllib3
from minio import Minio
from minio.deleteobjects import DeleteObject
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError

from esvit_core.storage import disk
from esvit_core.storage.address import ACCESS_KEY, CA_FILE, ENDPOINT, REGION, SECRET_KEY, SECURE, StoreAddress
from esvit_core.storage.identity import StsUnavailable, WebIdentityCredentials
from esvit_core.storage.list_page import ListedObject, parse_list_page
from esvit_core.storage.retry import RetryPolicy, ShortBodyError, is_transient, with_retries
from esvit_core.storage.store_errors import (
    NotFound,
    StoreError,
    StoreFull,
    StoreRefused,
    StoreRejected,
    StoreUnavailable,
)

T = TypeVar("T")

CONNECT_SECONDS = 5.0
READ_SECONDS = 60.0
POOL_SIZE = 64  # connections that are kept open; more requests at a time would connect anew for each
PAGE = 1000  # objects that are listed by a request, the most that S3 allows
# User metadata that identifies the request that wrote an object, so that a repeated request recognizes its own result.
WRITER = "x-amz-meta-esvit-writer"
# Error codes for temporary credentials that have expired or that the store has forgotten.
_EXPIRED_CODES = frozenset({"ExpiredToken", "InvalidToken", "InvalidTokenId", "InvalidAccessKeyId"})
_REFUSALS = _EXPIRED_CODES | {"AccessDenied", "SignatureDoesNotMatch", "AccountProblem"}
_WRONG_REGION = frozenset({"AuthorizationHeaderMalformed", "PermanentRedirect", "InvalidLocationConstraint"})
_NO_ROOM_STATUS = 507  # Insufficient Storage
_ABSENT = frozenset({"NoSuchKey", "NoSuchBucket", "NotFound", "ResourceNotFound", "NoSuchUpload"})


class ReadBytes(NamedTuple):
    """Bytes that were read of an object.

    Attributes:
        data: the bytes.
        etag: ETag of the object.
        size: number of bytes of the whole object.
    """

    data: bytes
    etag: str
    size: int


class S3Client(Minio):
    """``Minio`` plus S3 requests that its public methods do not offer: conditional puts and explicit multipart uploads.

    The package has only protected methods for these requests, which a subclass may use.
    """

    def put(self, bucket: str, key: str, data: bytes, headers: dict[str, Any]) -> str:
        """Put an object with exactly these headers; return its ETag.

        ``Minio.put_object`` turns unknown headers, including ``If-Match``, into user metadata.
        """
        return str(self._put_object(bucket, key, data, dict(headers)).etag)

    def read(self, bucket: str, key: str, offset: int = 0, length: int | None = None) -> ReadBytes:
        """Read bytes of an object.

        Args:
            offset: first byte.
            length: maximum number of bytes; None: to the end. Must not be 0.

        Returns:
            What there is: nothing, without ETag and size, from the end of the object on.

        Raises:
            ShortBodyError: the connection ended before the body, which neither minio nor urllib3 treat as an error.
        """
        try:
            response = self.get_object(bucket, key, offset=offset, length=length or 0)
        except S3Error as error:
            if error.code == "InvalidRange":
                return ReadBytes(b"", "", 0)
            raise
        try:
            data = bytes(response.read())
        finally:
            response.close()
            response.release_conn()
        promised = int(response.headers.get("Content-Length", len(data)))
        if len(data) != promised:
            raise ShortBodyError(f"the connection ended after {len(data)} of {promised} bytes")
        total = response.headers.get("Content-Range", "").rpartition("/")[2]  # "bytes 0-9/100"
        etag = str(response.headers.get("ETag", "")).strip('"')
        return ReadBytes(data, etag, int(total) if total.isdecimal() else len(data))

    def writer(self, bucket: str, key: str) -> tuple[str | None, str | None]:
        """Return the ETag and the writer's mark of an object; both None if there is none."""
        try:
            found = self.stat_object(bucket, key)
        except S3Error as error:
            if error.code == "NoSuchKey":
                return None, None
            raise
        return (found.etag or "").strip('"'), (found.metadata or {}).get(WRITER)

    def list_page(self, bucket: str, prefix: str, recursive: bool, token: str) -> tuple[list[ListedObject], str]:
        """List some objects, at most :data:`PAGE`.

        Args:
            recursive: False: only one level.
            token: from the page before; empty: the first page is listed.

        Returns:
            The objects, and the token for the next page; empty if this is the last one.

        Raises:
            InvalidResponseError: the response is not a listing.
        """
        query: dict[str, Any] = {"list-type": "2", "encoding-type": "url", "max-keys": str(PAGE), "prefix": prefix}
        query |= {"delimiter": "" if recursive else "/"} | ({"continuation-token": token} if token else {})
        response = self._execute("GET", bucket, query_params=query)
        try:
            return parse_list_page(response.data)
        except ValueError:
            kind = response.headers.get("Content-Type")
            raise InvalidResponseError(response.status, kind, response.data.decode(errors="replace")) from None

    def remove_all(self, bucket: str, keys: list[str]) -> None:
        """Delete objects, a thousand per request.

        Raises:
            S3Error: the error of the first object that could not be deleted.
        """
        for error in self.remove_objects(bucket, [DeleteObject(key) for key in keys]):
            raise S3Error(
                None,
                error.code,
                error.message,
                error.name,
                None,
                None,
                bucket_name=bucket,
                object_name=error.name,
            )

    def begin_upload(self, bucket: str, key: str, headers: dict[str, Any]) -> str:
        return self._create_multipart_upload(bucket, key, dict(headers))

    def put_part(self, bucket: str, key: str, upload: str, number: int, data: bytes) -> str:
        return str(self._upload_part(bucket, key, data, None, upload, number))

    def finish_upload(self, bucket: str, key: str, upload: str, parts: list[Any]) -> None:
        self._complete_multipart_upload(bucket, key, upload, parts)

    def abort_upload(self, bucket: str, key: str, upload: str) -> None:
        self._abort_multipart_upload(bucket, key, upload)

    def pending_uploads(self, bucket: str, prefix: str) -> list[Any]:
        return list(self._list_multipart_uploads(bucket, prefix=prefix).uploads)


class Connection:
    """Makes requests to one endpoint. May be shared between threads, forked, and pickled."""

    def __init__(
        self, address: StoreAddress, policy: RetryPolicy | None = None, read_seconds: float = READ_SECONDS
    ) -> None:
        self.address = address
        self.policy = policy or RetryPolicy()
        self.read_seconds = read_seconds
        self._client: S3Client | None = None
        self._process = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None}

    @property
    def client(self) -> S3Client:
        """The client of this process; after a fork, sockets must not be shared with the parent."""
        if self._client is None or self._process != os.getpid():
            self._client, self._process = _connect(self.address, self.read_seconds), os.getpid()
        return self._client

    def call(self, what: str, operation: Callable[[S3Client], T], policy: RetryPolicy | None = None) -> T:
        """Make a request, and repeat it after transient failures.

        Args:
            what: ``s3://`` address or action, for error messages.
            operation: the request; must be safe to repeat.
            policy: overrides the connection's policy.

        Raises:
            NotFound: the object or bucket does not exist.
            StoreRefused: the key is not accepted, or lacks the permission.
            StoreFull: the store has no space left.
            StoreUnavailable: no attempt succeeded.
            StoreRejected: the server returned another error.
        """

        def attempt() -> T:
            try:
                try:
                    return operation(self.client)
                except S3Error as error:
                    if error.code not in _EXPIRED_CODES or not self.address.identity:
                        raise
                _credentials(self.address, os.getpid()).forget()
                return operation(self.client)
            except Exception as error:
                if is_transient(error):
                    self.require_room()  # the server reports a full disk as an internal error
                raise

        try:
            return with_retries(attempt, policy or self.policy)
        except (MinioException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            raise to_store_error(error, what, self.address) from error

    def require_room(self, size: int = 0) -> None:
        """Check that ``size`` more bytes fit, if the server is the embedded one.

        Raises:
            StoreFull: the disk of the embedded server is full.
            PathError: the folder of the embedded server was deleted.
        """
        if self.address.directory is not None:
            disk.require_folder(self.address.directory)
            disk.require_room(self.address.directory, size)


def _connect(address: StoreAddress, read_seconds: float) -> S3Client:
    return S3Client(
        address.endpoint,
        access_key=address.access_key or None,
        secret_key=address.secret_key or None,
        credentials=_credentials(address, os.getpid()) if address.identity else None,
        secure=address.secure,
        region=address.region,
        http_client=_pool(address, read_seconds),
    )


def _pool(address: StoreAddress, read_seconds: float) -> urllib3.PoolManager:
    return urllib3.PoolManager(
        timeout=urllib3.Timeout(connect=CONNECT_SECONDS, read=read_seconds),
        maxsize=POOL_SIZE,
        retries=False,  # retry.py decides which failures to retry
        cert_reqs="CERT_REQUIRED",
        ca_certs=str(address.ca_file) if address.ca_file else os.environ.get("SSL_CERT_FILE") or certifi.where(),
    )


@functools.lru_cache(maxsize=16)
def _credentials(address: StoreAddress, process: int) -> WebIdentityCredentials:
    """Return the temporary credentials of this process, shared by all its connections."""
    assert address.identity is not None
    return WebIdentityCredentials(address.identity, _pool(address, READ_SECONDS))


def to_store_error(error: Exception, what: str, address: StoreAddress) -> StoreError:
    """Convert an error to one that states what failed, where, and how to fix it."""
    store = f"object store {address.url}"
    if isinstance(error, StsUnavailable):
        return StoreUnavailable(f"{what}: no credentials for the {store}: {error}")
    if isinstance(error, S3Error):
        code = error.code or "unknown error"
        if code in _ABSENT:
            thing = "bucket" if code == "NoSuchBucket" else "object"
            return NotFound(f"{what}: no such {thing} in the {store}")
        if code in _REFUSALS and address.identity:
            return StoreRefused(
                f"{what}: the {store} refuses the temporary credentials for {address.identity.token_file} ({code}); "
                f"check the permissions of the role {address.identity.role or 'of this token'}"
            )
        if code in _REFUSALS:
            return StoreRefused(
                f"{what}: the {store} refuses the key ({code}); "
                f"check {ACCESS_KEY} and {SECRET_KEY}, and the permissions of the key"
            )
        advice = f"; check {REGION}" if code in _WRONG_REGION else ""
        kind: type[StoreError] = StoreUnavailable if is_transient(error) else StoreRejected
        if getattr(error.response, "status", 0) == _NO_ROOM_STATUS:
            kind, advice = StoreFull, "; free some space there"
        return kind(f"{what}: the {store} returned {code} ({error.message}){advice}")
    if isinstance(error, (InvalidResponseError, ServerError)):
        status = error._code if isinstance(error, InvalidResponseError) else error.status_code
        return StoreUnavailable(
            f"{what}: {address.url} is not a working S3 server (HTTP status {status}); check {ENDPOINT}"
        )
    if isinstance(error, (urllib3.exceptions.SSLError, ssl.SSLError)):
        return StoreUnavailable(
            f"{what}: no TLS connection with {address.url} ({_reason(error)}); "
            f"set {CA_FILE} to the server's CA, or {SECURE}=false if it speaks plain HTTP"
        )
    return StoreUnavailable(
        f"{what}: no answer from the {store} ({_reason(error)}); check {ENDPOINT}, and that the server is running"
    )


def _reason(error: BaseException) -> str:
    """Return urllib3's message without the representations of its objects."""
    if isinstance(error, urllib3.exceptions.NewConnectionError):
        return str(error).rsplit(": ", 1)[-1]
    if isinstance(error, urllib3.exceptions.HTTPError) and len(error.args) > 1:
        return str(error.args[1])
    return str(error).split("): ", 1)[-1] or type(error).__name__
