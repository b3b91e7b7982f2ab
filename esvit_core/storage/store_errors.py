"""What can go wrong with an object store, in the words of the person who has to put it right.

Each is one of two families: an outage (:class:`~esvit_core.errors.InfrastructureError`), which may pass, or a mistake
(:class:`~esvit_core.errors.UserError`), which stays.
"""

# ruff: noqa: N818  the names say what is the matter; what they derive from says that it is an error

from __future__ import annotations

from esvit_core.errors import EsvitError, InfrastructureError, UserError


class StoreError(EsvitError):
    """The object store did not do what was asked of it. Raise one of the subclasses."""


class StoreUnavailable(StoreError, InfrastructureError):
    """Nothing answers at the endpoint, or what answers is not an S3 server in working order."""


class StoreFull(StoreError, InfrastructureError):
    """The disk of the store, or the one a download goes to, has no room left."""


class LocalDiskError(StoreError, InfrastructureError):
    """This machine's disk failed to read or write a file that goes to the store or comes from it."""


class PathError(StoreError, UserError):
    """A file or directory of this machine is not there, or may not be used so."""


class StoreRefused(StoreError, UserError):
    """The store answers but does not accept the key, or the key may not do this."""


class StoreRejected(StoreError, UserError):
    """The store answers, and rejects the request itself: a wrong region, or something that this server cannot do."""


class InvalidAddress(UserError):
    """It is no ``s3://bucket/key``, or one that no S3 server could hold."""


class NotFound(StoreError, UserError, KeyError):
    """There is no such object or bucket."""


class IntegrityError(StoreError, UserError):
    """An object's bytes are not those that its manifest promises."""
