"""Incremental preparation: reuse the images of earlier data by reference to their shards, without reading them again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from esvit_core.data.ingest.layout import SplitName
from esvit_core.data.ingest.listing import File, decode_listing
from esvit_core.data.shards.format import read_index
from esvit_core.data.shards.manifest import Manifest, Shard
from esvit_core.errors import UserError
from esvit_core.storage import IntegrityError, ObjectStore, join_uri


@dataclass(frozen=True)
class Base:
    """Earlier prepared data that a new preparation builds on.

    Attributes:
        prefix: folder of the manifest.
        manifest: the manifest of the data.
        files: all files of their source, by name.
        rows: index of every split, see :data:`esvit_core.data.shards.format.INDEX_DTYPE`.
    """

    prefix: str
    manifest: Manifest
    files: dict[str, File]
    rows: dict[SplitName, np.ndarray]

    @classmethod
    def read(cls, store: ObjectStore, prefix: str) -> Self:
        """Read the prepared data at ``prefix``.

        Raises:
            NotFound: there are no prepared data at ``prefix``.
            UserError: the data have no listing, because an older version prepared them, or are damaged.
        """
        manifest = Manifest.read(store, prefix)
        files = read_listing(store, prefix, manifest)
        rows = {split: read_index(store, prefix, entry.index, manifest) for split, entry in manifest.splits.items()}
        for split, index in rows.items():
            if sum(file.status == split for file in files) != len(index):
                raise IntegrityError(
                    f"{prefix}: the listing of {split} does not match the index; prepare the data again"
                )
        return cls(prefix, manifest, {file.name: file for file in files}, rows)

    def with_current_stamps(self, now: Iterable[File]) -> Base:
        """Return the data with the current stamps of the files whose content is unchanged.

        Args:
            now: files of the source, from :func:`esvit_core.data.ingest.listing.hash_touched_files`.
        """
        files = dict(self.files)
        for file in now:
            before = files.get(file.name)
            if before is not None and before.stamp != file.stamp and before.is_same(file):
                files[file.name] = replace(before, stamp=file.stamp)
        return replace(self, files=files)

    def reused(self, split: SplitName, labels: Mapping[str, int]) -> ReusedImages:
        """Return the images of a split to reuse.

        Args:
            split: one of the manifest's splits.
            labels: current class of each image to reuse, by name.
        """
        stored = [file for file in self.files.values() if file.status == split]
        keep = np.array([file.name in labels for file in stored], dtype=bool)
        rows = self.rows[split][keep].copy()
        files = [file for file, kept in zip(stored, keep, strict=True) if kept]
        rows["label"] = [labels[file.name] for file in files]
        used, rows["shard"], counts = np.unique(rows["shard"], return_inverse=True, return_counts=True)
        shards = [self.manifest.splits[split].shards[number] for number in used]
        return ReusedImages(
            [
                shard.model_copy(update={"name": shard.address(self.prefix), "samples": int(count)})
                for shard, count in zip(shards, counts, strict=True)
            ],
            rows,
            files,
        )


@dataclass(frozen=True)
class ReusedImages:
    """Reused images of a split.

    Attributes:
        shards: shards that contain them, with full addresses; ``samples`` counts the reused images only.
        rows: their rows of the index.
        files: in the order of the rows.
    """

    shards: list[Shard]
    rows: np.ndarray
    files: list[File]


def read_listing(store: ObjectStore, prefix: str, manifest: Manifest) -> list[File]:
    """Read the listing of prepared data; the files of a split are in the order of its index.

    Raises:
        UserError: the data have no listing, because an older version prepared them.
    """
    if manifest.listing is None:
        raise UserError(
            f"{prefix}: has no listing (prepared by an older version); prepare the data again in another run"
        )
    uri = join_uri(prefix, manifest.listing)
    data = store.get_bytes(uri)
    if hashlib.sha256(data).hexdigest() != manifest.files[manifest.listing].sha256:
        raise IntegrityError(f"{uri}: damaged, its SHA-256 differs from the manifest's; prepare the data again")
    return list(decode_listing(data))
