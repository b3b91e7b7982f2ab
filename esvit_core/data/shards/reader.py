"""Read samples from shards, through a cache on this machine."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from esvit_core.data.shards.cache import ShardCache, default_cache
from esvit_core.data.shards.format import read_array, read_index
from esvit_core.data.shards.manifest import Manifest, Split
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
        self.shards = splits[split].shards
        index = read_index(store, prefix, splits[split].index, manifest)
        if len(index) != splits[split].samples:
            raise IntegrityError(f"{prefix}: the index of {split} does not match the manifest; prepare the data again")
        self.labels: np.ndarray = index["label"].astype(np.int64)
        #: How images of more than 8 bits and with many bands were read, for ``backbone.json``; empty: none of this was set.
        self.pixels: dict[str, Any] = {k: v for k, v in manifest.settings.items() if k in ("intensity", "bands")}
        if manifest.intensity:
            self.pixels["scales"] = manifest.intensity
        self._index = index
        #: Weight of each image in training, (N,) float32; None: all have the weight 1.
        self.weights: np.ndarray | None = None
        if (weights := splits[split].weights) is not None:
            self.weights = read_array(store, prefix, weights.file, manifest)
        self._store, self._cache = store, cache or default_cache(store)
        self._files = ShardCache(self._store, self._cache)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def shard_sizes(self) -> list[int]:
        """Number of samples in each shard."""
        return [shard.samples for shard in self.shards]

    def fetch_shard(self, number: int) -> None:
        """Download a shard to the cache if it is not there."""
        entry = self.shards[number]
        ShardCache(self._store, self._cache).fetch(entry.address(self.prefix), entry)

    def encoded(self, index: int) -> bytes:
        """Return the stored JPEG or PNG."""
        row = self._row(index)
        return self._read(row["shard"], row["offset"], row["bytes"])

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
        return int(self.labels[index])

    def name(self, index: int) -> str:
        """Return the path of an image in its source."""
        row = self._row(index)
        return str(json.loads(self._read(row["shard"], row["info_offset"], row["info_bytes"]))["name"])

    def _row(self, index: int) -> Any:
        if not 0 <= index < len(self._index):
            raise IndexError(f"image {index} of {len(self._index)}")
        return self._index[index]

    def _read(self, shard: int, offset: int, length: int) -> bytes:
        entry = self.shards[shard]
        return self._files.read(entry.address(self.prefix), entry, int(offset), int(length))


def decode_image(data: bytes) -> np.ndarray:
    """Decode a stored image, (H, W, 3) uint8.

    Raises:
        OSError, ValueError: the bytes are not an image.
    """
    if data[:2] == b"\xff\xd8":
        return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=False, fastupsample=False)
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        return np.array(image.convert("RGB"))
