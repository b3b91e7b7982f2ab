"""The manifest of prepared data, which is written last and read first."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from esvit_core.errors import UserError
from esvit_core.storage import NotFound, ObjectStore, join_uri
from esvit_core.storage.json_text import encode_json
from esvit_core.storage.uri import SCHEME

MANIFEST = "manifest.json"
PARTS = "parts"  # folder of the parts below that of the manifest
FORMAT: Literal["esvit-data/1"] = "esvit-data/1"


def content_addressed_name(name: str, sha256: str) -> str:
    """Add the digest of an object's content to its name: ``index/train.npy`` -> ``index/train-0123456789abcdef.npy``."""
    folder, slash, last = name.rpartition("/")
    stem, dot, suffixes = last.partition(".")
    return f"{folder}{slash}{stem}-{sha256[:16]}{dot}{suffixes}"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StoredFile(_Part):
    """Size and digest of a stored object."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Shard(StoredFile):
    """A tar of samples.

    Attributes:
        name: relative to the manifest's folder, or the full ``s3://`` address of a shard of earlier data.
        samples: number of its images that belong to the data; the tar may contain others, which were removed from the
            source.
    """

    name: str
    samples: int = Field(gt=0)

    @property
    def is_external(self) -> bool:
        """Whether it belongs to other data, which must be kept as long as these."""
        return self.name.startswith(SCHEME)

    def address(self, prefix: str) -> str:
        """Return its full address; ``prefix`` is the manifest's folder."""
        return self.name if self.is_external else join_uri(prefix, self.name)


class NamedFile(StoredFile):
    """A stored object with its name below the folder of the data."""

    name: str


class Part(_Part):
    """Images of a split that were prepared together; stored as an object of its own below ``parts/``.

    Attributes:
        shards: the shards that contain the images.
        index: object with the position of each image in the shards (see :mod:`esvit_core.data.shards.format`).
        listing: object that lists the files of the source that were read for the part, with their status, see
            :mod:`esvit_core.data.ingest.listing`.
    """

    shards: list[Shard]
    index: NamedFile
    listing: NamedFile

    def objects(self) -> dict[str, StoredFile]:
        """Return the objects of the part that belong to the data of its folder, by name."""
        own = {shard.name: shard for shard in self.shards if not shard.is_external}
        return {**own, self.index.name: self.index, self.listing.name: self.listing}


class PartReference(NamedFile):
    """Reference to a part; its name is the full ``s3://`` address if the part belongs to earlier data.

    Attributes:
        shard_samples: number of the part's images in each of its shards.
        content: digest of the images, their classes and their order.
    """

    shard_samples: list[int]
    content: str

    @property
    def is_external(self) -> bool:
        """Whether it belongs to other data, which must be kept as long as these."""
        return self.name.startswith(SCHEME)

    @property
    def samples(self) -> int:
        """Number of images."""
        return sum(self.shard_samples)

    def folder(self, prefix: str) -> str:
        """Return the folder of the data that the part belongs to; ``prefix`` is the manifest's folder."""
        return self.name.rpartition(f"/{PARTS}/")[0] if self.is_external else prefix

    def address(self, prefix: str) -> str:
        """Return its full address; ``prefix`` is the manifest's folder."""
        return self.name if self.is_external else join_uri(prefix, self.name)

    def located_in(self, prefix: str) -> Self:
        """Return the reference for other data; ``prefix`` is the folder of the manifest that has it now."""
        return self.model_copy(update={"name": self.address(prefix)})


class Weights(_Part):
    """How often the images of a split occur in an epoch.

    Attributes:
        file: object with the weight of each image, (N,) float32.
        epoch_samples: number of images in an epoch.
    """

    file: str
    epoch_samples: int = Field(gt=0)


class Split(_Part):
    """The images of one split, in the order of their numbers.

    Attributes:
        samples: number of images.
        labeled: whether every image has a class.
        parts: the parts that the images are divided into.
        per_class: number of images of each class, in the order of ``Manifest.classes``.
        weights: weights of the images in training; None: an epoch takes each once.
    """

    samples: int = Field(ge=0)
    labeled: bool
    parts: list[PartReference]
    per_class: list[int]
    weights: Weights | None = None

    @property
    def epoch_samples(self) -> int:
        """Number of images in an epoch of training."""
        return self.samples if self.weights is None else self.weights.epoch_samples

    @property
    def shard_samples(self) -> list[int]:
        """Number of images in each shard."""
        return [count for part in self.parts for count in part.shard_samples]

    @property
    def content(self) -> str:
        """Digest of the images, their classes and their order."""
        return hashlib.sha256("".join(part.content for part in self.parts).encode()).hexdigest()


class BadFiles(_Part):
    """Files of the source that are not usable images.

    Attributes:
        count: number of files.
        reasons: number of files for each reason.
        list: object with one JSON line per file, ``name`` and ``reason``.
    """

    count: int = Field(ge=0)
    reasons: dict[str, int]
    list: str


