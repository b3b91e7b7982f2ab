"""From a pile of pictures to shards and a manifest in the object store."""

from __future__ import annotations

import contextlib
import errno
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
from esvit_core.data.ahead import ahead, reading_threads
from esvit_core.data.archives import Entry, ReadProblem, Source
from esvit_core.data.carry import Base, read_listing
from esvit_core.data.decode import BadPicture, StoredPicture, listed, to_stored
from esvit_core.data.layout import SplitName
from esvit_core.data.listing import LISTING, Fate, File, Look, digest_of, encode, reader, recognise
from esvit_core.data.manifest import BAD_FILES, BadFiles, Manifest, Shard, StoredFile
from esvit_core.data.plan import Candidate, Plan, plan
from esvit_core.data.shards import Sample, ShardWriter
from esvit_core.data.sources import is_listed, open_source, source_fingerprint
from esvit_core.errors import EsvitError, UserError
from esvit_core.monitoring.progress import Progress
from esvit_core.storage import NotFound, ObjectStore, StoreFull, join_uri

_HOPELESS = 100  # bad files after which too large a share of them is no accident
_READ_AHEAD = 4  # pictures in memory per thread


@dataclass
class _Job:
    """A preparation under way."""

    source: str
    opened: Source
    plan: Plan
    config: DataConfig
    store: ObjectStore
    destination: str
    base: Base | None = None
    bad: list[tuple[str, str]] = field(default_factory=list)
    fates: dict[str, File] = field(default_factory=dict)
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
        seen: the source as it was looked at before; what has come or changed since is left for another time. None: it
            is looked at now.
        base: folder of earlier data of the source. Their pictures are taken over by reference, with the split that
            they have; those that are gone from the source are not, those that changed are read anew and keep their
            split. A class keeps its number. None: everything is read.

    Returns:
        The manifest.

    Raises:
        UserError: the source does not exist, has no pictures, or more than ``config.max_bad_fraction`` bad files; or
            the destination holds other data.
        StoreFull: a disk is full.
    """
    with contextlib.ExitStack() as stack:
        # What is listed file by file is opened at once; an archive only if it is to be read.
        opened = stack.enter_context(open_source(source, store)) if is_listed(source, store) else None
        print_of_source = source_fingerprint(source, store, opened) if seen is None else seen.fingerprint
        if (present := _present(store, destination)) is not None:
            if present.source_fingerprint != print_of_source or present.settings != config.model_dump(mode="json"):
                raise UserError(
                    f"{destination}: holds the pictures of {present.source}, which are others or were prepared "
                    "differently; choose another run"
                )
            if seen is None and opened is not None:
                _warn_of_edits(store, destination, present, opened)
            print(f"prepare: already done, {describe(present)}", flush=True)
            return present
        opened = opened or stack.enter_context(open_source(source, store))
        store.remove_prefix(destination)  # what an attempt that was killed has left
        entries, earlier = _as_seen(opened, seen), None if base is None else Base.read(store, base)
        if earlier is not None:
            earlier = earlier.at_present(_recognised(earlier, entries, seen, opened))
        job = _Job(source, opened, plan(entries, source, config, earlier), config, store, destination, earlier)
        try:
            _store_pictures(job)
            manifest = _publish(job, print_of_source)
        except BaseException:
            with contextlib.suppress(EsvitError):  # the first error is the one to tell
                store.remove_prefix(destination)
            raise
    print(f"prepare: {describe(manifest)}", flush=True)
    return manifest


def _as_seen(opened: Source, seen: Look | None) -> list[Entry]:
    """The files of a source, without those that have come or changed since it was looked at."""
    if seen is None:
        return opened.entries
    looked = {file.name: file for file in seen.files}
    return [e for e in opened.entries if e.name in looked and looked[e.name].is_same(e)]


def _recognised(earlier: Base, entries: list[Entry], seen: Look | None, opened: Source) -> list[File]:
    """The files of a source, with digests where only those tell whether the earlier data still hold them."""
    looked = {file.name: file for file in seen.files} if seen else {}
    now = [looked.get(entry.name) or File(entry.name, entry.size, entry.stamp) for entry in entries]
    return recognise(earlier.files.values(), now, reader(opened))


def _warn_of_edits(store: ObjectStore, destination: str, present: Manifest, opened: Source) -> None:
    """Tell of files that were edited after they were prepared, where the fingerprint of the source cannot show it."""
    if LISTING not in present.files:  # of a version that kept none
        return
    before = {file.name: file for file in read_listing(store, destination, present)}
    now = recognise(before.values(), [File(e.name, e.size, e.stamp) for e in opened.entries], reader(opened))
    edited = [file.name for file in now if file.digest and not before[file.name].is_same(file)]
    if edited:
        others = f" and {len(edited) - 3:,} more" if len(edited) > 3 else ""
        print(
            f"warning: {len(edited):,} of the files have other content than when they were prepared, under the same "
            f"name and of the same size: {', '.join(edited[:3])}{others}; what was prepared is kept. Rename them to "
            "prepare them anew",
            flush=True,
        )


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


def _store_pictures(job: _Job) -> None:
    """Read, check and write every candidate, in order."""
    plan, config = job.plan, job.config
    job.bad = list(plan.bad)
    seen: dict[str, SplitName] = {}
    load = partial(_load, job.opened, config)
    with (
        _told_of_the_disk(),
        tempfile.TemporaryDirectory(prefix="esvit-") as folder,
        warnings.catch_warnings(),
        ThreadPoolExecutor(reading_threads(), thread_name_prefix="prepare") as pool,
        Progress(len(plan.candidates), unit="pictures", label="prepare") as progress,
    ):
        warnings.filterwarnings("ignore", module="PIL")  # of malformed files; those that matter are listed
        _carry_over(job, seen, Path(folder))
        for candidate, future in ahead(pool, load, plan.candidates, _READ_AHEAD * reading_threads()):
            digest, picture = future.result()
            if isinstance(picture, BadPicture | ReadProblem):
                job.bad.append((candidate.entry.name, str(picture)))
                fate: Fate = "bad" if isinstance(picture, BadPicture) else "unread"
                _remember(job, candidate, fate, digest, reason=str(picture))
                if len(job.bad) >= _HOPELESS:
                    _check_share(job)
            else:
                split = _settle(job, seen, digest, candidate)
                _write(job, candidate, split, picture, Path(folder))
                _remember(job, candidate, split, digest)
            progress.update(1)
        for writer in job.writers.values():
            writer.close()


def _carry_over(job: _Job, seen: dict[str, SplitName], folder: Path) -> None:
    """Begin with the pictures that are taken over from earlier data."""
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


def _load(
    opened: Source, config: DataConfig, candidate: Candidate
) -> tuple[str, StoredPicture | BadPicture | ReadProblem]:
    """The digest of a file, and the picture in it or why there is none. Runs in several threads."""
    try:
        data = opened.read(candidate.entry)
    except ReadProblem as error:
        return "", error
    try:
        return digest_of(data), to_stored(data, config.max_megapixels, config.store_short_side)
    except BadPicture as error:
        return digest_of(data), error


def _settle(job: _Job, seen: dict[str, SplitName], digest: str, candidate: Candidate) -> SplitName:
    """The split of a picture: an exact copy of one that is trained on is not held out, for it would measure nothing."""
    split = candidate.split
    if digest in seen:
        job.copies += 1
        if job.plan.divided:
            split = seen[digest]
    seen.setdefault(digest, split)
    return split


def _write(job: _Job, candidate: Candidate, split: SplitName, picture: StoredPicture, folder: Path) -> None:
    writer = job.writers.get(split) or _writer(job, split, folder)
    number = writer.add(Sample(picture.data, picture.suffix, candidate.label, candidate.entry.name))
    digest = hashlib.sha256(picture.data).hexdigest()
    job.content[split].update(f"{number:09d}\0{_class(job, candidate.label)}\0{digest}\n".encode())
    job.reencoded += picture.reencoded


def _writer(
    job: _Job, split: SplitName, folder: Path, shards: Iterable[Shard] = (), rows: Iterable[tuple[int, ...]] = ()
) -> ShardWriter:
    size = int(job.config.shard_mib * 2**20)
    writer = ShardWriter(split, folder, size, partial(_keep_shard, job), list(shards), rows)
    job.writers[split], job.content[split] = writer, hashlib.sha256()
    return writer


def _class(job: _Job, label: int) -> str:
    return job.plan.classes[label] if label >= 0 else ""


def _remember(job: _Job, candidate: Candidate, fate: Fate, digest: str = "", reason: str = "") -> None:
    entry = candidate.entry
    job.fates[entry.name] = File(entry.name, entry.size, entry.stamp, fate, digest, reason)


def _keep_shard(job: _Job, name: str, path: Path) -> None:
    job.store.put_file(job.at(name), path)


def _publish(job: _Job, source_print: str) -> Manifest:
    """Write what goes with the shards, and the manifest."""
    if "train" not in job.writers:
        raise UserError(
            f"{job.source}: none of its {len(job.plan.files):,} files is a picture to train on: {listed(job.bad)}; "
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
    _put(job, LISTING, encode(_files(job)))
    shards = [shard for split in splits.values() for shard in split.shards]
    before = job.base.manifest if job.base else None
    prints = "".join(f"{name} {digest.hexdigest()}\n" for name, digest in sorted(job.content.items()))
    manifest = Manifest(
        source=job.source,
        source_fingerprint=source_print,
        fingerprint=hashlib.sha256(prints.encode()).hexdigest(),
        settings=job.config.model_dump(mode="json"),
        classes=job.plan.classes,
        splits=splits,
        bytes=sum(shard.bytes for shard in shards),
        considered=len(job.plan.files) - job.plan.not_chosen,
        bad=BadFiles(count=len(bad), reasons=dict(Counter(_kind(reason) for _, reason in bad).most_common())),
        ignored=job.plan.ignored,
        duplicates=job.opened.duplicates,
        copies=job.copies + (before.copies if before else 0),
        not_chosen=job.plan.not_chosen,
        reencoded=job.reencoded + (before.reencoded if before else 0),
        files=job.files | {s.name: StoredFile(bytes=s.bytes, sha256=s.sha256) for s in shards if not s.is_elsewhere},
        base=job.base.prefix if job.base else None,
    )
    manifest.write(job.store, job.destination)
    return manifest


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


def _put(job: _Job, name: str, data: bytes) -> None:
    job.store.put_bytes(job.at(name), data)
    job.files[name] = StoredFile(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


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
        raise StoreFull(
            f"{tempfile.gettempdir()}: the disk is full; a shard needs room there: free some, or set TMPDIR"
        ) from None
