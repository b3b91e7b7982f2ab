"""Upload finished shards while the next one is filled."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

_WAITING = 2  # shards on disk beside the one that is filled


class ShardUploads:
    """Uploads, one after the other in the order of their submission, so that the records of shards have no gaps."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True, cancel_futures=error is not None)

    def submit(self, upload: Callable[[], None]) -> None:
        """Upload something soon; if two uploads wait already, wait for the first of them.

        Raises:
            StoreError: an earlier upload failed.
        """
        while len(self._waiting) >= _WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(upload))

    def finish(self) -> None:
        """Wait for all uploads.

        Raises:
            StoreError: one of them failed.
        """
        while self._waiting:
            self._waiting.popleft().result()
