"""Prepare images: read, check and store them as shards with a manifest in the object store."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from esvit_core.config import DataConfig
from esvit_core.data.ingest.archives import Source
from esvit_core.data.ingest.changes import scanned_entries, use_current_stamps, warn_of_edits
from esvit_core.data.ingest.decoders import Decoders, DecodeSettings, choose_processes
from esvit_core.data.ingest.image_facts import can_compare_looks
from esvit_core.data.ingest.incremental import Base
from esvit_core.data.ingest.ingest_plan import IngestPlan, plan_ingest
from esvit_core.data.ingest.intensity_scale import describe_scales, find_scales
from esvit_core.data.ingest.listing import Scan
from esvit_core.data.ingest.merge_parts import merge_parts
from esvit_core.data.ingest.part_records import PartRecords
from esvit_core.data.ingest.parts import PlannedPart, Share, divide
from esvit_core.data.ingest.pixels import PixelSettings, Scale
from esvit_core.data.ingest.prefetch import reading_threads
from esvit_core.data.ingest.preparation import Preparation
from esvit_core.data.ingest.prepare_part import REQUESTS, prepare_part
from esvit_core.data.ingest.publish_manifest import (
    find_data,
    objects_below,
    publish_data,
    remove_objects,
    require_same,
)
from esvit_core.data.ingest.source_lists import require_weights
from esvit_core.data.ingest.sources import is_listed, open_source, source_fingerprint
from esvit_core.data.ingest.thread_heaps import share_heap
from esvit_core.data.shards.manifest import Manifest
from esvit_core.errors import UserError
from esvit_core.monitoring.progress_line import ProgressLine
from esvit_core.storage import ObjectStore
from esvit_core.storage.disk import explain_full_temporary_disk


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
    with _planned(source, store, destination, config, scan, base) as job:
        if isinstance(job, Manifest):
            return job
        if number := job.records.count_shards():
            print(f"prepare: resuming with {number:,} shards that an unfinished preparation stored", flush=True)
        with _working(job, len(job.plan.candidates)):
            stored = [(part, prepare_part(job, part)) for part in _parts(job)]
            parts = [(part, future.result()) for part, future in stored]
        try:
            merged = merge_parts(job, parts)
        except UserError:
            remove_objects(store, destination, job.written)
            raise
        manifest = publish_data(store, destination, merged.manifest, merged.objects, job.written)
    for line in manifest.reading[len(job.plan.messages) :]:
        print(f"prepare: {line}", flush=True)
    print(f"prepare: {manifest.describe()}", flush=True)
    return manifest


def prepare_share(
    source: str,
    store: ObjectStore,
    destination: str,
    config: DataConfig,
    share: Share,
    *,
    scan: Scan | None = None,
    base: str | None = None,
) -> None:
    """Prepare one share of the parts. When all shares are done, :func:`prepare` finds them and adds the manifest.

    Args:
        share: the parts to prepare.

    The other arguments and errors are those of :func:`prepare`.
    """
    with _planned(source, store, destination, config, scan, base) as job:
        if isinstance(job, Manifest):
            return
        everything = _parts(job)
        parts = share.of(everything)
        with _working(job, sum(part.stop - part.start for part in parts)):
            for future in [prepare_part(job, part) for part in parts]:
                future.result()
        print(f"prepare: share {share} is done: {len(parts):,} of {len(everything):,} parts", flush=True)


@contextlib.contextmanager
def _planned(
    source: str, store: ObjectStore, destination: str, config: DataConfig, scan: Scan | None, base: str | None
) -> Iterator[Manifest | Preparation]:
    """Open a source and decide what happens to its files; yield the manifest if they are prepared already."""
    require_weights(source, config)
    if config.drop_duplicates == "near" and not can_compare_looks():
        raise UserError("data.drop_duplicates=near: needs imagehash; install the extra esvit[duplicates]")
    with contextlib.ExitStack() as stack:
        # Folders and prefixes are opened immediately, archives only if they have to be read.
        opened = stack.enter_context(open_source(source, store)) if is_listed(source, store) else None
        decoders = stack.enter_context(Decoders())
        present = find_data(store, destination)
        if opened is not None and present is None:
            decoders.start(choose_processes(config, len(opened.entries)))  # while the content is sampled
        fingerprint = source_fingerprint(source, store, opened) if scan is None else scan.fingerprint
        if present is not None:
            require_same(present, destination, fingerprint, config.identity_values())
            if scan is None and opened is not None:
                warn_of_edits(store, destination, present, opened)
            print(f"prepare: already done, {present.describe()}", flush=True)
            yield present
            return
        opened = opened or stack.enter_context(open_source(source, store))
        entries, earlier = scanned_entries(opened, scan), None if base is None else Base.read(store, base)
        if earlier is not None:
            use_current_stamps(earlier, entries, scan, opened)
        plan = plan_ingest(entries, source, config, earlier, opened.read)
        plan = replace(plan, messages=[*opened.notes, *plan.messages])
        print(*(f"prepare: {line}" for line in plan.messages), sep="\n", flush=True)
        scales = _scales(opened, plan, config, earlier)
        existing = objects_below(store, destination)
        records = PartRecords(store, destination, fingerprint, config, base, existing)
        yield Preparation(
            source, fingerprint, opened, plan, config, store, destination, earlier, scales, records, existing, decoders
        )


def _parts(job: Preparation) -> list[PlannedPart]:
    """Return the parts of a preparation; they are numbered after those of the earlier data."""
    splits = job.base.manifest.splits if job.base else {}
    return divide(job.plan.candidates, {name: len(split.parts) for name, split in splits.items()})


@contextlib.contextmanager
def _working(job: Preparation, files: int) -> Iterator[None]:
    """Have what preparing parts needs: processes, threads, and a local folder."""
    job.decoders.start(choose_processes(job.config, files))
    job.decoders.configure(DecodeSettings.of(job.config, PixelSettings.of(job.config, job.scales)))
    share_heap()
    with (
        explain_full_temporary_disk("a shard"),
        tempfile.TemporaryDirectory(prefix="esvit-") as folder,
        warnings.catch_warnings(),
        job.uploads,
        ThreadPoolExecutor(max(REQUESTS, reading_threads()), thread_name_prefix="prepare") as job.readers,
        ProgressLine(files, unit="images", label="prepare") as job.progress,
    ):
        warnings.filterwarnings("ignore", module="PIL")  # about malformed files; bad files are listed
        job.folder = Path(folder)
        yield


def _scales(opened: Source, plan: IngestPlan, config: DataConfig, base: Base | None) -> dict[str, Scale]:
    """Return the scales of deep pixels: those of the earlier data that are built on, and others from a sample."""
    known = dict(base.manifest.intensity) if base else {}
    found = find_scales(opened, plan.candidates.entries(), config)
    scales = found | known
    if lines := describe_scales(scales, config) if scales or config.intensity != "auto" else []:
        print(*(f"prepare: {line}" for line in lines), sep="\n", flush=True)
        plan.messages.extend(lines)
    return scales
