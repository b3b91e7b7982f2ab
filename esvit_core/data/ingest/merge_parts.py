"""Merge prepared parts and those of earlier data: leave out duplicates across parts, collect statistics, build the manifest."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from esvit_core.data.ingest.decode import describe_bad_files, reason_category
from esvit_core.data.ingest.file_kinds import ignored_kind
from esvit_core.data.ingest.layout import SplitName
from esvit_core.data.ingest.listing import LISTING, File, decode_listing, encode_listing, listing_file
from esvit_core.data.ingest.near_duplicates import find_superfluous
from esvit_core.data.ingest.parts import PlannedPart
from esvit_core.data.ingest.prefetch import prefetch
from esvit_core.data.ingest.preparation import Preparation, check_bad_share
from esvit_core.data.ingest.shard_uploads import ShardUploads
from esvit_core.data.ingest.source_lists import part_of_name
from esvit_core.data.ingest.source_reading import no_images
from esvit_core.data.ingest.source_summary import OddImages
from esvit_core.data.ingest.statistics import ImageStatistics, describe_statistics
from esvit_core.data.loading.sampler import weighted_length
from esvit_core.data.shards.format import encode_array, read_index, read_object, read_part
from esvit_core.data.shards.manifest import (
    PARTS,
    BadFiles,
    Manifest,
    NamedFile,
    Part,
    PartReference,
    Split,
    StoredFile,
    Weights,
)
from esvit_core.errors import UserError
from esvit_core.storage import IntegrityError, join_uri
from esvit_core.storage.json_text import encode_json
from esvit_core.storage.parallel_transfer import PARALLEL

_AHEAD = PARALLEL  # parts whose listings are read ahead
_SPLITS: tuple[SplitName, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class _Piece:
    """A part to merge.

    Attributes:
        split: its split.
        name: begins the names of its objects if they have to be written anew.
        part: its shards, index and listing.
        folder: folder of the data that they belong to.
        reference: if it is one of earlier data.
    """

    split: SplitName
    name: str
    part: Part
    folder: str
    reference: PartReference | None = None

    def read(self, job: Preparation) -> tuple[bytes, np.ndarray]:
        """Return its listing and its index; may run in several threads.

        Raises:
            IntegrityError: one of them is damaged.
        """
        return self.read_listing(job), read_index(job.store, self.folder, self.part.index)

    def read_listing(self, job: Preparation) -> bytes:
        listing = self.part.listing
        return read_object(job.store, self.folder, listing.name, listing)

    def files(self, job: Preparation, listing: bytes) -> tuple[list[File], list[File]]:
        """Return the files as the listing has them, and as they are now: images are not reused if they are gone."""
        before = list(decode_listing(listing))
        if self.reference is None or job.base is None:
            return before, list(before)
        known, reused = job.base.files, job.plan.labels
        return before, [
            file if not file.split else known[file.name] if file.name in reused else replace(file, status="skipped")
            for file in before
        ]


@dataclass
class _Totals:
    """What is counted while the parts are merged."""

    references: dict[SplitName, list[PartReference]] = field(default_factory=dict)
    per_class: dict[SplitName, np.ndarray] = field(default_factory=dict)
    unlabelled: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    found_ignored: int = 0
    dropped: int = 0
    reencoded: int = 0
    weights: array[float] = field(default_factory=lambda: array("f"))
    unplaced: list[File] = field(default_factory=list)
    objects: dict[str, StoredFile] = field(default_factory=dict)
    odd: OddImages = field(default_factory=OddImages)


def merge_parts(job: Preparation, parts: Sequence[tuple[PlannedPart, Part]]) -> Merged:
    """Build the manifest of prepared parts, and store what it refers to.

    Args:
        job: the preparation.
        parts: all parts that its plan was divided into.

    Raises:
        UserError: there are no images to train on, or too many bad files.
    """
    with ShardUploads(PARALLEL) as puts, ThreadPoolExecutor(PARALLEL, thread_name_prefix="merge") as pool:
        pieces = [*_earlier(job, pool), *_new(job, parts)]
        digests, looks, splits = _collect(job, pieces, pool)
        duplicate_of = find_superfluous(digests, looks, splits, job.config.drop_duplicates, job.plan.splits_assigned)
        kept = duplicate_of < 0
        statistics = ImageStatistics(digests[kept], looks[kept], splits[kept] != _SPLITS.index("train"))
        totals = _Totals(bad=list(job.plan.bad), ignored=Counter(job.plan.ignored))
        merger = _Merger(job, puts, totals, statistics, duplicate_of)
        for piece, content in prefetch(pool, partial(_Piece.read, job=job), pieces, _AHEAD):
            merger.add(piece, *content.result())
        _require_images(job, totals)
        merged = merger.manifest()
        puts.finish()
    return merged


@dataclass(frozen=True)
class Merged:
    """Prepared data that can be published.

    Attributes:
        manifest: their manifest.
        objects: all objects below its folder that it needs, by name.
    """

    manifest: Manifest
    objects: dict[str, StoredFile]


def _earlier(job: Preparation, pool: ThreadPoolExecutor) -> Iterator[_Piece]:
    """Yield the parts of the earlier data."""
    if job.base is None:
        return
    store, prefix, splits = job.store, job.base.prefix, job.base.manifest.splits
    named = [(split, *each) for split in _SPLITS if split in splits for each in enumerate(splits[split].parts)]
    parts = pool.map(lambda each: read_part(store, prefix, each[2]), named)
    for (split, number, reference), part in zip(named, parts, strict=True):
        folder = reference.folder(prefix)
        yield _Piece(split, f"{split}-{number:05d}", part, folder, reference.located_in(prefix))


def _new(job: Preparation, parts: Sequence[tuple[PlannedPart, Part]]) -> Iterator[_Piece]:
    for split in _SPLITS:  # training images first: a copy of one is not held out
        for planned, part in parts:
            if planned.split == split:
                yield _Piece(split, planned.name, part, job.destination)


def _collect(
    job: Preparation, pieces: Sequence[_Piece], pool: ThreadPoolExecutor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what duplicates are found from, for each stored image in the order of the pieces."""
    digests, looks, splits = array("Q"), array("Q"), array("B")
    for piece, listing in prefetch(pool, partial(_Piece.read_listing, job=job), pieces, _AHEAD):
        for file in piece.files(job, listing.result())[1]:
            if file.split:
                digests.append(int(file.digest[:16], 16))
                looks.append(int(file.look, 16) if file.look else 0)
                splits.append(_SPLITS.index(file.split))
    return np.asarray(digests), np.asarray(looks), np.asarray(splits)


