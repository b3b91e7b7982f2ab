"""Upload finished shards and parts while the next ones are prepared."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

Result = TypeVar("Result")

_WAITING = 3  # uploads; so many shards are on disk at most, beside the one that is filled


class ShardUploads:
    """Uploads that begin in the order of their submission; none after one that failed.

    By default, one ends before the next begins, so what is stored about shards and parts never has gaps.

    Args:
        parallel: uploads at a time.
    """

    def __init__(self, parallel: int = 1) -> None:
        self._threads = ThreadPoolExecutor(parallel, thread_name_prefix="upload")
        self._limit = _WAITING * parallel
        self._waiting: deque[Future[Any]] = deque()
        self._failure: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=True, cancel_futures=error is not None)

    def submit(self, upload: Callable[[], Result]) -> Future[Result]:
        """Upload something soon; if three uploads per thread wait already, wait for the first of them.

        Returns:
            The future of what ``upload`` returns.

        Raises:
            StoreError: an earlier upload failed.
        """
        while len(self._waiting) >= self._limit:
            self._waiting.popleft().result()
        future = self._threads.submit(self._run, upload)
        self._waiting.append(future)
        return future

    def finish(self) -> None:
        """Wait for all uploads.

        Raises:
            StoreError: one of them failed.
        """
        while self._waiting:
            self._waiting.popleft().result()

    def _run(self, upload: Callable[[], Result]) -> Result:
        if self._failure is not None:
            raise self._failure
        try:
            return upload()
        except BaseException as error:
            self._failure = error
            raise
