"""Images that were prepared before: taken over by reference, shard and place in it, not read again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from esvit_core.data.ingest.layout import SplitName
from esvit_core.data.ingest.listing import File, decode
from esvit_core.data.shards.format import read_index
from esvit_core.data.shards.manifest import Manifest, Shard
from esvit_core.errors import UserError
from esvit_core.storage import IntegrityError, ObjectStore, join_uri


@dataclass(frozen=True)
class Base:
    """Prepared data that others build on.

    Attributes:
        prefix: folder of its manifest.
        manifest: of it.
        files: all of its source, by name.
        rows: index of every split, see :data:`esvit_core.data.shards.format.INDEX_DTYPE`.
    """

    prefix: str
    manifest: Manifest
    files: dict[str, File]
    rows: dict[SplitName, np.ndarray]

    @classmethod
    def read(cls, store: ObjectStore, prefix: str) -> Self:
        """The prepared data at ``prefix``.

        Raises:
            NotFound: no data were prepared there.
            UserError: they were prepared by a version that kept no listing, or are damaged.
        """
        manifest = Manifest.read(store, prefix)
        files = read_listing(store, prefix, manifest)
        rows = {split: read_index(store, prefix, entry.index, manifest) for split, entry in manifest.splits.items()}
        for split, index in rows.items():
            if sum(file.fate == split for file in files) != len(index):
                raise IntegrityError(f"{prefix}: the listing of {split} is not the index's; prepare the data again")
        return cls(prefix, manifest, {file.name: file for file in files}, rows)

    def at_present(self, now: Iterable[File]) -> Base:
        """The same with the stamps that its files have now, where their content is what it was.

        Args:
            now: the files of the source, as :func:`esvit_core.data.ingest.listing.recognise` gives them.
        """
        files = dict(self.files)
        for file in now:
            before = files.get(file.name)
            if before is not None and before.stamp != file.stamp and before.is_same(file):
                files[file.name] = replace(before, stamp=file.stamp)
        return replace(self, files=files)

    def carried(self, split: SplitName, labels: Mapping[str, int]) -> Carried:
        """What of a split is taken over.

        Args:
            split: one of the manifest's.
            labels: the class, as it is now, of each image that is taken over, by name.
        """
        stored = [file for file in self.files.values() if file.fate == split]
        keep = np.array([file.name in labels for file in stored], dtype=bool)
        rows = self.rows[split][keep].copy()
        files = [file for file, kept in zip(stored, keep, strict=True) if kept]
        rows["label"] = [labels[file.name] for file in files]
        used, rows["shard"], counts = np.unique(rows["shard"], return_inverse=True, return_counts=True)
        shards = [self.manifest.splits[split].shards[number] for number in used]
        return Carried(
            [
                shard.model_copy(update={"name": shard.address(self.prefix), "samples": int(count)})
                for shard, count in zip(shards, counts, strict=True)
            ],
            rows,
            files,
        )


@dataclass(frozen=True)
class Carried:
    """Images of a split that are taken over.

    Attributes:
        shards: that hold them, under their full addresses; ``samples`` counts those taken over.
        rows: of the index.
        files: in the order of the rows.
    """

    shards: list[Shard]
    rows: np.ndarray
    files: list[File]


def read_listing(store: ObjectStore, prefix: str, manifest: Manifest) -> list[File]:
    """The files of the source of prepared data, those of a split in the order of its index.

    Raises:
        UserError: the data were prepared by a version that kept none.
    """
    if manifest.listing is None:
        raise UserError(f"{prefix}: prepared before listings were kept; prepare the data again, in another run")
    uri = join_uri(prefix, manifest.listing)
    data = store.get_bytes(uri)
    if hashlib.sha256(data).hexdigest() != manifest.files[manifest.listing].sha256:
        raise IntegrityError(f"{uri}: damaged, its SHA-256 is not the manifest's; prepare the data again")
    return list(decode(data))
