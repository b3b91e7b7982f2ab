"""Prepare one part: read its files, check them, and store the images as shards with an index and a listing."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from esvit_core.data.ingest.archives import FileReadError
from esvit_core.data.ingest.decode import BadImage, StoredImage
from esvit_core.data.ingest.file_kinds import suffix
from esvit_core.data.ingest.ingest_plan import Candidate
from esvit_core.data.ingest.listing import File, FileStatus, content_digest, decode_listing, encode_listing
from esvit_core.data.ingest.part_records import FileResult, ShardRecord, StaleProgressError
from esvit_core.data.ingest.parts import PlannedPart
from esvit_core.data.ingest.prefetch import prefetch, reading_threads
from esvit_core.data.ingest.preparation import Preparation
from esvit_core.data.ingest.read_image import NotAnImage, read_image_file
from esvit_core.data.shards.format import Sample, ShardWriter, encode_array, read_object
from esvit_core.data.shards.manifest import Part, Shard
from esvit_core.storage import IntegrityError
from esvit_core.storage.store_errors import NotFound

REQUESTS = 32  # files that are read at the same time: a store answers slowly, whatever the number of cores
_READ_AHEAD = 2  # images in memory per thread
_Loaded = tuple[str, StoredImage | BadImage | FileReadError | NotAnImage]


def prepare_part(job: Preparation, part: PlannedPart) -> Future[Part]:
    """Return the future of a part, the end of which is still being uploaded.

    What an unfinished preparation of the same content did is not done again.

    Raises:
        UserError: too many files are bad.
    """
    candidates, counted = job.plan.candidates[part.start : part.stop], len(job.bad)
    try:
        if (finished := _finished(job, part, candidates)) is not None:
            job.progress.update(len(candidates))
            return job.uploads.submit(lambda: finished)
        return _PartPreparation(job, part, job.records.read_shards(part)).run(candidates)
    except StaleProgressError:
        print("prepare: the source differs from the records of an unfinished preparation; starting over", flush=True)
        job.uploads.finish()  # their files have the names of those that follow
        del job.bad[counted:]
        return _PartPreparation(job, part, {}).run(candidates)


def _finished(job: Preparation, part: PlannedPart, candidates: Sequence[Candidate]) -> Part | None:
    """Return the part as an unfinished preparation recorded it; None if it has to be prepared.

    Raises:
        StaleProgressError: a file was edited since.
    """
    found = job.records.read_part(part, candidates)
    if found is None or any(job.existing.get(name) != file.bytes for name, file in found.objects().items()):
        return None
    try:
        files = list(decode_listing(read_object(job.store, job.destination, found.listing.name, found.listing)))
    except (NotFound, IntegrityError):
        return None
    current = [_with_stamp(job, file, candidate) for file, candidate in zip(files, candidates, strict=True)]
    if current != files:
        listing = job.put(f"files/{part.name}.jsonl.gz", encode_listing(current))
        found = found.model_copy(update={"listing": listing})
        job.written.add(job.records.save_part(part, candidates, found))
    for file in current:
        if file.status in ("bad", "unreadable"):
            job.add_bad(file.name, file.reason)
    return found


def _with_stamp(job: Preparation, file: File, candidate: Candidate) -> File:
    """Return a recorded file with its current stamp.

    Raises:
        StaleProgressError: its content has changed.
    """
    entry = candidate.entry
    if file.digest and not file.is_same(entry):  # only its date may have changed
        try:
            same = entry.size == file.size and content_digest(job.opened.read(entry)) == file.digest
        except FileReadError:
            same = False
        if not same:
            raise StaleProgressError
    return file if file.stamp == entry.stamp else replace(file, stamp=entry.stamp)


class _PartPreparation:
    """Prepares a part.

    Args:
        job: the preparation.
        part: the part.
        known: results of an unfinished preparation, by file name.
    """

    def __init__(self, job: Preparation, part: PlannedPart, known: dict[str, FileResult]) -> None:
        self._job, self._part, self._known = job, part, known
        size = int(job.config.shard_mib * 2**20)
        self._writer = ShardWriter(part.name, job.folder, size, self._store_shard, f"{part.number:05d}")
        self._files: list[File] = []
        # Files whose record is not stored yet: images in the current shard, and others.
        self._samples: list[FileResult] = []
        self._others: list[File] = []
        self._first: dict[str, str] = {}  # name of the first image with a digest

    def run(self, candidates: Sequence[Candidate]) -> Future[Part]:
        """Read, check and write every candidate, in order; return the future of the stored part.

        Raises:
            StaleProgressError: the recorded results do not match the candidates.
            UserError: too many files are bad.
        """
        job = self._job
        ahead = _READ_AHEAD * max(REQUESTS, reading_threads())
        for candidate, future in prefetch(job.readers, self._known_or_loaded, candidates, ahead):
            found = future.result()
            if isinstance(found, FileResult):
                self._replay(candidate, found)
            else:
                self._add(candidate, *found)
            job.progress.update(1)
        self._writer.close()
        return job.uploads.submit(partial(self._store_part, candidates))  # after its shards

    def _store_part(self, candidates: Sequence[Candidate]) -> Part:
        job = self._job
        index = job.put(f"index/{self._part.name}.npy", encode_array(self._writer.index()))
        listing = job.put(f"files/{self._part.name}.jsonl.gz", encode_listing(self._files))
        finished = Part(shards=self._writer.shards, index=index, listing=listing)
        job.written.add(job.records.save_part(self._part, candidates, finished))
        return finished

    def _known_or_loaded(self, candidate: Candidate) -> FileResult | _Loaded:
        """Return the recorded result of a file, or read it. Runs in several threads."""
        known = self._known.get(candidate.entry.name)
        if known is None:
            return load(self._job, candidate)
        return replace(known, file=_with_stamp(self._job, known.file, candidate))

    def _replay(self, candidate: Candidate, known: FileResult) -> None:
        """Apply the recorded result of a file.

        Raises:
            StaleProgressError: this preparation would produce a different result.
        """
        file = known.file
        if file.split is not None:
            if (file.split, known.number, known.row[0]) != (self._part.split, len(self._writer), candidate.label):
                raise StaleProgressError
            try:
                self._writer.restore(known.row, known.completed_shard)
            except ValueError:
                raise StaleProgressError from None
            self._first.setdefault(file.digest, file.name)
        elif file.status in ("bad", "unreadable"):
            self._job.add_bad(file.name, file.reason)
        self._files.append(file)

    def _add(
        self, candidate: Candidate, digest: str, image: StoredImage | BadImage | FileReadError | NotAnImage
    ) -> None:
        """Write an image, or note why a file is none."""
        if isinstance(image, StoredImage):
            first = self._first.setdefault(digest, candidate.entry.name)
            if first != candidate.entry.name and self._job.config.drop_duplicates != "none":
                self._leave_out(candidate, "duplicate", digest, f"duplicate of {first}")
            else:
                self._write(candidate, digest, image)
        elif isinstance(image, NotAnImage):
            self._leave_out(candidate, "ignored", digest)
        else:
            status: FileStatus = "bad" if isinstance(image, BadImage) else "unreadable"
            self._leave_out(candidate, status, digest, str(image))
            self._job.add_bad(candidate.entry.name, str(image))

    def _write(self, candidate: Candidate, digest: str, image: StoredImage) -> None:
        entry = candidate.entry
        number = self._writer.add(Sample(image.data, image.suffix, candidate.label, entry.name))
        facts = {} if image.facts is None else asdict(image.facts)
        stored = content_digest(image.data) if image.reencoded else ""
        odd = " ".join(image.odd)
        file = File(entry.name, entry.size, entry.stamp, self._part.split, digest, stored, odd=odd, **facts)
        self._files.append(file)
        self._samples.append(FileResult(file, number, self._writer.last_row))

    def _leave_out(self, candidate: Candidate, status: FileStatus, digest: str, reason: str = "") -> None:
        entry = candidate.entry
        file = File(entry.name, entry.size, entry.stamp, status, digest, reason=reason)
        self._files.append(file)
        self._others.append(file)

    def _store_shard(self, shard: Shard, path: Path) -> None:
        """Store a finished shard, and the record from which another preparation can resume after it, soon."""
        record = ShardRecord(self._part.name, shard, self._samples, self._others)
        self._samples, self._others = [], []
        self._job.uploads.submit(partial(_upload, self._job, record, path))


def _upload(job: Preparation, record: ShardRecord, path: Path) -> None:
    if job.existing.get(record.shard.name) != record.shard.bytes:  # otherwise an identical shard is already stored
        job.store.put_file(job.uri(record.shard.name), path)
        job.written.add(record.shard.name)
    path.unlink()
    job.written.add(job.records.save_shard(record))


def load(job: Preparation, candidate: Candidate) -> _Loaded:
    """Return the digest of a file, and its image or the reason why it has none. Runs in several threads."""
    try:
        data = read_image_file(job.opened, candidate.entry)
    except (FileReadError, NotAnImage, BadImage) as error:
        return "", error
    try:
        return content_digest(data), job.decoders.decode(data, suffix(candidate.entry.name))
    except BadImage as error:
        return content_digest(data), error
