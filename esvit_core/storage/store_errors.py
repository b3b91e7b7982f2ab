"""Errors of the object store, described for the person who has to fix them.

Each belongs to one of two families: outages (:class:`~esvit_core.errors.InfrastructureError`), which may be transient, and
mistakes (:class:`~esvit_core.errors.UserError`), which are permanent.
"""

# ruff: noqa: N818 (the names state the condition; the base class shows that it is an error)

from __future__ import annotations

from esvit_core.errors import EsvitError, InfrastructureError, UserError


class StoreError(EsvitError):
    """An operation on the object store failed. Raise one of the subclasses."""


class StoreUnavailable(StoreError, InfrastructureError):
    """The endpoint does not answer, or is not a working S3 server."""


class StoreFull(StoreError, InfrastructureError):
    """The disk of the store, or of the local files, is full."""


class LocalDiskError(StoreError, InfrastructureError):
    """This machine's disk failed to read or write a file."""


class PathError(StoreError, UserError):
    """A file or directory of this machine does not exist or cannot be used."""


class StoreRefused(StoreError, UserError):
    """The store rejects the key, or the key lacks the permission."""


class StoreRejected(StoreError, UserError):
    """The store rejects the request, for example because of a wrong region or an unsupported operation."""


class InvalidAddress(UserError):
    """The address is not ``s3://bucket/key``, or not valid for any S3 server."""


class NotFound(StoreError, UserError, KeyError):
    """The object or bucket does not exist."""


class IntegrityError(StoreError, UserError):
    """The bytes of an object differ from its manifest."""
