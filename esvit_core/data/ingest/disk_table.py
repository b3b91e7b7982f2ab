"""Dictionaries in a temporary database, so that memory does not grow with their length."""

from __future__ import annotations

import contextlib
import errno
import itertools
import marshal
import sqlite3
import threading
from collections.abc import Iterable, Iterator

from esvit_core.data.ingest.disk_rows import Row
from esvit_core.storage.disk import explain_full_temporary_disk

_AT_ONCE = 1024  # rows that are read or written together
_CACHE_KIB = 1024


class DiskTable:
    """Tuples of numbers and texts by name; they can be read from several threads.

    The database has no name, so that nothing remains of it. It lies in the folder of ``TMPDIR``.

    Args:
        items: names and tuples, of what :mod:`marshal` can write.

    Raises:
        StoreFull: the disk is full.
    """

    def __init__(self, items: Iterable[tuple[str, Row]] = ()) -> None:
        self._lock = threading.Lock()
        self._rows = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        for setting in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{_CACHE_KIB}"):
            self._rows.execute(f"PRAGMA {setting}")
        self._rows.execute("CREATE TABLE rows (name BLOB PRIMARY KEY, content BLOB) WITHOUT ROWID")
        self.update(items)

    def update(self, items: Iterable[tuple[str, Row]]) -> None:
        """Add tuples; one with a name that is there replaces it."""
        waiting = iter(items)
        while some := [(_key(name), marshal.dumps(row)) for name, row in itertools.islice(waiting, _AT_ONCE)]:
            with self._lock, _explain_full_disk():
                self._rows.execute("BEGIN")
                self._rows.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?)", some)
                self._rows.execute("COMMIT")

    def __len__(self) -> int:
        with self._lock:
            return int(self._rows.execute("SELECT count(*) FROM rows").fetchone()[0])

    def get(self, name: str) -> Row | None:
        """Return the tuple with this name; None if there is none."""
        with self._lock:
            found = self._rows.execute("SELECT content FROM rows WHERE name = ?", (_key(name),)).fetchone()
        row: Row | None = None if found is None else marshal.loads(found[0])
        return row

    def __getitem__(self, name: str) -> Row:
        if (found := self.get(name)) is None:
            raise KeyError(name)
        return found

    def __contains__(self, name: str) -> bool:
        return self.get(name) is not None

    def items(self) -> Iterator[tuple[str, Row]]:
        """Yield names and tuples in the order of the names; the table may be changed meanwhile."""
        last, query = b"", "SELECT name, content FROM rows WHERE name > ? ORDER BY name LIMIT ?"
        while True:
            with self._lock:
                some = self._rows.execute(query, (last, _AT_ONCE)).fetchall()
            if not some:
                return
            yield from ((name.decode("utf-8", "surrogatepass"), marshal.loads(content)) for name, content in some)
            last = some[-1][0]


def _key(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass")  # in the order of the texts


@contextlib.contextmanager
def _explain_full_disk() -> Iterator[None]:
    with explain_full_temporary_disk("a list of files"):
        try:
            yield
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
                raise
            raise OSError(errno.ENOSPC, str(error)) from None
