"""The log of a run: JSON lines in pieces below ``training/log/``, written once each.

A piece is named ``<first step:08d>-<attempt>.jsonl``: an attempt is one start of the training processes. Where a
later attempt went back to a checkpoint, its lines replace those of the earlier ones from its first step on.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from typing import Any

from esvit_core.storage import ObjectStore, join_uri
from esvit_core.storage.upload_queue import UploadQueue

LOG_PREFIX = "training/log"
MIN_PIECE_SECONDS = 10.0
# Pieces grow with the age of the attempt: a run of days has hundreds of them rather than tens of thousands.
PIECE_SHARE_OF_AGE = 0.01


class LogWriter:
    """Collects the lines of one attempt and uploads them from time to time, beside the training.

    Args:
        uploads: the run's upload queue.
    """

    def __init__(self, uploads: UploadQueue) -> None:
        self._uploads = uploads
        self.attempt = 1 + max((attempt for _, attempt, _ in _pieces(uploads.store, uploads.uri)), default=0)
        self._lock = threading.Lock()
        self._lines: list[str] = []
        self._first_step = 0
        self._start = self._last_flush = time.monotonic()

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line; it must have a ``step``. Figures that are None are left out."""
        text = json.dumps({k: _rounded(v) for k, v in line.items() if v is not None})
        with self._lock:
            if not self._lines:
                self._first_step = int(line["step"])
            self._lines.append(text)
        now = time.monotonic()
        if now - self._last_flush >= max(MIN_PIECE_SECONDS, PIECE_SHARE_OF_AGE * (now - self._start)):
            self.flush()

    def begin_attempt(self) -> None:
        """The run has gone back to an earlier step: what comes replaces the lines from there on."""
        self.flush()
        self.attempt += 1

    def flush(self) -> None:
        """Send off what is collected. May be called from another thread.

        Raises:
            EsvitError: an earlier piece could not be written.
        """
        with self._lock:
            if not self._lines:
                return
            name = f"{self._first_step:08d}-{self.attempt}.jsonl"
            data = ("\n".join(self._lines) + "\n").encode()
            self._lines, self._last_flush = [], time.monotonic()
            self._uploads.put(f"{LOG_PREFIX}/{name}", data)


def read_log(store: ObjectStore, run_uri: str, known: dict[str, bytes] | None = None) -> list[dict[str, Any]]:
    """The lines of a run in the order of their steps, one a step, the newest attempt's where several wrote one.

    Args:
        store: where the run is.
        run_uri: ``s3://bucket/runs/<id>``.
        known: pieces read before, by address; new ones are added. For who reads the log again and again.

    Returns:
        Lines with ``step``, ``epoch``, ``loss``, ``loss_view``, ``loss_region``, ``lr``, ... (the keys that the run
        has measured); empty when nothing has been logged.
    """
    attempts: dict[int, dict[int, dict[str, Any]]] = {}
    known = {} if known is None else known
    for _, attempt, uri in sorted(_pieces(store, run_uri)):
        if uri not in known:
            known[uri] = store.get_bytes(uri)
        for text in known[uri].decode().splitlines():
            line = json.loads(text)
            attempts.setdefault(attempt, {})[int(line["step"])] = line
    merged: dict[int, dict[str, Any]] = {}
    for _, lines in sorted(attempts.items()):
        first = min(lines)
        merged = {step: line for step, line in merged.items() if step < first} | lines
    return [merged[step] for step in sorted(merged)]


def read_last_line(store: ObjectStore, run_uri: str) -> dict[str, Any] | None:
    """The last line that the newest attempt has written, None when nothing has been logged: two requests."""
    pieces = _pieces(store, run_uri)
    if not pieces:
        return None
    _, _, uri = max(pieces, key=lambda piece: (piece[1], piece[0]))
    last: dict[str, Any] = json.loads(store.get_bytes(uri).decode().splitlines()[-1])
    return last


def _pieces(store: ObjectStore, run_uri: str) -> list[tuple[int, int, str]]:
    pieces = []
    for stat in store.list(join_uri(run_uri, LOG_PREFIX)):
        first, _, attempt = stat.uri.rsplit("/", 1)[-1].removesuffix(".jsonl").partition("-")
        if first.isdigit() and attempt.isdigit():
            pieces.append((int(first), int(attempt), stat.uri))
    return pieces


def _rounded(value: Any) -> Any:
    # Six significant digits: the log is for people and plots, the checkpoint is exact. Times keep their seconds.
    if not isinstance(value, float):
        return value
    return round(value, 1) if abs(value) >= 1e6 else float(f"{value:.6g}")
