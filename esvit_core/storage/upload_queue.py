"""Upload queue: objects wait on this machine's disk until the store has them, and are uploaded in order.

Callers continue immediately. While the store does not answer, one thread retries with increasing waits. The next process
on this machine finds what a killed process left in the queue.
"""

from __future__ import annotations

import contextlib
import copy
import errno
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

from esvit_core.private_folders import private_folder
from esvit_core.storage.connection import Connection
from esvit_core.storage.disk import deleted_folder, disk_error_class, is_full, require_folder
from esvit_core.storage.publication import MANIFEST
from esvit_core.storage.retry import RetryPolicy
from esvit_core.storage.store import ObjectStore
from esvit_core.storage.store_errors import StoreError, StoreUnavailable
from esvit_core.storage.uri import join_uri

PENDING_VARIABLE = "ESVIT_PENDING_DIR"
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds
QUICK_RETRY = RetryPolicy(attempts=3)


class UploadQueue:
    """Uploads objects, and one set of files at a time, to a prefix of the store in the background.

    Objects are uploaded in order. Only the newest set is pending: a set that has not been uploaded when the next one is
    complete is dropped. A set is uploaded after the objects that were queued before it.

    Args:
        store: destination store.
        uri: prefix of the object names; only one process at a time may have an upload queue for it.
        grace_seconds: how long the store may be unavailable before that is an error.
        directory: where pending files are stored; None: see :func:`pending_folder`.
        log: called with a one-line message when the store stops answering and when it answers again.

    Attributes:
        store: destination store.
        quick_store: the same store with few retries, for uploads: the queue itself repeats them.

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
        log: Callable[[str], None] = print,
    ) -> None:
        self.store, self.uri = store, uri
        self.quick_store = copy.copy(store)
        self.quick_store.connection = Connection(store.address, QUICK_RETRY)
        self.folder = directory or pending_folder(store, uri)
        self._grace, self._log = grace_seconds, log
        self._objects_folder, self._sets_folder = self.folder / "objects", self.folder / "sets"
        try:
            self._objects_folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._sets_folder.mkdir(exist_ok=True, mode=0o700)
            for partial in self._sets_folder.glob(".*"):  # left by a killed process
                shutil.rmtree(partial)
            left = sorted(self._objects_folder.glob("[0-9]*"))
        except OSError as error:
            raise self._unusable(error) from None
        self._objects: deque[Path] = deque(left)
        self._number = 1 + max((int(path.name.partition("-")[0]) for path in left), default=0)
        self._set: tuple[Path, Callable[[Path], None]] | None = None
        self._changed = threading.Condition()
        self._object_lock = threading.Lock()
        self._uploading: Path | None = None
        self._busy = self._closing = False
        self._failure: Exception | None = None
        self._outage_start: float | None = None
        self._thread = threading.Thread(target=self._run, name="upload-queue", daemon=True)
        self._thread.start()

    def put(self, name: str, data: bytes) -> None:
        """Queue ``data`` for upload as the object ``name``.

        Raises:
            EsvitError: an earlier upload failed, or this machine's disk is full.
        """
        self.check()
        with self._changed:
            number, self._number = self._number, self._number + 1
        path = self._objects_folder / f"{number:09d}-{quote(name, safe='')}"
        try:
            partial = path.with_name(f".{path.name}")
            partial.write_bytes(data)
            partial.replace(path)
        except OSError as error:
            raise self._unusable(error) from None
        with self._changed:
            self._objects.append(path)
            self._changed.notify_all()

    def flush_objects(self) -> None:
        """Upload the pending objects from the calling thread, one attempt each: the queue's thread may be busy with a set.

        Raises:
            EsvitError: an upload failed; its object stays in the queue.
        """
        while self._upload_object():
            pass

    def begin_set(self, name: str) -> Path:
        """Create and return an empty folder for the files of a set."""
        folder = self._sets_folder / f".{name}"
        try:
            folder.mkdir(mode=0o700)
        except OSError as error:
            raise self._unusable(error) from None
        return folder

    def enqueue_set(self, name: str, manifest: dict[str, Any], deliver: Callable[[Path], None]) -> None:
        """Queue the set whose files are complete in the folder of :meth:`begin_set`.

        Args:
            name: the name passed to :meth:`begin_set`.
            manifest: description of the files; stored beside them while the set is pending.
            deliver: uploads the files of the folder it is given; may be called again after a failure.
        """
        partial, folder = self._sets_folder / f".{name}", self._sets_folder / name
        with self._changed:
            self._changed.wait_for(lambda: self._uploading != folder)  # an earlier set of this name is being read
        try:
            (partial / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            partial.replace(folder)
        except OSError as error:
            raise self._unusable(error) from None
        self.requeue_set(name, deliver)

    def requeue_set(self, name: str, deliver: Callable[[Path], None]) -> None:
        """Queue a complete set that an earlier process left on disk."""
        with self._changed:
            dropped, self._set = self._set, (self._sets_folder / name, deliver)
            if dropped is not None and dropped[0] not in (self._set[0], self._uploading):
                shutil.rmtree(dropped[0], ignore_errors=True)
            self._changed.notify_all()

    def pending_sets(self) -> dict[str, Path]:
        """Return the folders of the complete sets on this machine's disk, by name."""
        return {path.name: path for path in self._sets_folder.iterdir() if (path / MANIFEST).is_file()}

    def drop_set(self, name: str) -> None:
        """Remove a pending set."""
        with self._changed:
            if self._set is not None and self._set[0].name == name:
                self._set = None
            shutil.rmtree(self._sets_folder / name, ignore_errors=True)

    def check(self) -> None:
        """Raise the error of a failed upload, if there is one.

        Raises:
            EsvitError: an upload failed; its files stay on this machine's disk.
        """
        if self._failure is not None:
            raise self._failure

    def wait(self, seconds: float | None = None) -> bool:
        """Wait at most ``seconds`` until the queue is empty; return whether it is.

        Raises:
            EsvitError: an upload failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._failure or not self._has_work(), seconds)
            self.check()
            return not self._has_work()

    def close(self, seconds: float | None = None) -> bool:
        """Wait as :meth:`wait` does, then stop the thread and remove the folder if it is empty."""
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
        """Return the error for a failed disk operation in the queue's folder.

        Raises:
            PathError: the folder of the embedded store, which contains this one, was deleted, or is just being deleted.
        """
        directory = self.store.address.directory
        if directory is not None:
            if error.errno == errno.ENOENT and self.folder.is_relative_to(directory):
                raise deleted_folder(directory)  # its files go one after the other, and not all are gone yet
            require_folder(directory)
        what = "the disk is full" if is_full(error) else error.strerror or str(error)
        return disk_error_class(error)(
            f"{self.folder}: cannot hold files that wait for upload ({what}); free some space, or set "
            f"{PENDING_VARIABLE} to a directory on another disk"
        )

    def _has_work(self) -> bool:
        return bool(self._objects) or self._set is not None or self._busy

    def _run(self) -> None:
        wait = FIRST_WAIT
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._objects or self._set)
                if self._closing:
                    return
                self._busy = True
            try:
                self._upload_next()
            except StoreUnavailable as error:
                if not self._tolerate_outage(error):
                    return
                with self._changed:
                    self._changed.wait(wait)
                wait = min(2 * wait, LONGEST_WAIT)
            except Exception as error:
                self._fail(error)
                return
            else:
                wait = FIRST_WAIT
                self._end_outage()

    def _upload_next(self) -> None:
        """Upload the oldest object, or else the set; it stays queued until it has been uploaded."""
        if self._upload_object():
            with self._changed:
                self._busy = False
                self._changed.notify_all()
            return
        with self._changed:
            pending = self._set
            self._uploading = None if pending is None else pending[0]
        try:
            if pending is not None:
                pending[1](pending[0])
                with self._changed:
                    self._set = None if self._set == pending else self._set
        finally:
            with self._changed:
                self._uploading, self._busy = None, False
                if pending is not None and (self._set is None or self._set[0] != pending[0]):
                    shutil.rmtree(pending[0], ignore_errors=True)
                self._changed.notify_all()

    def _upload_object(self) -> bool:
        """Upload the oldest object; return False if none is pending."""
        with self._object_lock:
            if not self._objects:
                return False
            path = self._objects[0]
            name = unquote(path.name.partition("-")[2])
            self.quick_store.put_bytes(join_uri(self.uri, name), path.read_bytes())
            path.unlink()
            with self._changed:
                self._objects.popleft()
                self._changed.notify_all()
        return True

    def _tolerate_outage(self, error: StoreUnavailable) -> bool:
        """Return whether to retry; after the grace period, record the failure."""
        if self._outage_start is None:
            self._outage_start = time.monotonic()
            self._log(f"{error}; uploads wait in {self.folder}")
        outage = time.monotonic() - self._outage_start
        if outage < self._grace:
            with self._changed:
                self._busy = False
                return not self._closing
        self._fail(
            StoreUnavailable(
                f"{error}; unavailable for {outage / 60:.1f} minutes, longer than the grace period of "
                f"{self._grace / 60:.1f} minutes; pending uploads stay in {self.folder}; rerun the same command on this "
                "machine to upload them"
            )
        )
        return False

    def _end_outage(self) -> None:
        if self._outage_start is not None:
            outage = time.monotonic() - self._outage_start
            self._outage_start = None
            self._log(f"the object store answers again after {outage:.0f} s; nothing was lost")

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._failure, self._busy = error, False
            self._changed.notify_all()


def pending_folder(store: ObjectStore, uri: str) -> Path:
    """Return the folder on this machine for pending uploads to ``uri``.

    It is below ``ESVIT_PENDING_DIR`` if that is set, beside the data of the embedded store where that is in use, and
    otherwise below a folder of this user in the system's temporary directory.

    Raises:
        UserError: the folder cannot be created, or other users have access to it.
    """
    if given := os.environ.get(PENDING_VARIABLE):
        root = Path(given)
    elif store.address.directory is not None:
        root = store.address.directory / "pending"
    else:
        root = private_folder("pending", PENDING_VARIABLE)
    # The port of the embedded store may change.
    target = uri if store.address.directory is not None else f"{store.address.endpoint} {uri}"
    digest = hashlib.sha256(target.encode()).hexdigest()[:16]
    return root / f"{uri.rstrip('/').rpartition('/')[2]}-{digest}"
