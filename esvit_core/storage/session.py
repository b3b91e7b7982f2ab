"""Open the object store for the duration of a session, whether it is remote or embedded."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from esvit_core.errors import UserError
from esvit_core.storage.address import ENDPOINT, VARIABLES, StoreAddress
from esvit_core.storage.embedded import EmbeddedStore
from esvit_core.storage.store import ObjectStore

_SESSIONS = "sessions.lock"


@contextlib.contextmanager
def open_store(directory: Path | None) -> Iterator[ObjectStore]:
    """Open the store that ``ESVIT_S3_ENDPOINT`` names, or else the embedded store of ``directory``.

    While the context is open, the ``ESVIT_S3_*`` variables give child processes access to the same store. At the end an
    embedded server is stopped, unless another session uses it or it was started explicitly. A server whose session was
    killed is found by the next session.

    Args:
        directory: data directory of the embedded store; None: no embedded store.

    Raises:
        UserError: no store is configured, the store cannot be reached or rejects the key, or the directory cannot be used.
    """
    if os.environ.get(ENDPOINT, "").strip():
        store = ObjectStore.from_env()
        store.check()
        yield store
        return
    if directory is None:
        raise UserError(f"{ENDPOINT}: not set; expected the address of an object store")
    embedded = EmbeddedStore(directory)
    with _session(embedded) as address, _variables(address.environment()):
        yield ObjectStore(address)


@contextlib.contextmanager
def _session(embedded: EmbeddedStore) -> Iterator[StoreAddress]:
    """Keep the server running as long as this or another session lasts.

    Each session holds a shared lock, which the system releases if the process dies. A session that gets the exclusive lock
    at its end is the last one; a session that starts meanwhile waits until the server is stopped.
    """
    embedded.make_directory()
    with (embedded.directory / _SESSIONS).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        try:
            yield embedded.start(keep=False)
        finally:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                running = embedded.status()
                if running is None or not running.keep:
                    embedded.stop()


@contextlib.contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables within the context."""
    before = {name: os.environ.get(name) for name in VARIABLES}
    for name in VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
