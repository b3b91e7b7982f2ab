"""A training that nobody follows ends: the step that follows a job marks its presence, and the job's pods watch the mark.

A stopped step has about a second to delete its job, which a busy node may not grant. Without this, the job would train on
and hold its GPUs until its end.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

from esvit_core.errors import EsvitError
from esvit_core.storage import NotFound, ObjectStore, join_uri

#: In a pod of a job: seconds after which a training that nobody follows ends.
UNFOLLOWED_VARIABLE = "ESVIT_UNFOLLOWED_SECONDS"
MARK = "training/follower.json"
MARK_SECONDS = 60.0


@contextlib.contextmanager
def marked_presence(store: ObjectStore, run_uri: str, every: float = MARK_SECONDS) -> Iterator[None]:
    """Mark in the run, from time to time, that somebody follows its job."""
    end = threading.Event()

    def mark() -> None:
        while True:
            with contextlib.suppress(EsvitError):  # the next one may succeed
                store.put_json(join_uri(run_uri, MARK), {"time": datetime.now(UTC).isoformat()})
            if end.wait(every):
                return

    thread = threading.Thread(target=mark, name="presence", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join(every)


class PresenceWatch:
    """Watches the mark, and reports once that it has not changed for a while.

    Time in which the store does not answer does not count, and without a mark nothing is reported.

    Args:
        store, run_uri: the run.
        seconds: time without a change.
        report: called in the watching thread.
        every: seconds between two looks.
    """

    def __init__(
        self, store: ObjectStore, run_uri: str, seconds: float, report: Callable[[], None], every: float = MARK_SECONDS
    ) -> None:
        self._store, self._uri = store, join_uri(run_uri, MARK)
        self._seconds, self._report, self._every = seconds, report, every
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="presence", daemon=True)

    def start(self) -> PresenceWatch:
        """Begin to watch."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Report nothing from now on."""
        self._end.set()

    def _watch(self) -> None:
        seen, since = None, time.monotonic()
        while not self._end.wait(self._every):
            try:
                mark = self._store.get_bytes(self._uri)
            except NotFound:
                mark = None
            except EsvitError:
                since = time.monotonic()
                continue
            if mark is None or mark != seen:
                seen, since = mark, time.monotonic()
            elif time.monotonic() - since > self._seconds and not self._end.is_set():
                self._report()
                return


def unfollowed_seconds() -> float | None:
    """Return after how many seconds a training that nobody follows ends; None: it does not end."""
    text = os.environ.get(UNFOLLOWED_VARIABLE)
    return float(text) if text else None
