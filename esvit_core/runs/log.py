"""The training log of a run: JSON lines in chunks below ``training/log/``, each written once.

A chunk is named ``<first step:08d>-<attempt>.jsonl``; an attempt is one start of the training processes. If a later
attempt resumed from a checkpoint, its lines replace those of earlier attempts from its first step on.
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
MIN_CHUNK_SECONDS = 10.0
# Chunks grow with the age of the attempt, so that a run of days has hundreds of them, not tens of thousands.
CHUNK_SHARE_OF_AGE = 0.01


class LogWriter:
    """Collects the lines of one attempt and uploads them from time to time in the background.

    Args:
        uploads: the run's upload queue.
    """

    def __init__(self, uploads: UploadQueue) -> None:
        self._uploads = uploads
        self.attempt = 1 + max((attempt for _, attempt, _ in _chunks(uploads.store, uploads.uri)), default=0)
        self._lock = threading.Lock()
        self._lines: list[str] = []
        self._first_step = 0
        self._start = self._last_flush = time.monotonic()

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line, which needs a ``step``. Values that are None are left out."""
        text = json.dumps({k: _rounded(v) for k, v in line.items() if v is not None})
        with self._lock:
            if not self._lines:
                self._first_step = int(line["step"])
            self._lines.append(text)
        now = time.monotonic()
        if now - self._last_flush >= max(MIN_CHUNK_SECONDS, CHUNK_SHARE_OF_AGE * (now - self._start)):
            self.flush()

    def begin_attempt(self) -> None:
        """Begin a new attempt after a rollback: its lines replace earlier lines from its first step on."""
        self.flush()
        self.attempt += 1

    def flush(self) -> None:
        """Upload the collected lines. May be called from another thread.

        Raises:
            EsvitError: an earlier chunk could not be written.
        """
        with self._lock:
            if not self._lines:
                return
            name = f"{self._first_step:08d}-{self.attempt}.jsonl"
            data = ("\n".join(self._lines) + "\n").encode()
            self._lines, self._last_flush = [], time.monotonic()
            self._uploads.put(f"{LOG_PREFIX}/{name}", data)


def read_log(store: ObjectStore, run_uri: str, known: dict[str, bytes] | None = None) -> list[dict[str, Any]]:
    """Read the lines of a run by step; if several attempts logged a step, the newest attempt's line.

    Args:
        store: object store of the run.
        run_uri: ``s3://bucket/runs/<id>``.
        known: cache of chunks by address; new chunks are added. Pass it when the log is read repeatedly.

    Returns:
        Lines with ``step``, ``epoch``, ``loss``, ``loss_view``, ``loss_region``, ``lr``, ... (the values that the run
        has measured); empty if nothing has been logged.
    """
    attempts: dict[int, dict[int, dict[str, Any]]] = {}
    known = {} if known is None else known
    for _, attempt, uri in sorted(_chunks(store, run_uri)):
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
    """Read the last line of the newest attempt, with two requests; None if nothing has been logged."""
    chunks = _chunks(store, run_uri)
    if not chunks:
        return None
    _, _, uri = max(chunks, key=lambda chunk: (chunk[1], chunk[0]))
    last: dict[str, Any] = json.loads(store.get_bytes(uri).decode().splitlines()[-1])
    return last


def _chunks(store: ObjectStore, run_uri: str) -> list[tuple[int, int, str]]:
    chunks = []
    for stat in store.list(join_uri(run_uri, LOG_PREFIX)):
        first, _, attempt = stat.uri.rsplit("/", 1)[-1].removesuffix(".jsonl").partition("-")
        if first.isdigit() and attempt.isdigit():
            chunks.append((int(first), int(attempt), stat.uri))
    return chunks


def _rounded(value: Any) -> Any:
    # Six significant digits suffice for people and plots; the checkpoint is exact. Times keep tenths of a second.
    if not isinstance(value, float):
        return value
    return round(value, 1) if abs(value) >= 1e6 else float(f"{value:.6g}")
