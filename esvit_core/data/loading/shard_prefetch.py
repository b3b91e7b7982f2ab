"""Download the shards of the next steps while the current ones are used, so that training does not wait for the store."""

from __future__ import annotations

import bisect
import logging
import threading
import time
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

logger = logging.getLogger(__name__)

AHEAD = 8  # shards beyond those in use: the next window of esvit_core.data.loading.sampler
_THREADS = 2  # shards that are fetched at a time: while one is checked and written, another one travels
_PAUSE_SECONDS = 5.0  # after a failed download


@runtime_checkable
class StoredImages(Protocol):
    """Images in shards that are downloaded when they are first needed."""

    @property
    def shard_sizes(self) -> list[int]: ...
    def fetch_shard(self, number: int) -> None: ...


def first_uses(batches: Sequence[np.ndarray], shard_sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Return when each shard is first needed, as pairs of a position in ``batches`` and the shard, in order of need.

    Args:
        batches: numbers of the samples of each step; the steps have equally many.
        shard_sizes: number of samples in each shard.
    """
    if not len(batches):
        return []
    starts = np.cumsum(shard_sizes)
    shards, first = np.unique(
        np.searchsorted(starts, np.concatenate(batches) % starts[-1], side="right"), return_index=True
    )
    order = np.argsort(first)
    return list(zip((first[order] // len(batches[0])).tolist(), shards[order].tolist(), strict=True))


class ShardPrefetcher:
    """Fetches shards in threads, at most :data:`AHEAD` beyond those that are in use.

    A shard that cannot be fetched is left to whoever reads it, which raises the error or waits for the store.

    Args:
        images: where the shards are fetched.
    """

    def __init__(self, images: StoredImages) -> None:
        self._images = images
        self._positions: list[int] = []
        self._shards: list[int] = []
        self._position, self._next = 0, 0
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []

    def plan(self, uses: list[tuple[int, int]]) -> None:
        """Replace the plan by another one, see :func:`first_uses`; the first call starts the threads."""
        with self._changed:
            self._positions, self._shards = [position for position, _ in uses], [shard for _, shard in uses]
            self._position, self._next = 0, 0
            self._changed.notify_all()
        while len(self._threads) < _THREADS:
            self._threads.append(threading.Thread(target=self._run, name="shard-prefetch", daemon=True))
            self._threads[-1].start()

    def reach(self, position: int) -> None:
        """Say that the batch at a position of the plan is in use."""
        with self._changed:
            self._position = position
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._is_due)
                shard = self._shards[self._next]
                self._next += 1
            try:
                self._images.fetch_shard(shard)
            except Exception as error:  # whoever reads the shard meets the same error
                logger.debug("shard %d was not fetched ahead: %s", shard, error)
                time.sleep(_PAUSE_SECONDS)

    def _is_due(self) -> bool:
        return self._next < min(len(self._shards), bisect.bisect(self._positions, self._position) + AHEAD)
