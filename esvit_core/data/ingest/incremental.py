"""Incremental preparation: reuse the images of earlier data by reference to their shards, without reading them again."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Self

from esvit_core.data.ingest.disk_rows import sort_rows
from esvit_core.data.ingest.listing import File, FileTable, decode_listing, values_of
from esvit_core.data.shards.format import read_object, read_part
from esvit_core.data.shards.manifest import Manifest
from esvit_core.storage import ObjectStore


@dataclass(frozen=True)
class Base:
    """Earlier prepared data that a new preparation builds on.

    Attributes:
        prefix: folder of the manifest.
        manifest: the manifest of the data.
        files: all files of their source.
    """

    prefix: str
    manifest: Manifest
    files: FileTable

    @classmethod
    def read(cls, store: ObjectStore, prefix: str) -> Self:
        """Read the prepared data at ``prefix``.

        Raises:
            NotFound: there are no prepared data at ``prefix``.
            IntegrityError: the data are damaged.
        """
        manifest = Manifest.read(store, prefix)
        return cls(prefix, manifest, read_listing(store, prefix, manifest))

    def use_current_stamps(self, now: Iterable[File]) -> None:
        """Give the files whose content is unchanged their current stamps.

        Args:
            now: files of the source, with digests where only those show that they are unchanged.
        """
        self.files.update(self._restamped(now))

    def _restamped(self, now: Iterable[File]) -> Iterator[File]:
        for file in now:
            before = self.files.get(file.name)
            if before is not None and before.stamp != file.stamp and before.is_same(file):
                yield replace(before, stamp=file.stamp)


def read_listing(store: ObjectStore, prefix: str, manifest: Manifest) -> FileTable:
    """Read which files the prepared data at ``prefix`` were made from.

    Raises:
        IntegrityError: a part of the data is damaged.
    """
    return FileTable(_latest(_listed(store, prefix, manifest)))


def _latest(listed: Iterable[File]) -> Iterator[File]:
    """Yield the last of the files of the same name, but rather one that is stored."""
    rows = sort_rows((file.name, number, values_of(file)) for number, file in enumerate(listed))
    for _, group in itertools.groupby(rows, key=lambda row: row[0]):
        files = [File(*values) for *_, values in group]
        # The listing of a reused part may name a file that was bad then and is an image now.
        yield ([file for file in files if file.split] or files)[-1]


def _listed(store: ObjectStore, prefix: str, manifest: Manifest) -> Iterator[File]:
    for reference in manifest.parts:
        listing = read_part(store, prefix, reference).listing
        yield from decode_listing(read_object(store, reference.folder(prefix), listing.name, listing))
    yield from decode_listing(read_object(store, prefix, manifest.listing, manifest.files[manifest.listing]))
