"""What can go wrong with an object store, in the words of the person who has to put it right."""

# ruff: noqa: N818  the names say what is the matter; what they derive from says that it is an error

from __future__ import annotations

from esvit_core.errors import UserError


class StoreError(UserError):
    """The object store did not do what was asked of it."""


class StoreUnavailable(StoreError):
    """Nothing answers at the endpoint, or what answers is not an S3 server in working order."""


class StoreRefused(StoreError):
    """The store answers but does not accept the key, or the key may not do this."""


class StoreFull(StoreError):
    """The disk of the store, or the one a download goes to, has no room left."""


class NotFound(StoreError, KeyError):
    """There is no such object or bucket."""


class IntegrityError(StoreError):
    """An object's bytes are not those that its manifest promises."""
