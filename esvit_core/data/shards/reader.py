"""Read samples from shards, through a cache on this machine."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from esvit_core.data.shards.cache import ShardCache, default_cache
from esvit_core.data.shards.format import read_object
from esvit_core.data.shards.index_pages import IndexPages
from esvit_core.data.shards.manifest import Manifest, Shard, Split
from esvit_core.errors import UserError
from esvit_core.storage import IntegrityError, ObjectStore


class ShardDataset:
    """The images of one split, by number.

    A shard is downloaded when one of its samples is first requested, verified against the manifest's SHA-256, and kept in a
    cache that all processes on the machine share. A dataset may be used from several threads, forked, and pickled.

    Args:
        store: store of the data.
        prefix: folder of the data's manifest.
        split: ``train``, ``val`` or ``test``.
        cache: local folder for shards; None: see :func:`default_cache`.

    Raises:
        NotFound: there are no prepared data at ``prefix``.
        UserError: there is no such split.
    """

    def __init__(self, store: ObjectStore, prefix: str, split: str, cache: Path | None = None) -> None:
        manifest = Manifest.read(store, prefix)
        splits: dict[str, Split] = dict(manifest.splits.items())
        if split not in splits:
            raise UserError(f"{prefix}: no split {split!r}; the data has {', '.join(splits) or 'none'}")
        self.prefix, self.split = prefix, split
        self.classes = manifest.classes
        #: Digest of the images, their classes and their order.
        self.content = splits[split].content
        #: Number of samples in each shard.
        self.shard_sizes = splits[split].shard_samples
        #: How images of more than 8 bits and with many bands were read, for ``backbone.json``; empty: none of this was set.
        self.pixels: dict[str, Any] = {k: v for k, v in manifest.settings.items() if k in ("intensity", "bands")}
        if manifest.intensity:
            self.pixels["scales"] = manifest.intensity
        self._store, self._cache = store, cache or default_cache(store)
        self._files = ShardCache(self._store, self._cache)
        self._pages = IndexPages(store, prefix, splits[split].parts)
        #: Weight of each image in training, (N,) float32; None: all have the weight 1.
        self.weights: np.ndarray | None = None
        if (weights := splits[split].weights) is not None:
            data = read_object(store, prefix, weights.file, manifest.files[weights.file])
            self.weights = np.load(io.BytesIO(data), allow_pickle=False)

    def __len__(self) -> int:
        return len(self._pages)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """Class of each image, (N,) int64; -1 for none. Reads the whole index."""
        return self._pages.labels()

    def shard(self, number: int) -> tuple[str, Shard]:
        """Return the address and the description of a shard."""
        return self._pages.shard(number)

    def fetch_shard(self, number: int) -> None:
        """Download a shard to the cache if it is not there."""
        address, shard = self.shard(number)
        ShardCache(self._store, self._cache).fetch(address, shard)

    def encoded(self, index: int) -> bytes:
        """Return the stored JPEG or PNG."""
        return self._read(index, "offset", "bytes")

    def image(self, index: int) -> np.ndarray:
        """Return the decoded image, (H, W, 3) uint8."""
        data = self.encoded(index)
        try:
            return decode_image(data)
        except (OSError, ValueError) as error:
            raise IntegrityError(
                f"{self.prefix}: image {index} of {self.split} ({self.name(index)}) cannot be decoded ({error}); "
                "prepare the data again"
            ) from None

    def label(self, index: int) -> int:
        """Return the class of an image; -1 if it has none."""
        return int(self._pages.row(index)[1]["label"])

    def name(self, index: int) -> str:
        """Return the path of an image in its source."""
        return str(json.loads(self._read(index, "info_offset", "info_bytes"))["name"])

    def _read(self, index: int, offset: str, length: str) -> bytes:
        page, row = self._pages.row(index)
        address, shard = page.shards[row["shard"]]
        return self._files.read(address, shard, int(row[offset]), int(row[length]))


def decode_image(data: bytes) -> np.ndarray:
    """Decode a stored image, (H, W, 3) uint8.

    Raises:
        OSError, ValueError: the bytes are not an image.
    """
    if data[:2] == b"\xff\xd8":
        return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=False, fastupsample=False)
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        return np.array(image.convert("RGB"))