class Manifest(_Part):
    """Prepared data.

    Attributes:
        format: format of this file.
        source: source of the images, as the user wrote it.
        source_fingerprint: fingerprint of the source when it was read, see
            :func:`esvit_core.data.ingest.sources.source_fingerprint`.
        fingerprint: fingerprint of the content: split, class and stored bytes of every image, in their order.
        settings: the ``data`` section of the configuration, as far as it determines the result.
        classes: names of the classes; a label is an index into this list. Empty if there are no labels.
        splits: ``train``, ``val`` and, if the source has all three, ``test``.
        bytes: size of all shards, including those of earlier data.
        considered: number of files that could have been images.
        bad: files that are not usable images.
        ignored: number of files that are no images (annotations, videos, ``.DS_Store``, ...).
        ignored_kinds: the same by suffix, see :func:`esvit_core.data.ingest.file_kinds.ignored_kind`.
        intensity: values that become black and white in images of more than 8 bits, by the type of their pixels; empty if
            there are none, or if ``data.intensity`` sets them.
        reading: how the folders of the source were understood, in lines.
        duplicates: number of archive entries that a later entry of the same name replaces.
        copies: number of images that are byte-for-byte identical to another one; they are kept.
        dropped: number of duplicates that were left out: because of ``data.drop_duplicates``, or because a copy of a training
            image cannot be held out.
        not_chosen: number of images left out because of ``data.max_images``.
        reencoded: number of images stored in a form other than the original (rotated, shrunk, converted to RGB, ...).
        files: the objects that the manifest names itself, by name; those of the parts are named there. Names contain digests of
            the content, so concurrent preparations do not overwrite each other's objects.
        listing: object that lists the files of the source that belong to no part, such as those that were not chosen.
        statistics: object with the statistics of the images, see :mod:`esvit_core.data.ingest.statistics`; None: there is none.
        base: folder of the earlier data that these build on; None: there are none.
    """

    format: Literal["esvit-data/1"] = FORMAT
    source: str
    source_fingerprint: str
    fingerprint: str
    settings: dict[str, Any]
    classes: list[str]
    splits: dict[Literal["train", "val", "test"], Split]
    bytes: int
    considered: int
    bad: BadFiles
    ignored: int = 0
    ignored_kinds: dict[str, int] = {}
    intensity: dict[str, tuple[float, float]] = {}
    reading: list[str] = []
    duplicates: int = 0
    copies: int = 0
    dropped: int = 0
    not_chosen: int = 0
    reencoded: int = 0
    files: dict[str, StoredFile]
    listing: str
    statistics: str | None = None
    base: str | None = None

    @property
    def parts(self) -> Iterator[PartReference]:
        """The parts of all splits."""
        return (part for split in self.splits.values() for part in split.parts)

    @property
    def shard_count(self) -> int:
        """Number of shards of all splits."""
        return sum(len(part.shard_samples) for part in self.parts)

    @property
    def samples(self) -> int:
        """Number of images in all splits."""
        return sum(split.samples for split in self.splits.values())

    @classmethod
    def read(cls, store: ObjectStore, prefix: str) -> Self:
        """Read the manifest of the prepared data at ``prefix``.

        Raises:
            NotFound: there are no prepared data at ``prefix``.
            UserError: the object is not a manifest of prepared data.
        """
        uri = join_uri(prefix, MANIFEST)
        try:
            values = store.get_json(uri)
        except NotFound:
            raise NotFound(f"{prefix}: no prepared data here; run the step prepare_data first") from None
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise UserError(
                f"{uri}: not a manifest of prepared data ({where}: {first['msg']}); prepare the data again elsewhere"
            ) from None

    def publish(self, store: ObjectStore, prefix: str) -> bool:
        """Store the manifest, after all objects that it names; return False if there is already one."""
        return store.put_if_absent(join_uri(prefix, MANIFEST), encode_json(self.model_dump(mode="json")))

    def describe(self) -> str:
        """Describe the data in one line."""
        splits = ", ".join(f"{split.samples:,} {name}" for name, split in self.splits.items())
        classes = f" in {len(self.classes):,} classes" if self.classes else ", no labels"
        parts = [f"{self.samples:,} images{classes} ({splits}), {self.bytes / 2**20:,.1f} MiB"]
        if bad := self.bad.count:
            parts.append(f"{bad:,} bad {'file' if bad == 1 else 'files'} left out")
        if self.ignored:
            parts.append(f"{self.ignored:,} other {'file' if self.ignored == 1 else 'files'} ignored")
        if self.dropped:
            parts.append(f"{self.dropped:,} {'duplicate' if self.dropped == 1 else 'duplicates'} dropped")
        if self.not_chosen:
            parts.append(f"{self.not_chosen:,} not chosen")
        return "; ".join(parts)

    def summary(self) -> dict[str, Any]:
        """Return the figures for an artifact's metadata."""
        return {
            "images": self.samples,
            **{name: split.samples for name, split in self.splits.items()},
            "classes": len(self.classes),
            "bytes": self.bytes,
            "bad_files": self.bad.count,
            "fingerprint": self.fingerprint,
        }
