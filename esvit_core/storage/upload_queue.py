"""What is on its way to the store: on this machine's disk until it has arrived, in the order in which it was given.

Whoever gives something goes on at once. While the store does not answer, one thread tries again with growing waits;
what a killed process leaves behind is found by the next one on this machine.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from esvit_core.storage.connection import Connection
from esvit_core.storage.disk import family_of, is_full, require_folder
from esvit_core.storage.private_folders import private_folder
from esvit_core.storage.publication import MANIFEST
from esvit_core.storage.retry import RetryPolicy
from esvit_core.storage.store import ObjectStore
from esvit_core.storage.store_errors import StoreError, StoreUnavailable
from esvit_core.storage.uri import join_uri

PENDING_VARIABLE = "ESVIT_PENDING_DIR"
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds
HASTY = RetryPolicy(attempts=3)


class Outbox:
    """Objects, and one set of files at a time, on their way to a prefix of the store.

    Objects go in order. Of sets only the newest waits: one that has not arrived when the next is complete is dropped.
    A set goes after the objects that were given before it.

    Args:
        store: where to.
        uri: prefix of the names; one process at a time may have an outbox for it.
        grace_seconds: how long the store may fail to answer before that is an error.
        directory: where what waits lies; None: see :func:`pending_folder`.
        say: called with a line for people when the store stops answering, and when it answers again.

    Attributes:
        store: where to.
        hasty: the same, for deliveries: it gives up soon, since the outbox tries again by itself.

    Raises:
        PathError: the directory cannot be used.
        StoreFull: its disk is full.
    """

    def __init__(
        self,
        store: ObjectStore,
        uri: str,
        grace_seconds: float = 600.0,
        directory: Path | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.store, self.uri = store, uri
        self.hasty = copy.copy(store)
        self.hasty.connection = Connection(store.address, HASTY)
        self.folder = directory or pending_folder(store, uri)
        self._grace, self._say = grace_seconds, say
        self._objects_folder, self._sets_folder = self.folder / "objects", self.folder / "sets"
        try:
            self._objects_folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._sets_folder.mkdir(exist_ok=True, mode=0o700)
            for half in self._sets_folder.glob(".*"):  # of a killed process
                shutil.rmtree(half)
            left = sorted(self._objects_folder.glob("[0-9]*"))
        except OSError as error:
            raise self._unusable(error) from None
        self._objects: deque[Path] = deque(left)
        self._number = 1 + max((int(path.name.partition("-")[0]) for path in left), default=0)
        self._set: tuple[Path, Callable[[Path], None]] | None = None
        self._changed = threading.Condition()
        self._delivering_object = threading.Lock()
        self._delivering: Path | None = None
        self._busy = self._closing = False
        self._failure: Exception | None = None
        self._silent_since: float | None = None
        self._thread = threading.Thread(target=self._deliver, name="outbox", daemon=True)
        self._thread.start()

    def put(self, name: str, data: bytes) -> None:
        """Store ``data`` as the object ``name``, sooner or later.

        Raises:
            EsvitError: an earlier one could not be stored, or there is no room on this machine's disk.
        """
        self.check()
        with self._changed:
            number, self._number = self._number, self._number + 1
        path = self._objects_folder / f"{number:09d}-{quote(name, safe='')}"
        try:
            half = path.with_name(f".{path.name}")
            half.write_bytes(data)
            half.replace(path)
        except OSError as error:
            raise self._unusable(error) from None
        with self._changed:
            self._objects.append(path)
            self._changed.notify_all()

    def hurry(self) -> None:
        """Store the objects that wait from this thread: the outbox's own may be busy with a set. One attempt each.

        Raises:
            EsvitError: one could not be stored; it waits on.
        """
        while self._deliver_object():
            pass

    def begin_set(self, name: str) -> Path:
        """An empty folder for the files of a set."""
        folder = self._sets_folder / f".{name}"
        try:
            folder.mkdir(mode=0o700)
        except OSError as error:
            raise self._unusable(error) from None
        return folder

    def send_set(self, name: str, manifest: dict[str, Any], deliver: Callable[[Path], None]) -> None:
        """Send the set whose files are complete in the folder of :meth:`begin_set`.

        Args:
            name: given there.
            manifest: what is known of the files; lies beside them as long as they wait.
            deliver: stores the files of the folder that it is given; may be called again after it has failed.
        """
        half, folder = self._sets_folder / f".{name}", self._sets_folder / name
        with self._changed:
            self._changed.wait_for(lambda: self._delivering != folder)  # an earlier one of this name is read
        try:
            (half / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            half.replace(folder)
        except OSError as error:
            raise self._unusable(error) from None
        self.resend_set(name, deliver)

    def resend_set(self, name: str, deliver: Callable[[Path], None]) -> None:
        """Send a set that an earlier process has left complete."""
        with self._changed:
            dropped, self._set = self._set, (self._sets_folder / name, deliver)
            if dropped is not None and dropped[0] not in (self._set[0], self._delivering):
                shutil.rmtree(dropped[0], ignore_errors=True)
            self._changed.notify_all()

    def waiting_sets(self) -> dict[str, Path]:
        """The complete sets on this machine's disk, by name."""
        return {path.name: path for path in self._sets_folder.iterdir() if (path / MANIFEST).is_file()}

    def drop_set(self, name: str) -> None:
        """Forget a set that waits."""
        with self._changed:
            if self._set is not None and self._set[0].name == name:
                self._set = None
            shutil.rmtree(self._sets_folder / name, ignore_errors=True)

    def check(self) -> None:
        """
        Raises:
            EsvitError: something could not be stored; it stays on this machine's disk.
        """
        if self._failure is not None:
            raise self._failure

    def wait(self, seconds: float | None = None) -> bool:
        """Until all has arrived, but not longer than ``seconds``; whether it has.

        Raises:
            EsvitError: something could not be stored.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._failure or not self._work(), seconds)
            self.check()
            return not self._work()

    def close(self, seconds: float | None = None) -> bool:
        """As :meth:`wait`, and the end of the thread; the folder goes if it is empty."""
        try:
            return self.wait(seconds)
        finally:
            with self._changed:
                self._closing = True
                self._changed.notify_all()
            with contextlib.suppress(OSError):
                for folder in (self._objects_folder, self._sets_folder, self.folder):
                    folder.rmdir()

    def _unusable(self, error: OSError) -> StoreError:
        """What is to be said of a failure of this machine's disk.

        Raises:
            PathError: the folder of the embedded store was deleted, and this one with it.
        """
        if self.store.address.directory is not None:
            require_folder(self.store.address.directory)
        what = "the disk is full" if is_full(error) else error.strerror or str(error)
        return family_of(error)(
            f"{self.folder}: what is to be stored cannot wait there ({what}); free some space, or set "
            f"{PENDING_VARIABLE} to a directory on another disk"
        )

    def _work(self) -> bool:
        return bool(self._objects) or self._set is not None or self._busy

    def _deliver(self) -> None:
        wait = FIRST_WAIT
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._objects or self._set)
                if self._closing:
                    return
                self._busy = True
            try:
                self._deliver_one()
            except StoreUnavailable as error:
                if not self._be_patient(error):
                    return
                with self._changed:
                    self._changed.wait(wait)
                wait = min(2 * wait, LONGEST_WAIT)
            except Exception as error:
                self._fail(error)
                return
            else:
                wait = FIRST_WAIT
                self._answers()

    def _deliver_one(self) -> None:
        """The oldest object, or else the set; it stays in its place until it has arrived."""
        if self._deliver_object():
            with self._changed:
                self._busy = False
                self._changed.notify_all()
            return
        with self._changed:
            waiting = self._set
            self._delivering = None if waiting is None else waiting[0]
        try:
            if waiting is not None:
                waiting[1](waiting[0])
                with self._changed:
                    self._set = None if self._set == waiting else self._set
        finally:
            with self._changed:
                self._delivering, self._busy = None, False
                if waiting is not None and (self._set is None or self._set[0] != waiting[0]):
                    shutil.rmtree(waiting[0], ignore_errors=True)
                self._changed.notify_all()

    def _deliver_object(self) -> bool:
        """Store the oldest object; False if none waits."""
        with self._delivering_object:
            if not self._objects:
                return False
            path = self._objects[0]
            name = unquote(path.name.partition("-")[2])
            self.hasty.put_bytes(join_uri(self.uri, name), path.read_bytes())
            path.unlink()
            with self._changed:
                self._objects.popleft()
                self._changed.notify_all()
        return True

    def _be_patient(self, error: StoreUnavailable) -> bool:
        if self._silent_since is None:
            self._silent_since = time.monotonic()
            self._say(f"{error}; what is to be stored waits in {self.folder}")
        silent = time.monotonic() - self._silent_since
        if silent < self._grace:
            with self._changed:
                self._busy = False
                return not self._closing
        self._fail(
            StoreUnavailable(
                f"{error}; it has not for {silent / 60:.1f} minutes, more than it is given; what is to be stored "
                f"stays in {self.folder}, where the same command on this machine finds it"
            )
        )
        return False

    def _answers(self) -> None:
        if self._silent_since is not None:
            silent = time.monotonic() - self._silent_since
            self._silent_since = None
            self._say(f"the object store answers again after {silent:.0f} s; nothing was lost")

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._failure, self._busy = error, False
            self._changed.notify_all()


def pending_folder(store: ObjectStore, uri: str) -> Path:
    """Where what is on its way to ``uri`` lies on this machine.

    Below ``ESVIT_PENDING_DIR`` if that is set; beside the data of the embedded store where that is in use; else below
    a folder of this user's in the system's temporary one.

    Raises:
        UserError: that folder cannot be made, or is not this user's alone.
    """
    if given := os.environ.get(PENDING_VARIABLE):
        root = Path(given)
    elif store.address.directory is not None:
        root = store.address.directory / "pending"
    else:
        root = private_folder("pending", PENDING_VARIABLE)
    where = uri if store.address.directory is not None else f"{store.address.endpoint} {uri}"  # its port may change
    whose = hashlib.sha256(where.encode()).hexdigest()[:16]
    return root / f"{uri.rstrip('/').rpartition('/')[2]}-{whose}"
