"""From a pile of images to shards and a manifest in the object store."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from esvit_core.config import DataConfig
from esvit_core.data.ingest.archives import ReadProblem, Source
from esvit_core.data.ingest.changes import as_seen, recognised, warn_of_edits
from esvit_core.data.ingest.decode import BadImage, StoredImage, kind_of, listed, to_stored
from esvit_core.data.ingest.incremental import Base
from esvit_core.data.ingest.ingest_plan import Candidate, Plan, plan
from esvit_core.data.ingest.layout import SplitName
from esvit_core.data.ingest.listing import LISTING, Fate, File, Look, digest_of, encode
from esvit_core.data.ingest.prefetch import ahead, reading_threads
from esvit_core.data.ingest.publish_manifest import find_data, objects_below, publish_data
from esvit_core.data.ingest.sources import is_listed, open_source, source_fingerprint
from esvit_core.data.ingest.unfinished import Outcome, Record, StaleProgressError, Unfinished, shards_in
from esvit_core.data.shards.format import Sample, ShardWriter
from esvit_core.data.shards.manifest import BadFiles, Manifest, Shard, StoredFile, named_by_content
from esvit_core.errors import UserError
from esvit_core.monitoring.progress_line import Progress
from esvit_core.storage import ObjectStore, join_uri
from esvit_core.storage.disk import explain_full_temporary_disk

_HOPELESS = 100  # bad files after which too large a share of them is no accident
_READ_AHEAD = 4  # images in memory per thread


@dataclass
class _Job:
    """A preparation under way.

    Attributes:
        there: sizes of the objects that were below the destination when it began, by name.
        known: what an unfinished preparation has found out, by name.
        waiting, waiting_bad: files of which no record is stored yet: those in the shard that is being written, and bad
            ones.
        written: names of the objects that were stored.
    """

    source: str
    opened: Source
    plan: Plan
    config: DataConfig
    store: ObjectStore
    destination: str
    base: Base | None = None
    bad: list[tuple[str, str]] = field(default_factory=list)
    fates: dict[str, File] = field(default_factory=dict)
    unfinished: Unfinished | None = None
    there: dict[str, int] = field(default_factory=dict)
    known: dict[str, Outcome] = field(default_factory=dict)
    waiting: dict[SplitName, list[Outcome]] = field(default_factory=dict)
    waiting_bad: list[File] = field(default_factory=list)
    written: set[str] = field(default_factory=set)
    reencoded: int = 0
    copies: int = 0
    writers: dict[SplitName, ShardWriter] = field(default_factory=dict)
    content: dict[SplitName, hashlib._Hash] = field(default_factory=dict)
    files: dict[str, StoredFile] = field(default_factory=dict)

    def at(self, name: str) -> str:
        return join_uri(self.destination, name)


def prepare(
    source: str,
    store: ObjectStore,
    destination: str,
    config: DataConfig,
    seed: int = 0,
    *,
    seen: Look | None = None,
    base: str | None = None,
) -> Manifest:
    """Write the images of a source as shards, with a list of what was left out, and last the manifest.

    Done before with the same source and settings, it returns what is there. The result depends on the source and the
    settings alone: which images are held out, and in what order they are stored, follows from their names.

    Args:
        source: folder, tar, zip, or ``s3://bucket/prefix``; see :func:`esvit_core.data.ingest.layout.arrange` for how its
            folders are read.
        store: where the data goes, and where an ``s3://`` source lies.
        destination: ``s3://`` folder of the data.
        config: the data section of the configuration.
        seed: of the run. It changes nothing, on purpose: runs that differ in their seed are trained and measured on
            the same images.
        seen: the source as it was looked at before; what has come or changed since is left for another time. None: it
            is looked at now.
        base: folder of earlier data of the source. Their images are taken over by reference, with the split that
            they have; those that are gone from the source are not, those that changed are read anew and keep their
            split. A class keeps its number. None: everything is read.

    Returns:
        The manifest.

    Raises:
        UserError: the source does not exist, has no images, or more than ``config.max_bad_fraction`` bad files; or
            the destination holds other data.
        StoreFull: a disk is full.
    """
    with contextlib.ExitStack() as stack:
        # What is listed file by file is opened at once; an archive only if it is to be read.
        opened = stack.enter_context(open_source(source, store)) if is_listed(source, store) else None
        print_of_source = source_fingerprint(source, store, opened) if seen is None else seen.fingerprint
        if (present := find_data(store, destination, print_of_source, config.identity_values())) is not None:
            if seen is None and opened is not None:
                warn_of_edits(store, destination, present, opened)
            print(f"prepare: already done, {present.describe()}", flush=True)
            return present
        opened = opened or stack.enter_context(open_source(source, store))
        entries, earlier = as_seen(opened, seen), None if base is None else Base.read(store, base)
        if earlier is not None:
            earlier = earlier.at_present(recognised(earlier, entries, seen, opened))
        job = _Job(source, opened, plan(entries, source, config, earlier), config, store, destination, earlier)
        job.unfinished = Unfinished(store, destination, print_of_source, config, base)
        try:
            _store_images(job)
        except StaleProgressError:
            print("prepare: the source is not as an unfinished preparation saw it; begins anew", flush=True)
            job = _Job(source, opened, job.plan, config, store, destination, earlier, unfinished=job.unfinished)
            _store_images(job, anew=True)
        manifest = publish_data(store, destination, _manifest(job, print_of_source), job.written)
    print(f"prepare: {manifest.describe()}", flush=True)
    return manifest


def _store_images(job: _Job, anew: bool = False) -> None:
    """Read, check and write every candidate, in order.

    Args:
        anew: whether an unfinished preparation is left alone.

    Raises:
        StaleProgressError: it cannot be gone on with.
    """
    plan = job.plan
    job.bad = list(plan.bad)
    seen: dict[str, SplitName] = {}
    with (
        explain_full_temporary_disk("a shard"),
        tempfile.TemporaryDirectory(prefix="esvit-") as folder,
        warnings.catch_warnings(),
        ThreadPoolExecutor(reading_threads(), thread_name_prefix="prepare") as pool,
        Progress(len(plan.candidates), unit="images", label="prepare") as progress,
    ):
        warnings.filterwarnings("ignore", module="PIL")  # of malformed files; those that matter are listed
        _carry_over(job, seen, Path(folder))
        job.there = objects_below(job.store, job.destination)
        if not anew:
            _go_on(job)
        for candidate, future in ahead(pool, partial(_outcome, job), plan.candidates, _READ_AHEAD * reading_threads()):
            found = future.result()
            if isinstance(found, Outcome):
                _repeat(job, seen, candidate, found, Path(folder))
                progress.update(1)
                continue
            digest, image = found
            if isinstance(image, BadImage | ReadProblem):
                job.bad.append((candidate.entry.name, str(image)))
                fate: Fate = "bad" if isinstance(image, BadImage) else "unread"
                job.waiting_bad.append(_remember(job, candidate, fate, digest, reason=str(image)))
                if len(job.bad) >= _HOPELESS:
                    _check_share(job)
            else:
                split = _settle(job, seen, digest, candidate)
                _write(job, candidate, split, digest, image, Path(folder))
            progress.update(1)
        for writer in job.writers.values():
            writer.close()


def _carry_over(job: _Job, seen: dict[str, SplitName], folder: Path) -> None:
    """Begin with the images that are taken over from earlier data."""
    for split in job.base.rows if job.base else ():
        assert job.base is not None
        carried = job.base.carried(split, job.plan.labels)
        if not carried.files:
            continue
        _writer(job, split, folder, carried.shards, carried.rows.tolist())
        for number, file in enumerate(carried.files):
            name = _class(job, job.plan.labels[file.name])
            job.content[split].update(f"{number:09d}\0{name}\0{file.digest}\n".encode())
            seen.setdefault(file.digest, split)
            job.fates[file.name] = file


def _go_on(job: _Job) -> None:
    """Find out what an unfinished preparation has stored."""
    assert job.unfinished is not None
    begins = {split: len(writer) for split, writer in job.writers.items()}
    job.known = job.unfinished.read({str(split): number for split, number in begins.items()}, job.there)
    if number := shards_in(job.known.values()):
        print(f"prepare: goes on with {number:,} shards that an unfinished preparation has stored", flush=True)


def _outcome(job: _Job, candidate: Candidate) -> Outcome | tuple[str, StoredImage | BadImage | ReadProblem]:
    """What is known of a file, else what reading it gives. Runs in several threads."""
    known, entry = job.known.get(candidate.entry.name), candidate.entry
    if known is None:
        return _load(job.opened, job.config, candidate)
    if known.file.digest and not known.file.is_same(entry):  # its date is another one
        try:
            same = entry.size == known.file.size and digest_of(job.opened.read(entry)) == known.file.digest
        except ReadProblem:
            same = False
        if not same:
            raise StaleProgressError
    return known


def _repeat(job: _Job, seen: dict[str, SplitName], candidate: Candidate, known: Outcome, folder: Path) -> None:
    """Take over what an unfinished preparation has done with a file.

    Raises:
        StaleProgressError: this one would do something else with it.
    """
    file = job.fates[known.file.name] = known.at(candidate.entry)
    if file.split is None:
        job.bad.append((file.name, file.reason))
        return
    split = _settle(job, seen, file.digest, candidate)
    writer = job.writers.get(split) or _writer(job, split, folder)
    if (split, len(writer), candidate.label) != (file.split, known.number, known.row[0]):
        raise StaleProgressError
    try:
        writer.restore(known.row, known.ends)
    except ValueError:
        raise StaleProgressError from None
    _count(job, split, known.number, candidate.label, known.stored)
    job.reencoded += known.reencoded


def _load(opened: Source, config: DataConfig, candidate: Candidate) -> tuple[str, StoredImage | BadImage | ReadProblem]:
    """The digest of a file, and the image in it or why there is none. Runs in several threads."""
    try:
        data = opened.read(candidate.entry)
    except ReadProblem as error:
        return "", error
    try:
        return digest_of(data), to_stored(data, config.max_megapixels, config.store_short_side)
    except BadImage as error:
        return digest_of(data), error


def _settle(job: _Job, seen: dict[str, SplitName], digest: str, candidate: Candidate) -> SplitName:
    """The split of an image: an exact copy of one that is trained on is not held out, for it would measure nothing."""
    split = candidate.split
    if digest in seen:
        job.copies += 1
        if job.plan.divided:
            split = seen[digest]
    seen.setdefault(digest, split)
    return split


def _write(job: _Job, candidate: Candidate, split: SplitName, digest: str, image: StoredImage, folder: Path) -> None:
    writer = job.writers.get(split) or _writer(job, split, folder)
    number = writer.add(Sample(image.data, image.suffix, candidate.label, candidate.entry.name))
    stored = hashlib.sha256(image.data).hexdigest()
    _count(job, split, number, candidate.label, stored)
    job.reencoded += image.reencoded
    file = _remember(job, candidate, split, digest)
    job.waiting[split].append(Outcome(file, number, stored, image.reencoded, writer.last_row))


def _count(job: _Job, split: SplitName, number: int, label: int, stored: str) -> None:
    """Add an image to the digest of the content."""
    job.content[split].update(f"{number:09d}\0{_class(job, label)}\0{stored}\n".encode())


def _writer(
    job: _Job, split: SplitName, folder: Path, shards: Iterable[Shard] = (), rows: Iterable[tuple[int, ...]] = ()
) -> ShardWriter:
    size = int(job.config.shard_mib * 2**20)
    writer = ShardWriter(split, folder, size, partial(_keep_shard, job, split), list(shards), rows)
    job.writers[split], job.content[split], job.waiting[split] = writer, hashlib.sha256(), []
    return writer


def _class(job: _Job, label: int) -> str:
    return job.plan.classes[label] if label >= 0 else ""


def _remember(job: _Job, candidate: Candidate, fate: Fate, digest: str = "", reason: str = "") -> File:
    entry = candidate.entry
    file = job.fates[entry.name] = File(entry.name, entry.size, entry.stamp, fate, digest, reason)
    return file


def _keep_shard(job: _Job, split: SplitName, shard: Shard, path: Path) -> None:
    """Store a finished shard, and the record by which another preparation goes on after it."""
    assert job.unfinished is not None
    if job.there.get(shard.name) != shard.bytes:  # else one of the same content is there already
        job.store.put_file(job.at(shard.name), path)
        job.written.add(shard.name)
    job.written.add(job.unfinished.keep(Record(split, shard, job.waiting[split], job.waiting_bad)))
    job.waiting[split], job.waiting_bad = [], []


def _manifest(job: _Job, source_print: str) -> Manifest:
    """Store what goes with the shards, and describe all of it."""
    if "train" not in job.writers:
        raise UserError(
            f"{job.source}: none of its {len(job.plan.files):,} files is an image to train on: {listed(job.bad)}; "
            "expected JPEG, PNG, WebP, GIF, BMP or TIFF files"
        )
    _check_share(job)
    splits = {}
    for name, writer in sorted(job.writers.items()):
        index = _put(job, f"index/{name}.npy", writer.index())
        splits[name] = writer.describe(index, len(job.plan.classes))
    bad = sorted(job.bad)
    lines = (json.dumps({"name": name, "reason": reason}, ensure_ascii=False) + "\n" for name, reason in bad)
    bad_list = _put(job, "bad_files.jsonl", "".join(lines).encode())
    listing = _put(job, LISTING, encode(_files(job)))
    shards = [shard for split in splits.values() for shard in split.shards]
    before = job.base.manifest if job.base else None
    prints = "".join(f"{name} {digest.hexdigest()}\n" for name, digest in sorted(job.content.items()))
    reasons = dict(Counter(kind_of(reason) for _, reason in bad).most_common())
    return Manifest(
        source=job.source,
        source_fingerprint=source_print,
        fingerprint=hashlib.sha256(prints.encode()).hexdigest(),
        settings=job.config.identity_values(),
        classes=job.plan.classes,
        splits=splits,
        bytes=sum(shard.bytes for shard in shards),
        considered=len(job.plan.files) - job.plan.not_chosen,
        bad=BadFiles(count=len(bad), reasons=reasons, list=bad_list),
        ignored=job.plan.ignored,
        duplicates=job.opened.duplicates,
        copies=job.copies + (before.copies if before else 0),
        not_chosen=job.plan.not_chosen,
        reencoded=job.reencoded + (before.reencoded if before else 0),
        files=job.files | {s.name: StoredFile(bytes=s.bytes, sha256=s.sha256) for s in shards if not s.is_elsewhere},
        listing=listing,
        base=job.base.prefix if job.base else None,
    )


def _files(job: _Job) -> Iterator[File]:
    """What became of every file: those stored in the order of the indexes, then the others."""
    yield from job.fates.values()
    reasons = dict(job.plan.bad)
    for entry in job.plan.files:
        if entry.name in job.fates:
            continue
        before = job.base.files.get(entry.name) if job.base else None
        if before is not None and before.fate == "bad" and before.is_same(entry):
            yield before
        else:
            yield File(entry.name, entry.size, entry.stamp, "passed over", reason=reasons.get(entry.name, "not chosen"))


def _put(job: _Job, name: str, data: bytes) -> str:
    """Store an object under a name with the digest of its content, and return that name."""
    file = StoredFile(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    name = named_by_content(name, file.sha256)
    job.store.put_bytes(job.at(name), data)
    job.files[name] = file
    job.written.add(name)
    return name


def _check_share(job: _Job) -> None:
    """Stop where too many files are bad."""
    plan, limit = job.plan, job.config.max_bad_fraction
    # Of the files that were not chosen as many are bad as of those that were.
    read_bad = len(job.bad) - len(plan.bad)
    likely = len(plan.candidates) + plan.not_chosen
    share = (len(plan.bad) + read_bad * likely / max(len(plan.candidates), 1)) / len(plan.files)
    if share > limit:
        raise UserError(
            f"{job.source}: {len(job.bad):,} of {len(plan.files) - plan.not_chosen:,} files are bad, more than the "
            f"allowed {100 * limit:g} %: {listed(job.bad)}; remove them, or raise data.max_bad_fraction"
        )
