"""The state of a preparation, which its parts share."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from esvit_core.config import DataConfig
from esvit_core.data.ingest.archives import Source
from esvit_core.data.ingest.decode import describe_bad_files
from esvit_core.data.ingest.decoders import Decoders
from esvit_core.data.ingest.incremental import Base
from esvit_core.data.ingest.ingest_plan import IngestPlan
from esvit_core.data.ingest.part_records import PartRecords
from esvit_core.data.ingest.pixels import Scale
from esvit_core.data.ingest.shard_uploads import ShardUploads
from esvit_core.data.shards.manifest import NamedFile, content_addressed_name
from esvit_core.errors import UserError
from esvit_core.monitoring.progress_line import ProgressLine
from esvit_core.storage import ObjectStore, join_uri

_CHECK_BAD_SHARE_AFTER = 100  # bad files; with fewer, a large share could be an accident


@dataclass
class Preparation:
    """State of a preparation.

    Attributes:
        fingerprint: fingerprint of the source.
        scales: values that become black and white in images of more than 8 bits, by the type of their pixels.
        records: what this and former preparations of the same content have finished.
        existing: sizes of the objects below the destination at the start, by name.
        decoders: check and convert images.
        folder: local folder for the shards.
        readers: threads that read files.
        progress: counts the candidates.
        uploads: uploads of finished shards.
        bad: names and reasons of the candidates that are no usable images, so far.
        written: names of the objects that this preparation stored.
    """

    source: str
    fingerprint: str
    opened: Source
    plan: IngestPlan
    config: DataConfig
    store: ObjectStore
    destination: str
    base: Base | None
    scales: dict[str, Scale]
    records: PartRecords
    existing: dict[str, int]
    decoders: Decoders
    folder: Path = field(init=False)
    readers: ThreadPoolExecutor = field(init=False)
    progress: ProgressLine = field(init=False)
    uploads: ShardUploads = field(default_factory=ShardUploads)
    bad: list[tuple[str, str]] = field(default_factory=list)
    written: set[str] = field(default_factory=set)

    def uri(self, name: str) -> str:
        """Return the address of an object below the destination."""
        return join_uri(self.destination, name)

    def class_name(self, label: int) -> str:
        """Return the name of a class; empty for -1."""
        return self.plan.classes[label] if label >= 0 else ""

    def put(self, name: str, data: bytes, uploads: ShardUploads | None = None) -> NamedFile:
        """Store an object under a name that contains the digest of its content.

        Args:
            uploads: store it soon, with others; None: store it now.
        """
        sha256 = hashlib.sha256(data).hexdigest()
        file = NamedFile(name=content_addressed_name(name, sha256), bytes=len(data), sha256=sha256)

        def upload() -> None:
            self.store.put_bytes(self.uri(file.name), data)
            self.written.add(file.name)

        if uploads is None:
            upload()
        else:
            uploads.submit(upload)
        return file

    def put_file(self, name: str, path: Path) -> NamedFile:
        """Store a local file like :meth:`put`."""
        with path.open("rb") as content:
            sha256 = hashlib.file_digest(content, "sha256").hexdigest()
        file = NamedFile(name=content_addressed_name(name, sha256), bytes=path.stat().st_size, sha256=sha256)
        self.store.put_file(self.uri(file.name), path, sha256=sha256)
        self.written.add(file.name)
        return file

    def add_bad(self, name: str, reason: str) -> None:
        """Count a candidate that is no usable image.

        Raises:
            UserError: there are too many of them.
        """
        self.bad.append((name, reason))
        if len(self.bad) >= _CHECK_BAD_SHARE_AFTER:
            check_bad_share(self, self.bad)


def check_bad_share(job: Preparation, bad: list[tuple[str, str]]) -> None:
    """Raise an error if too many files are bad.

    Args:
        job: the preparation.
        bad: names and reasons of the candidates that turned out to be bad.

    Raises:
        UserError: the share of bad files is larger than ``data.max_bad_fraction``.
    """
    plan, limit = job.plan, job.config.max_bad_fraction
    # Files that were not chosen are assumed to be bad as often as those that were.
    likely = len(plan.candidates) + plan.not_chosen
    share = (len(plan.bad) + len(bad) * likely / max(len(plan.candidates), 1)) / len(plan.files)
    if share > limit:
        everything = [*plan.bad, *bad]
        raise UserError(
            f"{job.source}: {len(everything):,} of {len(plan.files) - plan.not_chosen:,} files are bad, more than the "
            f"allowed {100 * limit:g} %: {describe_bad_files(everything)}; remove them, or raise data.max_bad_fraction"
        )
