"""The state of a preparation, and the manifest that is built from it."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from esvit_core.config import DataConfig
from esvit_core.data.ingest.archives import Source
from esvit_core.data.ingest.decode import describe_bad_files, reason_category
from esvit_core.data.ingest.decoders import Decoders
from esvit_core.data.ingest.file_kinds import ignored_kind
from esvit_core.data.ingest.incremental import Base
from esvit_core.data.ingest.ingest_plan import IngestPlan, no_images
from esvit_core.data.ingest.layout import SplitName
from esvit_core.data.ingest.listing import LISTING, File, encode_listing
from esvit_core.data.ingest.near_duplicates import SeenImages
from esvit_core.data.ingest.pixels import Scale
from esvit_core.data.ingest.shard_uploads import ShardUploads
from esvit_core.data.ingest.source_lists import part_of_name
from esvit_core.data.ingest.source_summary import describe_odd_images
from esvit_core.data.ingest.statistics import describe_statistics, image_statistics
from esvit_core.data.ingest.unfinished import FileResult, UnfinishedPreparation
from esvit_core.data.loading.sampler import weighted_length
from esvit_core.data.shards.format import ShardWriter
from esvit_core.data.shards.manifest import BadFiles, Manifest, StoredFile, Weights, content_addressed_name
from esvit_core.errors import UserError
from esvit_core.storage import ObjectStore, join_uri
from esvit_core.storage.json_text import encode_json


@dataclass
class Preparation:
    """State of a preparation.

    Attributes:
        existing: sizes of the objects below the destination at the start, by name.
        known: results of an unfinished preparation, by file name.
        dropped: number of images that were left out because of ``data.drop_duplicates``.
        seen: the stored images, to recognize their duplicates; None: duplicates are kept.
        decoders: check and convert images.
        uploads: uploads of finished shards.
        scales: values that become black and white in images of more than 8 bits, by the type of their pixels.
        pending, pending_bad: files whose record is not stored yet: images in the current shard, and bad files.
        ignored: numbers of files that are no images, by kind.
        written: names of the objects that this preparation stored.
        processed: files with their status, in the order of storage.
    """

    source: str
    opened: Source
    plan: IngestPlan
    config: DataConfig
    store: ObjectStore
    destination: str
    base: Base | None = None
    bad: list[tuple[str, str]] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    processed: dict[str, File] = field(default_factory=dict)
    unfinished: UnfinishedPreparation | None = None
    existing: dict[str, int] = field(default_factory=dict)
    known: dict[str, FileResult] = field(default_factory=dict)
    pending: dict[SplitName, list[FileResult]] = field(default_factory=dict)
    pending_bad: list[File] = field(default_factory=list)
    written: set[str] = field(default_factory=set)
    scales: dict[str, Scale] = field(default_factory=dict)
    reencoded: int = 0
    copies: int = 0
    dropped: int = 0
    seen: SeenImages | None = field(init=False)
    decoders: Decoders = field(init=False)
    uploads: ShardUploads = field(init=False)
    writers: dict[SplitName, ShardWriter] = field(default_factory=dict)
    content: dict[SplitName, hashlib._Hash] = field(default_factory=dict)
    files: dict[str, StoredFile] = field(default_factory=dict)

    def __post_init__(self) -> None:
        drop = self.config.drop_duplicates
        self.seen = None if drop == "none" else SeenImages(near=drop == "near")
        self.uploads = ShardUploads()

    def remember(self, file: File) -> None:
        """Remember a stored image, if later duplicates of it are to be dropped."""
        if self.seen is not None:
            self.seen.add(file.name, file.digest, file.look)

    def uri(self, name: str) -> str:
        """Return the address of an object below the destination."""
        return join_uri(self.destination, name)

    def ignore(self, name: str) -> None:
        """Count a file that is no image."""
        self.ignored[ignored_kind(name)] += 1

    def class_name(self, label: int) -> str:
        """Return the name of a class; empty for -1."""
        return self.plan.classes[label] if label >= 0 else ""


def build_manifest(job: Preparation, fingerprint: str) -> Manifest:
    """Store the indexes and lists that accompany the shards, and build the manifest."""
    if "train" not in job.writers:
        if not job.bad:
            raise no_images(job.source, job.ignored)
        raise UserError(
            f"{job.source}: none of its {len(job.plan.files):,} files is an image to train on: {describe_bad_files(job.bad)}; "
            "expected JPEG, PNG, WebP, GIF, BMP or TIFF files"
        )
    check_bad_share(job)
    splits = {}
    for name, writer in sorted(job.writers.items()):
        index = _put(job, f"index/{name}.npy", writer.index())
        splits[name] = writer.describe(index, len(job.plan.classes))
    if job.config.weights is not None:
        splits["train"] = splits["train"].model_copy(update={"weights": _put_weights(job, job.config.weights)})
    bad = sorted(job.bad)
    lines = (json.dumps({"name": name, "reason": reason}, ensure_ascii=False) + "\n" for name, reason in bad)
    bad_list = _put(job, "bad_files.jsonl", "".join(lines).encode())
    listing = _put(job, LISTING, encode_listing(_files(job)))
    statistics = image_statistics(job.processed.values(), splits["train"].per_class)
    found = _put(job, "statistics.json", encode_json(statistics))
    shards = [shard for split in splits.values() for shard in split.shards]
    before = job.base.manifest if job.base else None
    prints = "".join(f"{name} {digest.hexdigest()}\n" for name, digest in sorted(job.content.items()))
    reasons = dict(Counter(reason_category(reason) for _, reason in bad).most_common())
    return Manifest(
        source=job.source,
        source_fingerprint=fingerprint,
        fingerprint=hashlib.sha256(prints.encode()).hexdigest(),
        settings=job.config.identity_values(),
        classes=job.plan.classes,
        splits=splits,
        bytes=sum(shard.bytes for shard in shards),
        considered=len(job.plan.files) - job.plan.not_chosen - (job.ignored.total() - sum(job.plan.ignored.values())),
        bad=BadFiles(count=len(bad), reasons=reasons, list=bad_list),
        reading=[
            *job.plan.messages,
            *describe_odd_images(job.processed.values()),
            *describe_statistics(statistics),
        ],
        statistics=found,
        dropped=job.dropped,
        intensity=job.scales,
        ignored=job.ignored.total(),
        ignored_kinds=dict(sorted(job.ignored.items())),
        duplicates=job.opened.duplicates,
        copies=job.copies + (before.copies if before else 0),
        not_chosen=job.plan.not_chosen,
        reencoded=job.reencoded + (before.reencoded if before else 0),
        files=job.files | {s.name: StoredFile(bytes=s.bytes, sha256=s.sha256) for s in shards if not s.is_external},
        listing=listing,
        base=job.base.prefix if job.base else None,
    )


def _put_weights(job: Preparation, weights: Sequence[float]) -> Weights:
    """Store the weights of the training images, which are those of their sources."""
    names = [file.name for file in job.processed.values() if file.status == "train"]
    parts = [part_of_name(name) if len(weights) > 1 else 1 for name in names]
    found = np.array([weights[part - 1] for part in parts], dtype=np.float32)
    content = io.BytesIO()
    np.save(content, found)
    file = _put(job, "index/train-weights.npy", content.getvalue())
    return Weights(file=file, epoch_samples=weighted_length(found))


def _files(job: Preparation) -> Iterator[File]:
    """Yield every file with its status: stored files in the order of the indexes, then the others."""
    yield from job.processed.values()
    yield from job.plan.known
    for entry, reason in job.plan.skipped:
        yield File(entry.name, entry.size, entry.stamp, "skipped", reason=reason)


def _put(job: Preparation, name: str, data: bytes) -> str:
    """Store an object under a name that contains the digest of its content; return that name."""
    file = StoredFile(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    name = content_addressed_name(name, file.sha256)
    job.store.put_bytes(job.uri(name), data)
    job.files[name] = file
    job.written.add(name)
    return name


def check_bad_share(job: Preparation) -> None:
    """Raise an error if too many files are bad.

    Raises:
        UserError: the share of bad files is larger than ``data.max_bad_fraction``.
    """
    plan, limit = job.plan, job.config.max_bad_fraction
    # Files that were not chosen are assumed to be bad as often as those that were.
    read_bad = len(job.bad) - len(plan.bad)
    likely = len(plan.candidates) + plan.not_chosen
    share = (len(plan.bad) + read_bad * likely / max(len(plan.candidates), 1)) / len(plan.files)
    if share > limit:
        raise UserError(
            f"{job.source}: {len(job.bad):,} of {len(plan.files) - plan.not_chosen:,} files are bad, more than the "
            f"allowed {100 * limit:g} %: {describe_bad_files(job.bad)}; remove them, or raise data.max_bad_fraction"
        )
