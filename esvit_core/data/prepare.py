"""From a pile of pictures to shards and a manifest in the object store."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from esvit_core.config import DataConfig
from esvit_core.data.ahead import ahead, reading_threads
from esvit_core.data.archives import Entry, ReadProblem, Source
from esvit_core.data.choose import choose, hold_out, in_order
from esvit_core.data.decode import BadPicture, StoredPicture, listed, to_stored
from esvit_core.data.layout import Layout, SplitName, arrange, is_ignored, may_be_picture
from esvit_core.data.manifest import BAD_FILES, BadFiles, Manifest, StoredFile
from esvit_core.data.shards import Sample, ShardWriter
from esvit_core.data.sources import open_source, source_fingerprint
from esvit_core.errors import UserError
from esvit_core.monitoring.progress import Progress
from esvit_core.storage import NotFound, ObjectStore, join_uri

_HOPELESS = 100  # bad files after which too large a share of them is no accident
_BYTES_PER_PIXEL = 8  # 16 bit RGBA: no sensible file is much larger than its pixels
_READ_AHEAD = 4  # pictures in memory per thread


@dataclass(frozen=True)
class _Candidate:
    """A file that may be a picture, and where it belongs if it is one."""

    entry: Entry
    split: SplitName
    label: int


@dataclass(frozen=True)
class _Plan:
    """What is to be read, and what is known before anything is.

    Attributes:
        candidates: in the order of storage.
        bad: names and reasons.
        classes: names.
        files: all of the source, the ignored ones excepted.
        ignored, not_chosen: files that are passed over.
        divided: the splits are ours, not the source's.
    """

    candidates: list[_Candidate]
    bad: list[tuple[str, str]]
    classes: list[str]
    files: int
    ignored: int
    not_chosen: int
    divided: bool


@dataclass
class _Job:
    """A preparation under way."""

    source: str
    opened: Source
    plan: _Plan
    config: DataConfig
    store: ObjectStore
    destination: str
    bad: list[tuple[str, str]] = field(default_factory=list)
    reencoded: int = 0
    copies: int = 0
    writers: dict[SplitName, ShardWriter] = field(default_factory=dict)
    content: dict[SplitName, hashlib._Hash] = field(default_factory=dict)
    files: dict[str, StoredFile] = field(default_factory=dict)

    def at(self, name: str) -> str:
        return join_uri(self.destination, name)


def prepare(source: str, store: ObjectStore, destination: str, config: DataConfig, seed: int = 0) -> Manifest:
    """Write the pictures of a source as shards, with a list of what was left out, and last the manifest.

    Done before with the same source and settings, it returns what is there. The result depends on the source and the
    settings alone: which pictures are held out, and in what order they are stored, follows from their names.

    Args:
        source: folder, tar, zip, or ``s3://bucket/prefix``; see :func:`esvit_core.data.layout.arrange` for how its
            folders are read.
        store: where the data goes, and where an ``s3://`` source lies.
        destination: ``s3://`` folder of the data.
        config: the data section of the configuration.
        seed: of the run. It changes nothing, on purpose: runs that differ in their seed are trained and measured on
            the same pictures.

    Returns:
        The manifest.

    Raises:
        UserError: the source does not exist, has no pictures, or more than ``config.max_bad_fraction`` bad files; or
            the destination holds other data; or a disk is full.
    """
    fingerprint = source_fingerprint(source, store)
    if (present := _present(store, destination)) is not None:
        if present.source_fingerprint == fingerprint and present.settings == config.model_dump(mode="json"):
            print(f"prepare: already done, {describe(present)}", flush=True)
            return present
        raise UserError(
            f"{destination}: holds the pictures of {present.source}, which are others or were prepared differently; "
            "choose another run"
        )
    store.remove_prefix(destination)  # what an attempt that was killed has left
    with open_source(source, store) as opened:
        job = _Job(source, opened, _plan(opened, source, config), config, store, destination)
        try:
            _store_pictures(job)
            manifest = _publish(job, fingerprint)
        except BaseException:
            with contextlib.suppress(UserError):  # the first error is the one to tell
                store.remove_prefix(destination)
            raise
    print(f"prepare: {describe(manifest)}", flush=True)
    return manifest


def describe(manifest: Manifest) -> str:
    """Prepared data in one line."""
    splits = ", ".join(f"{split.samples:,} {name}" for name, split in manifest.splits.items())
    classes = f" in {len(manifest.classes):,} classes" if manifest.classes else ", no labels"
    parts = [f"{manifest.samples:,} pictures{classes} ({splits}), {manifest.bytes / 2**20:,.1f} MiB"]
    if bad := manifest.bad.count:
        parts.append(f"{bad:,} bad {'file' if bad == 1 else 'files'} left out")
    if manifest.not_chosen:
        parts.append(f"{manifest.not_chosen:,} not chosen")
    return "; ".join(parts)


def _present(store: ObjectStore, destination: str) -> Manifest | None:
    try:
        return Manifest.read(store, destination)
    except NotFound:
        return None


def _plan(opened: Source, source: str, config: DataConfig) -> _Plan:
    files = [entry for entry in opened.entries if not is_ignored(entry.name)]
    if not files:
        raise UserError(f"{source}: no pictures in it; expected JPEG, PNG, WebP, GIF, BMP or TIFF files")
    largest = config.max_megapixels * 1e6 * _BYTES_PER_PIXEL
    bad = [(entry.name, entry.problem) for entry in files if entry.problem is not None]
    sound = [entry for entry in files if entry.problem is None]
    layout = arrange([entry.name for entry in sound], source)
    likely: list[int] = []
    rest: list[int] = []
    for number, (entry, place) in enumerate(zip(sound, layout.places, strict=True)):
        problem = place.problem or (f"file of {entry.size:,} bytes" if entry.size > largest else None)
        if problem:
            bad.append((entry.name, problem))
        else:
            (likely if may_be_picture(entry.name) else rest).append(number)
    chosen = _chosen(likely, layout, config.max_images)
    divided = all(layout.places[i].split is None for i in chosen)
    held = _held_out(chosen, layout, config.val_fraction) if divided else set()
    classes: dict[str | None, int] = {name: number for number, name in enumerate(layout.classes)}
    candidates = [
        _Candidate(
            sound[i],
            "val" if i in held else layout.places[i].split or "train",
            classes.get(layout.places[i].label, -1),
        )
        for i in in_order([place.key for place in layout.places], [*chosen, *rest])
    ]
    candidates.sort(key=lambda c: c.split)  # "train" comes before "val": see _settle
    return _Plan(
        candidates=candidates,
        bad=bad,
        classes=layout.classes,
        files=len(files),
        ignored=len(opened.entries) - len(files),
        not_chosen=len(likely) - len(chosen),
        divided=divided,
    )


def _chosen(likely: list[int], layout: Layout, count: int | None) -> list[int]:
    if count is None:
        return likely
    places = [layout.places[i] for i in likely]
    groups = [(place.split or "", place.label or "") for place in places]
    return [likely[i] for i in choose([place.key for place in places], groups, count)]


def _held_out(chosen: list[int], layout: Layout, fraction: float) -> set[int]:
    places = [layout.places[i] for i in chosen]
    held = hold_out([place.key for place in places], [place.label for place in places], fraction)
    return {chosen[i] for i in held}


def _store_pictures(job: _Job) -> None:
    """Read, check and write every candidate, in order."""
    plan, config = job.plan, job.config
    job.bad = list(plan.bad)
    seen: dict[bytes, SplitName] = {}
    load = partial(_load, job.opened, config)
    with (
        _told_of_the_disk(),
        tempfile.TemporaryDirectory(prefix="esvit-") as folder,
        warnings.catch_warnings(),
        ThreadPoolExecutor(reading_threads(), thread_name_prefix="prepare") as pool,
        Progress(len(plan.candidates), unit="pictures", label="prepare") as progress,
    ):
        warnings.filterwarnings("ignore", module="PIL")  # of malformed files; those that matter are listed
        for candidate, future in ahead(pool, load, plan.candidates, _READ_AHEAD * reading_threads()):
            try:
                digest, picture = future.result()
            except (BadPicture, ReadProblem) as error:
                job.bad.append((candidate.entry.name, str(error)))
                if len(job.bad) >= _HOPELESS:
                    _check_share(job)
            else:
                split = _settle(job, seen, digest, candidate)
                _write(job, candidate, split, picture, Path(folder))
            progress.update(1)
        for writer in job.writers.values():
            writer.close()


def _load(opened: Source, config: DataConfig, candidate: _Candidate) -> tuple[bytes, StoredPicture]:
    """The digest of a file and the picture in it. Runs in several threads."""
    data = opened.read(candidate.entry)
    return hashlib.sha256(data).digest()[:16], to_stored(data, config.max_megapixels, config.store_short_side)


def _settle(job: _Job, seen: dict[bytes, SplitName], digest: bytes, candidate: _Candidate) -> SplitName:
    """The split of a picture: an exact copy of one that is trained on is not held out, for it would measure nothing."""
    split = candidate.split
    if digest in seen:
        job.copies += 1
        if job.plan.divided:
            split = seen[digest]
    seen.setdefault(digest, split)
    return split


def _write(job: _Job, candidate: _Candidate, split: SplitName, picture: StoredPicture, folder: Path) -> None:
    writer = job.writers.get(split)
    if writer is None:
        writer = ShardWriter(split, folder, int(job.config.shard_mib * 2**20), partial(_keep_shard, job))
        job.writers[split], job.content[split] = writer, hashlib.sha256()
    number = writer.add(Sample(picture.data, picture.suffix, candidate.label, candidate.entry.name))
    digest = hashlib.sha256(picture.data).hexdigest()
    name = job.plan.classes[candidate.label] if candidate.label >= 0 else ""
    job.content[split].update(f"{number:09d}\0{name}\0{digest}\n".encode())
    job.reencoded += picture.reencoded


def _keep_shard(job: _Job, name: str, path: Path) -> None:
    job.store.put_file(job.at(name), path)


def _publish(job: _Job, source_print: str) -> Manifest:
    """Write what goes with the shards, and the manifest."""
    if "train" not in job.writers:
        raise UserError(
            f"{job.source}: none of its {job.plan.files:,} files is a picture to train on: {listed(job.bad)}; "
            "expected JPEG, PNG, WebP, GIF, BMP or TIFF files"
        )
    _check_share(job)
    splits = {}
    for name, writer in sorted(job.writers.items()):
        index = f"index/{name}.npy"
        _put(job, index, writer.index())
        splits[name] = writer.describe(index, len(job.plan.classes))
    bad = sorted(job.bad)
    lines = (json.dumps({"name": name, "reason": reason}, ensure_ascii=False) + "\n" for name, reason in bad)
    _put(job, BAD_FILES, "".join(lines).encode())
    shards = [shard for split in splits.values() for shard in split.shards]
    prints = "".join(f"{name} {digest.hexdigest()}\n" for name, digest in sorted(job.content.items()))
    manifest = Manifest(
        source=job.source,
        source_fingerprint=source_print,
        fingerprint=hashlib.sha256(prints.encode()).hexdigest(),
        settings=job.config.model_dump(mode="json"),
        classes=job.plan.classes,
        splits=splits,
        bytes=sum(shard.bytes for shard in shards),
        considered=job.plan.files - job.plan.not_chosen,
        bad=BadFiles(count=len(bad), reasons=dict(Counter(_kind(reason) for _, reason in bad).most_common())),
        ignored=job.plan.ignored,
        duplicates=job.opened.duplicates,
        copies=job.copies,
        not_chosen=job.plan.not_chosen,
        reencoded=job.reencoded,
        files=job.files | {s.name: StoredFile(bytes=s.bytes, sha256=s.sha256) for s in shards},
    )
    manifest.write(job.store, job.destination)
    return manifest


def _put(job: _Job, name: str, data: bytes) -> None:
    job.store.put_bytes(job.at(name), data)
    job.files[name] = StoredFile(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _check_share(job: _Job) -> None:
    """Stop where too many files are bad."""
    plan, limit = job.plan, job.config.max_bad_fraction
    # Of the files that were not chosen as many are bad as of those that were.
    read_bad = len(job.bad) - len(plan.bad)
    likely = len(plan.candidates) + plan.not_chosen
    share = (len(plan.bad) + read_bad * likely / max(len(plan.candidates), 1)) / plan.files
    if share > limit:
        raise UserError(
            f"{job.source}: {len(job.bad):,} of {plan.files - plan.not_chosen:,} files are bad, more than the allowed "
            f"{100 * limit:g} %: {listed(job.bad)}; remove them, or raise data.max_bad_fraction"
        )


def _kind(reason: str) -> str:
    """A reason without what is particular to the file, to be counted."""
    return reason.partition(" (")[0].partition(" of ")[0]


@contextlib.contextmanager
def _told_of_the_disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{tempfile.gettempdir()}: the disk is full; a shard needs room there: free some, or set TMPDIR"
        ) from None
