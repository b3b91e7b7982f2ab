"""Incremental preparation: reuse the images of earlier data by reference to their shards, without reading them again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Self

from esvit_core.data.ingest.listing import File, decode_listing
from esvit_core.data.shards.format import read_object, read_part
from esvit_core.data.shards.manifest import Manifest
from esvit_core.storage import ObjectStore


@dataclass(frozen=True)
class Base:
    """Earlier prepared data that a new preparation builds on.

    Attributes:
        prefix: folder of the manifest.
        manifest: the manifest of the data.
        files: all files of their source, by name.
    """

    prefix: str
    manifest: Manifest
    files: Mapping[str, File]

    @classmethod
    def read(cls, store: ObjectStore, prefix: str) -> Self:
        """Read the prepared data at ``prefix``.

        Raises:
            NotFound: there are no prepared data at ``prefix``.
            IntegrityError: the data are damaged.
        """
        manifest = Manifest.read(store, prefix)
        return cls(prefix, manifest, {file.name: file for file in read_listing(store, prefix, manifest)})

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


def read_listing(store: ObjectStore, prefix: str, manifest: Manifest) -> list[File]:
    """Read which files the prepared data at ``prefix`` were made from; those of a split are in the order of its images.

    Raises:
        IntegrityError: a part of the data is damaged.
    """
    files: dict[str, File] = {}
    for file in _listed(store, prefix, manifest):
        # The listing of a reused part may name a file that was bad then and is an image now.
        if file.split or file.name not in files or not files[file.name].split:
            files.pop(file.name, None)
            files[file.name] = file
    return list(files.values())


def _listed(store: ObjectStore, prefix: str, manifest: Manifest) -> Iterator[File]:
    for reference in manifest.parts:
        listing = read_part(store, prefix, reference).listing
        yield from decode_listing(read_object(store, reference.folder(prefix), listing.name, listing))
    yield from decode_listing(read_object(store, prefix, manifest.listing, manifest.files[manifest.listing]))