class _Merger:
    """Merges parts, one after the other.

    Args:
        job: the preparation.
        puts: uploads of small objects.
        totals: what is counted.
        statistics: of the images.
        duplicate_of: number of the image that each one is a duplicate of, (N,); -1 if it is kept.
    """

    def __init__(
        self,
        job: Preparation,
        puts: ShardUploads,
        totals: _Totals,
        statistics: ImageStatistics,
        duplicate_of: np.ndarray,
    ) -> None:
        self._job, self._puts, self._totals, self._statistics = job, puts, totals, statistics
        self._duplicate_of = duplicate_of
        self._originals = dict.fromkeys(duplicate_of[duplicate_of >= 0].tolist(), "")  # their names, for the reasons
        self._images = 0  # so far

    def add(self, piece: _Piece, listing: bytes, rows: np.ndarray) -> None:
        """Add a part to the totals, without the images that are left out.

        Args:
            listing, rows: its listing and index.
        """
        before, files = piece.files(self._job, listing)
        stored = [i for i, file in enumerate(files) if file.split]
        for number, i in enumerate(stored, self._images):
            if number in self._originals:
                self._originals[number] = files[i].name
            if self._duplicate_of[number] >= 0:
                reason = f"duplicate of {self._originals[int(self._duplicate_of[number])]}"
                files[i] = replace(files[i], status="duplicate", reason=reason)
        self._images += len(stored)
        for file in files:
            self._count(file, is_new=piece.reference is None)
        if any(file.split for file in files):
            self._refer(piece, before, files, rows)
        elif piece.reference is None:
            self._totals.unplaced += files

    def _count(self, file: File, is_new: bool) -> None:
        totals = self._totals
        if file.split:
            self._statistics.add(file)
            totals.odd.add(file)
            totals.reencoded += bool(file.stored)
            if file.split == "train" and (weights := self._job.config.weights) is not None:
                totals.weights.append(weights[part_of_name(file.name) - 1 if len(weights) > 1 else 0])
        elif file.status == "duplicate":
            totals.dropped += 1
        elif is_new and file.status == "ignored":
            totals.ignored[ignored_kind(file.name)] += 1
            totals.found_ignored += 1
        elif is_new and file.status in ("bad", "unreadable"):
            totals.bad.append((file.name, file.reason))

    def _refer(self, piece: _Piece, before: list[File], files: list[File], rows: np.ndarray) -> None:
        """Add a reference to a part; it is written anew if it is not the same as before."""
        job, totals = self._job, self._totals
        has_row = [file.split is not None for file in before]
        if sum(has_row) != len(rows):
            uri = join_uri(piece.folder, piece.part.index.name)
            raise IntegrityError(f"{uri}: does not match its listing; prepare the data again")
        rows = rows[[file.split is not None for file, has in zip(files, has_row, strict=True) if has]]
        stored = [file for file in files if file.split]
        labels = [job.plan.labels[file.name][0] for file in stored] if piece.reference else rows["label"].tolist()
        content = hashlib.sha256()
        for file, label in zip(stored, labels, strict=True):
            content.update(f"{job.class_name(label)}\0{file.stored or file.digest}\n".encode())
        if piece.reference and files == before and labels == rows["label"].tolist():
            reference = piece.reference
        else:
            rows["label"] = labels
            part = piece.part if files == before and piece.reference is None else self._rewritten(piece, files, rows)
            stored_as = job.put(f"{PARTS}/{piece.name}.json", part.model_dump_json().encode(), self._puts)
            totals.objects |= {**part.objects(), stored_as.name: stored_as}
            reference = PartReference(
                **stored_as.model_dump(),
                shard_samples=[shard.samples for shard in part.shards],
                content=content.hexdigest(),
            )
        totals.references.setdefault(piece.split, []).append(reference)
        counts = np.bincount(rows["label"][rows["label"] >= 0], minlength=len(job.plan.classes))
        totals.per_class[piece.split] = counts + totals.per_class.get(piece.split, 0)
        totals.unlabelled[piece.split] += int((rows["label"] < 0).sum())
        totals.bytes += sum(piece.part.shards[number].bytes for number in np.unique(rows["shard"]).tolist())

    def _rewritten(self, piece: _Piece, files: list[File], rows: np.ndarray) -> Part:
        """Return the part with only some of its images.

        Args:
            rows: their rows of the index; the numbers of the shards are changed to those of the new part.
        """
        used, numbers, counts = np.unique(rows["shard"], return_inverse=True, return_counts=True)
        own = piece.folder == self._job.destination
        shards = []
        for number, count in zip(used.tolist(), counts.tolist(), strict=True):
            shard = piece.part.shards[number]
            name = shard.name if own else shard.address(piece.folder)
            shards.append(shard.model_copy(update={"name": name, "samples": count}))
        index = rows.copy()
        index["shard"] = numbers
        listed = [file for file in files if own or file.status != "skipped"]
        return Part(
            shards=shards,
            index=self._job.put(f"index/{piece.name}.npy", encode_array(index), self._puts),
            listing=self._job.put(f"files/{piece.name}.jsonl.gz", encode_listing(listed), self._puts),
        )

    def manifest(self) -> Merged:
        """Store the lists that accompany the parts, and build the manifest."""
        job, totals = self._job, self._totals
        plan, stored = job.plan, dict[str, StoredFile]()

        def put(name: str, data: bytes) -> str:
            file = job.put(name, data, self._puts)
            stored[file.name] = StoredFile(bytes=file.bytes, sha256=file.sha256)
            return file.name

        splits = {}
        for name in sorted(totals.references):
            parts, per_class = totals.references[name], totals.per_class[name].tolist()
            samples, labeled = sum(part.samples for part in parts), not totals.unlabelled[name]
            splits[name] = Split(samples=samples, labeled=labeled, parts=parts, per_class=per_class)
        if job.config.weights is not None:
            weights = np.asarray(totals.weights)
            file = put("index/train-weights.npy", encode_array(weights))
            found = Weights(file=file, epoch_samples=weighted_length(weights))
            splits["train"] = splits["train"].model_copy(update={"weights": found})
        bad = sorted(totals.bad)
        lines = (json.dumps({"name": name, "reason": reason}, ensure_ascii=False) + "\n" for name, reason in bad)
        listing = self._put_others()
        stored[listing.name] = StoredFile(bytes=listing.bytes, sha256=listing.sha256)
        described = self._statistics.result(splits["train"].per_class)
        prints = "".join(f"{name} {split.content}\n" for name, split in splits.items())
        reasons = dict(Counter(reason_category(reason) for _, reason in bad).most_common())
        manifest = Manifest(
            source=job.source,
            source_fingerprint=job.fingerprint,
            fingerprint=hashlib.sha256(prints.encode()).hexdigest(),
            settings=job.config.identity_values(),
            classes=plan.classes,
            splits=splits,
            bytes=totals.bytes,
            considered=len(plan.files) - plan.not_chosen - totals.found_ignored,
            bad=BadFiles(count=len(bad), reasons=reasons, list=put("bad_files.jsonl", "".join(lines).encode())),
            reading=[*plan.messages, *totals.odd.lines(), *describe_statistics(described)],
            statistics=put("statistics.json", encode_json(described)),
            dropped=totals.dropped,
            intensity=job.scales,
            ignored=totals.ignored.total(),
            ignored_kinds=dict(sorted(totals.ignored.items())),
            duplicates=job.opened.duplicates,
            copies=self._statistics.copies,
            not_chosen=plan.not_chosen,
            reencoded=totals.reencoded,
            listing=listing.name,
            files=stored,
            base=job.base.prefix if job.base else None,
        )
        return Merged(manifest, {**totals.objects, **stored})

    def _put_others(self) -> NamedFile:
        """Store the listing of the files that belong to no part; there may be many more than in the parts."""

        def files() -> Iterator[File]:
            yield from self._totals.unplaced
            yield from self._job.plan.known
            for entry, reason in self._job.plan.skipped:
                yield File(entry.name, entry.size, entry.stamp, "skipped", reason=reason)

        with listing_file(files()) as path:
            return self._job.put_file(LISTING, path)


def _require_images(job: Preparation, totals: _Totals) -> None:
    """Raise an error unless there are images to train on, and not too many bad files.

    Raises:
        UserError: there are none, or too many.
    """
    if "train" not in totals.references:
        if not totals.bad:
            raise no_images(job.source, totals.ignored)
        raise UserError(
            f"{job.source}: none of its {len(job.plan.files):,} files is an image to train on: "
            f"{describe_bad_files(totals.bad)}; expected JPEG, PNG, WebP, GIF, BMP or TIFF files"
        )
    check_bad_share(job, totals.bad[len(job.plan.bad) :])
