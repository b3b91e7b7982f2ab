"""Object storage: an S3 client based on the ``minio`` package, and an embedded server for a single machine."""

from __future__ import annotations

from esvit_core.storage.address import StoreAddress
from esvit_core.storage.pointer import Pointer
from esvit_core.storage.store import ObjectStat, ObjectStore
from esvit_core.storage.store_errors import (
    IntegrityError,
    InvalidAddress,
    NotFound,
    StoreError,
    StoreFull,
    StoreRefused,
    StoreRejected,
    StoreUnavailable,
)
from esvit_core.storage.uri import join_uri, split_uri

__all__ = [
    "IntegrityError",
    "InvalidAddress",
    "NotFound",
    "ObjectStat",
    "ObjectStore",
    "Pointer",
    "StoreAddress",
    "StoreError",
    "StoreFull",
    "StoreRefused",
    "StoreRejected",
    "StoreUnavailable",
    "join_uri",
    "split_uri",
]
