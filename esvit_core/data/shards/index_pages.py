"""The index of a split in pages, one for each part: only those that are in use are in memory."""

from __future__ import annotations

import itertools
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from esvit_core.data.shards.format import read_index, read_part
from esvit_core.data.shards.manifest import PartReference, Shard
from esvit_core.storage import IntegrityError, ObjectStore, join_uri

_IN_MEMORY = 32  # pages; training mixes the images of 8 shards at a time, and the next 8 are fetched


@dataclass(frozen=True)
class Page:
    """The index of a part.

    Attributes:
        shards: address and description of each shard.
        rows: (N,) of :data:`esvit_core.data.shards.format.INDEX_DTYPE`.
    """

    shards: list[tuple[str, Shard]]
    rows: np.ndarray


class IndexPages:
    """The index of a split. May be used from several threads, forked, and pickled.

    Args:
        store: store of the data.
        prefix: folder of the manifest.
        parts: the parts of the split.
    """

    def __init__(self, store: ObjectStore, prefix: str, parts: Sequence[PartReference]) -> None:
        self._store, self._prefix, self._parts = store, prefix, list(parts)
        self._first = list(itertools.accumulate((part.samples for part in parts), initial=0))
        self._first_shard = list(itertools.accumulate((len(part.shard_samples) for part in parts), initial=0))
        # The most recently used last. Without a lock, which a fork could leave locked in the child.
        self._pages: dict[int, Page] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"store": self._store, "prefix": self._prefix, "parts": self._parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __len__(self) -> int:
        return self._first[-1]

    def row(self, index: int) -> tuple[Page, Any]:
        """Return the page and the row of an image.

        Raises:
            IntegrityError: a part is damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        number = bisect(self._first, index) - 1
        page = self._page(number)
        return page, page.rows[index - self._first[number]]

    def shard(self, number: int) -> tuple[str, Shard]:
        """Return the address and the description of a shard of the split."""
        part = bisect(self._first_shard, number) - 1
        return self._page(part).shards[number - self._first_shard[part]]

    def labels(self) -> np.ndarray:
        """Return the class of each image, (N,) int64."""
        labels = [self._read(number).rows["label"].astype(np.int64) for number in range(len(self._parts))]
        return np.concatenate(labels) if labels else np.zeros(0, np.int64)

    def _page(self, number: int) -> Page:
        page = self._pages.pop(number, None) or self._read(number)
        self._pages[number] = page
        for oldest in list(self._pages)[:-_IN_MEMORY]:
            self._pages.pop(oldest, None)
        return page

    def _read(self, number: int) -> Page:
        reference = self._parts[number]
        part, folder = read_part(self._store, self._prefix, reference), reference.folder(self._prefix)
        rows = read_index(self._store, folder, part.index)
        if np.bincount(rows["shard"], minlength=len(part.shards)).tolist() != reference.shard_samples:
            uri = join_uri(folder, part.index.name)
            raise IntegrityError(f"{uri}: does not match the manifest; prepare the data again")
        return Page([(shard.address(folder), shard) for shard in part.shards], rows)
