"""Prepare images: read, check and store them as shards with a manifest in the object store."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from esvit_core.config import DataConfig
from esvit_core.data.ingest.archives import FileReadError
from esvit_core.data.ingest.changes import hash_touched_entries, scanned_entries, warn_of_edits
from esvit_core.data.ingest.decode import BadImage, StoredImage
from esvit_core.data.ingest.decoders import Decoders, DecodeSettings, choose_processes
from esvit_core.data.ingest.file_kinds import suffix
from esvit_core.data.ingest.image_facts import can_compare_looks
from esvit_core.data.ingest.incremental import Base
from esvit_core.data.ingest.ingest_plan import Candidate, plan_ingest
from esvit_core.data.ingest.intensity_scale import describe_scales, find_scales
from esvit_core.data.ingest.layout import SplitName
from esvit_core.data.ingest.listing import File, FileStatus, Scan, content_digest
from esvit_core.data.ingest.pixels import PixelSettings, Scale
from esvit_core.data.ingest.prefetch import prefetch, reading_threads
from esvit_core.data.ingest.preparation import Preparation, build_manifest, check_bad_share
from esvit_core.data.ingest.publish_manifest import find_data, objects_below, publish_data
from esvit_core.data.ingest.read_image import NotAnImage, read_image_file
from esvit_core.data.ingest.source_lists import require_weights
from esvit_core.data.ingest.sources import is_listed, open_source, source_fingerprint
from esvit_core.data.ingest.unfinished import (
    FileResult,
    ShardRecord,
    StaleProgressError,
    UnfinishedPreparation,
    count_shards,
)
from esvit_core.data.shards.format import Sample, ShardWriter
from esvit_core.data.shards.manifest import Manifest, Shard
from esvit_core.errors import UserError
from esvit_core.monitoring.progress_line import ProgressLine
from esvit_core.storage import ObjectStore
from esvit_core.storage.disk import explain_full_temporary_disk

_CHECK_BAD_SHARE_AFTER = 100  # bad files; with fewer, a large share could be an accident
_REQUESTS = 16  # files that are read at the same time: a store answers slowly, whatever the number of cores
_READ_AHEAD = 2  # images in memory per thread


def prepare(
    source: str,
    store: ObjectStore,
    destination: str,
    config: DataConfig,
    seed: int = 0,
    *,
    scan: Scan | None = None,
    base: str | None = None,
) -> Manifest:
    """Store the images of a source as shards, a list of the files that were left out, and finally the manifest.

    If the same source was prepared with the same settings before, the existing data are returned. The result depends only
    on the source and the settings: the names of the files decide which images are held out and in which order they are
    stored.

    Args:
        source: folder, tar, zip, or ``s3://bucket/prefix``; see :func:`esvit_core.data.ingest.layout.detect_layout` for how
            its folders are interpreted.
        store: store of the data, and of an ``s3://`` source.
        destination: ``s3://`` folder of the data.
        config: the ``data`` section of the configuration.
        seed: seed of the run. It is deliberately unused: runs that differ in their seed are trained and evaluated on the
            same images.
        scan: earlier scan of the source; files that were added or changed since are left for a later preparation. None:
            the source is scanned now.
        base: folder of earlier data of the source. Their images are reused by reference and keep their split. Images that
            were removed from the source are not reused; images that changed are read again and keep their split. Classes
            keep their numbers. None: everything is read.

    Returns:
        The manifest.

    Raises:
        UserError: the source does not exist, contains no images, or has more than ``config.max_bad_fraction`` bad files; or
            the destination holds other data.
        StoreFull: a disk is full.
    """
    require_weights(source, config)
    if config.drop_duplicates == "near" and not can_compare_looks():
        raise UserError("data.drop_duplicates=near: needs imagehash; install the extra esvit[duplicates]")
    with contextlib.ExitStack() as stack:
        # Folders and prefixes are opened immediately, archives only if they have to be read.
        opened = stack.enter_context(open_source(source, store)) if is_listed(source, store) else None
        fingerprint = source_fingerprint(source, store, opened) if scan is None else scan.fingerprint
        if (present := find_data(store, destination, fingerprint, config.identity_values())) is not None:
            if scan is None and opened is not None:
                warn_of_edits(store, destination, present, opened)
            print(f"prepare: already done, {present.describe()}", flush=True)
            return present
        opened = opened or stack.enter_context(open_source(source, store))
        entries, earlier = scanned_entries(opened, scan), None if base is None else Base.read(store, base)
        if earlier is not None:
            earlier = earlier.with_current_stamps(hash_touched_entries(earlier, entries, scan, opened))
        plan = plan_ingest(entries, source, config, earlier, opened.read)
        plan = replace(plan, messages=[*opened.notes, *plan.messages])
        print(*(f"prepare: {line}" for line in plan.messages), sep="\n", flush=True)
        job = Preparation(source, opened, plan, config, store, destination, earlier)
        job.scales = _scales(job)
        job.unfinished = UnfinishedPreparation(store, destination, fingerprint, config, base)
        try:
            _store_images(job)
        except StaleProgressError:
            print(
                "prepare: the source differs from the records of an unfinished preparation; starting over", flush=True
            )
            before = job
            job = Preparation(
                source, opened, before.plan, config, store, destination, earlier, unfinished=before.unfinished
            )
            job.scales = before.scales
            _store_images(job, fresh=True)
        manifest = publish_data(store, destination, build_manifest(job, fingerprint), job.written)
    for line in manifest.reading[len(job.plan.messages) :]:
        print(f"prepare: {line}", flush=True)
    print(f"prepare: {manifest.describe()}", flush=True)
    return manifest


def _scales(job: Preparation) -> dict[str, Scale]:
    """Return the scales of deep pixels: those of the earlier data that are built on, and others from a sample."""
    known = dict(job.base.manifest.intensity) if job.base else {}
    found = find_scales(job.opened, [candidate.entry for candidate in job.plan.candidates], job.config)
    scales = found | known
    if lines := describe_scales(scales, job.config) if scales or job.config.intensity != "auto" else []:
        print(*(f"prepare: {line}" for line in lines), sep="\n", flush=True)
        job.plan.messages.extend(lines)
    return scales


def _store_images(job: Preparation, fresh: bool = False) -> None:
    """Read, check and write every candidate, in order.

    Args:
        fresh: ignore the records of an unfinished preparation.

    Raises:
        StaleProgressError: the records do not match this preparation.
    """
    plan = job.plan
    job.bad, job.ignored = list(plan.bad), Counter(plan.ignored)
    split_of_digest: dict[str, SplitName] = {}
    settings = DecodeSettings.of(job.config, PixelSettings.of(job.config, job.scales))
    threads = max(_REQUESTS, reading_threads())
    with (
        explain_full_temporary_disk("a shard"),
        tempfile.TemporaryDirectory(prefix="esvit-") as folder,
        warnings.catch_warnings(),
        job.uploads,
        Decoders(settings, choose_processes(job.config, len(plan.candidates))) as job.decoders,
        ThreadPoolExecutor(threads, thread_name_prefix="prepare") as pool,
        ProgressLine(len(plan.candidates), unit="images", label="prepare") as progress,
    ):
        warnings.filterwarnings("ignore", module="PIL")  # about malformed files; bad files are listed
        _reuse_base(job, split_of_digest, Path(folder))
        job.existing = objects_below(job.store, job.destination)
        if not fresh:
            _resume(job)
        for candidate, future in prefetch(pool, partial(_known_or_loaded, job), plan.candidates, _READ_AHEAD * threads):
            found = future.result()
            if isinstance(found, FileResult):
                _replay(job, split_of_digest, candidate, found, Path(folder))
                progress.update(1)
                continue
            digest, image = found
            if isinstance(image, NotAnImage):
                job.ignore(candidate.entry.name)
                job.pending_bad.append(_set_status(job, candidate, "ignored", digest))
            elif isinstance(image, BadImage | FileReadError):
                job.bad.append((candidate.entry.name, str(image)))
                status: FileStatus = "bad" if isinstance(image, BadImage) else "unreadable"
                job.pending_bad.append(_set_status(job, candidate, status, digest, reason=str(image)))
                if len(job.bad) >= _CHECK_BAD_SHARE_AFTER:
                    check_bad_share(job)
            elif (kept := _duplicate_of(job, digest, image)) is not None:
                job.dropped += 1
                file = _set_status(job, candidate, "duplicate", digest, reason=f"duplicate of {kept}")
                job.pending_bad.append(file)
            else:
                split = _assign_split(job, split_of_digest, digest, candidate)
                _write(job, candidate, split, digest, image, Path(folder))
            progress.update(1)
        for writer in job.writers.values():
            writer.close()
        job.uploads.finish()


def _reuse_base(job: Preparation, split_of_digest: dict[str, SplitName], folder: Path) -> None:
    """Start with the images that are reused from earlier data."""
    for split in job.base.rows if job.base else ():
        assert job.base is not None
        reused = job.base.reused(split, job.plan.labels)
        if not reused.files:
            continue
        _new_writer(job, split, folder, reused.shards, reused.rows.tolist())
        for number, file in enumerate(reused.files):
            name = job.class_name(job.plan.labels[file.name])
            job.content[split].update(f"{number:09d}\0{name}\0{file.digest}\n".encode())
            split_of_digest.setdefault(file.digest, split)
            job.remember(file)
            job.processed[file.name] = file


def _resume(job: Preparation) -> None:
    """Load the records of an unfinished preparation."""
    assert job.unfinished is not None
    first_numbers = {split: len(writer) for split, writer in job.writers.items()}
    job.known = job.unfinished.read({str(split): number for split, number in first_numbers.items()}, job.existing)
    if number := count_shards(job.known.values()):
        print(f"prepare: resuming with {number:,} shards that an unfinished preparation stored", flush=True)


def _known_or_loaded(
    job: Preparation, candidate: Candidate
) -> FileResult | tuple[str, StoredImage | BadImage | FileReadError | NotAnImage]:
    """Return the recorded result of a file, or read it. Runs in several threads."""
    known, entry = job.known.get(candidate.entry.name), candidate.entry
    if known is None:
        return _load(job, candidate)
    if known.file.digest and not known.file.is_same(entry):  # only its date may have changed
        try:
            same = entry.size == known.file.size and content_digest(job.opened.read(entry)) == known.file.digest
        except FileReadError:
            same = False
        if not same:
            raise StaleProgressError
    return known


def _replay(
    job: Preparation, split_of_digest: dict[str, SplitName], candidate: Candidate, known: FileResult, folder: Path
) -> None:
    """Apply the result that an unfinished preparation recorded for a file.

    Raises:
        StaleProgressError: this preparation would produce a different result.
    """
    file = job.processed[known.file.name] = known.with_stamp_of(candidate.entry)
    if file.status == "ignored":
        job.ignore(file.name)
        return
    if file.status == "duplicate":
        job.dropped += 1
        return
    if file.split is None:
        job.bad.append((file.name, file.reason))
        return
    split = _assign_split(job, split_of_digest, file.digest, candidate)
    writer = job.writers.get(split) or _new_writer(job, split, folder)
    if (split, len(writer), candidate.label) != (file.split, known.number, known.row[0]):
        raise StaleProgressError
    try:
        writer.restore(known.row, known.completed_shard)
    except ValueError:
        raise StaleProgressError from None
    _update_content_digest(job, split, known.number, candidate.label, known.stored)
    job.remember(file)
    job.reencoded += known.reencoded


def _load(job: Preparation, candidate: Candidate) -> tuple[str, StoredImage | BadImage | FileReadError | NotAnImage]:
    """Return the digest of a file, and its image or the reason why it has none. Runs in several threads."""
    try:
        data = read_image_file(job.opened, candidate.entry)
    except (FileReadError, NotAnImage, BadImage) as error:
        return "", error
    try:
        return content_digest(data), job.decoders.decode(data, suffix(candidate.entry.name))
    except BadImage as error:
        return content_digest(data), error


def _assign_split(
    job: Preparation, split_of_digest: dict[str, SplitName], digest: str, candidate: Candidate
) -> SplitName:
    """Return the split of an image. A copy of a training image is not held out, because it would measure nothing."""
    split = candidate.split
    if digest in split_of_digest:
        job.copies += 1
        if job.plan.splits_assigned:
            split = split_of_digest[digest]
    split_of_digest.setdefault(digest, split)
    return split


def _write(
    job: Preparation, candidate: Candidate, split: SplitName, digest: str, image: StoredImage, folder: Path
) -> None:
    writer = job.writers.get(split) or _new_writer(job, split, folder)
    number = writer.add(Sample(image.data, image.suffix, candidate.label, candidate.entry.name))
    stored = hashlib.sha256(image.data).hexdigest()
    _update_content_digest(job, split, number, candidate.label, stored)
    job.reencoded += image.reencoded
    file = _set_status(job, candidate, split, digest, image=image)
    job.remember(file)
    job.pending[split].append(FileResult(file, number, stored, image.reencoded, writer.last_row))


def _update_content_digest(job: Preparation, split: SplitName, number: int, label: int, stored: str) -> None:
    """Add an image to the digest of its split."""
    job.content[split].update(f"{number:09d}\0{job.class_name(label)}\0{stored}\n".encode())


def _new_writer(
    job: Preparation, split: SplitName, folder: Path, shards: Iterable[Shard] = (), rows: Iterable[tuple[int, ...]] = ()
) -> ShardWriter:
    size = int(job.config.shard_mib * 2**20)
    writer = ShardWriter(split, folder, size, partial(_store_shard, job, split), list(shards), rows)
    job.writers[split], job.content[split], job.pending[split] = writer, hashlib.sha256(), []
    return writer


def _duplicate_of(job: Preparation, digest: str, image: StoredImage) -> str | None:
    """Return the name of a stored image that makes this one superfluous; None if it is to be stored."""
    if job.seen is None:
        return None
    return job.seen.find(digest, image.facts.look if image.facts else "")


def _set_status(
    job: Preparation,
    candidate: Candidate,
    status: FileStatus,
    digest: str = "",
    reason: str = "",
    image: StoredImage | None = None,
) -> File:
    entry = candidate.entry
    file = File(entry.name, entry.size, entry.stamp, status, digest, reason)
    if image is not None:
        facts = {} if image.facts is None else asdict(image.facts)
        file = replace(file, odd=" ".join(image.odd), **facts)
    job.processed[entry.name] = file
    return file


def _store_shard(job: Preparation, split: SplitName, shard: Shard, path: Path) -> None:
    """Store a finished shard, and the record from which another preparation can resume after it, soon."""
    record = ShardRecord(split, shard, job.pending[split], job.pending_bad)
    job.pending[split], job.pending_bad = [], []

    def upload() -> None:
        assert job.unfinished is not None
        if job.existing.get(shard.name) != shard.bytes:  # otherwise an identical shard is already stored
            job.store.put_file(job.uri(shard.name), path)
            job.written.add(shard.name)
        path.unlink()
        job.written.add(job.unfinished.save(record))

    job.uploads.submit(upload)
