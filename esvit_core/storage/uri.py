"""``s3://bucket/key`` addresses."""

from __future__ import annotations

import re

from esvit_core.storage.store_errors import InvalidAddress

SCHEME = "s3://"
# S3's rules: 3 to 63 lower-case letters, digits, dots and hyphens, with a letter or digit at both ends.
_BUCKET = re.compile(r"[a-z0-9](?:[a-z0-9-]|\.(?!\.)){1,61}[a-z0-9]")
_IP_ADDRESS = re.compile(r"\d+\.\d+\.\d+\.\d+")
MAX_KEY_BYTES = 1024


def split_uri(uri: str) -> tuple[str, str]:
    """Split ``s3://bucket/key`` into bucket and key; the key of a bucket itself is empty.

    Args:
        uri: address of an object, a prefix (with or without a trailing slash), or a bucket.

    Raises:
        InvalidAddress: the address does not have that form, or is not valid for any S3 server.
    """
    if not uri.startswith(SCHEME):
        raise InvalidAddress(f"{uri!r}: expected an object store address; write it as s3://bucket/key")
    bucket, _, key = uri[len(SCHEME) :].partition("/")
    if not _BUCKET.fullmatch(bucket) or _IP_ADDRESS.fullmatch(bucket):
        raise InvalidAddress(
            f"{uri!r}: {bucket!r} is not a valid bucket name; expected 3 to 63 lower-case letters, digits, '.' and '-'"
        )
    _check_key(uri, key)
    return bucket, key


def join_uri(base: str, *parts: str) -> str:
    """Append ``parts`` to an address, with exactly one slash between them.

    Args:
        base: an ``s3://`` address.
        parts: names or relative paths; empty parts and leading or trailing slashes are ignored.

    Raises:
        InvalidAddress: the result is not a valid address.
    """
    pieces = [part.strip("/") for part in parts]
    uri = "/".join([base.rstrip("/"), *(piece for piece in pieces if piece)])
    split_uri(uri)
    return uri


def _check_key(uri: str, key: str) -> None:
    segments = key.removesuffix("/").split("/") if key else []
    if any(segment in ("", ".", "..") for segment in segments):
        raise InvalidAddress(f"{uri!r}: the key has an empty, '.' or '..' part; give every part a name")
    if any(ord(character) < 32 or character == "\x7f" for character in key):
        raise InvalidAddress(f"{uri!r}: the key has control characters; rename the object")
    try:
        size = len(key.encode())
    except UnicodeEncodeError:  # a lone surrogate, from a file name that is not UTF-8
        raise InvalidAddress(f"{uri!r}: the key is not valid Unicode; rename the object") from None
    if size > MAX_KEY_BYTES:
        raise InvalidAddress(f"{uri!r}: the key is {size} bytes long; S3 allows {MAX_KEY_BYTES}, choose a shorter one")
