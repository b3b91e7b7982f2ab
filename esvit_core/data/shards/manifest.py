"""What prepared data consists of: the manifest that is written last and read first."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from esvit_core.data.ingest.sources import check_source, source_fingerprint
from esvit_core.errors import UserError
from esvit_core.storage import NotFound, ObjectStore, join_uri
from esvit_core.storage.json_text import encode_json
from esvit_core.storage.uri import SCHEME

__all__ = ["MANIFEST", "BadFiles", "Manifest", "Shard", "Split", "check_source", "source_fingerprint"]

MANIFEST = "manifest.json"
FORMAT: Literal["esvit-data/1"] = "esvit-data/1"


def named_by_content(name: str, sha256: str) -> str:
    """``index/train-0123456789abcdef.npy`` of ``index/train.npy``: an object's name with the digest of its content."""
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
        name: relative to the manifest's folder, or the whole ``s3://`` address of a shard of earlier data.
        samples: images of it that belong to the data; one that is gone from the source may still lie in the tar.
    """

    name: str
    samples: int = Field(gt=0)

    @property
    def is_elsewhere(self) -> bool:
        """Whether it belongs to other data, which have to stay as long as these."""
        return self.name.startswith(SCHEME)

    def address(self, prefix: str) -> str:
        """Where it lies, ``prefix`` being the manifest's folder."""
        return self.name if self.is_elsewhere else join_uri(prefix, self.name)


class Split(_Part):
    """The images of one split in the order of their numbers.

    Attributes:
        samples: number of images.
        labelled: whether every image has a class.
        shards: where they are.
        index: object that says where in the shards each image lies (see :mod:`esvit_core.data.shards.format`).
        per_class: images of each class, in the order of ``Manifest.classes``.
    """

    samples: int = Field(ge=0)
    labelled: bool
    shards: list[Shard]
    index: str
    per_class: list[int]


class BadFiles(_Part):
    """Files of the source that were left out.

    Attributes:
        count: how many.
        reasons: how many for which reason.
        list: object with a JSON line for each, ``name`` and ``reason``.
    """

    count: int = Field(ge=0)
    reasons: dict[str, int]
    list: str


class Manifest(_Part):
    """Prepared data.

    Attributes:
        format: of this file.
        source: where the images came from, as the user wrote it.
        source_fingerprint: of the source's listing when it was read, see :func:`source_fingerprint`.
        fingerprint: of the content: SHA-256 over split, class, number and stored bytes of every image; of those that
            are taken over, the bytes in which they were found.
        settings: the data section of the configuration that it was made with, as far as it determines the result.
        classes: names; a label is a place in this list. Empty where there are no labels.
        splits: ``train``, ``val`` and, where the source has all three, ``test``.
        bytes: of all shards together, those of earlier data too.
        considered: files that could have been images.
        bad: those that were left out.
        ignored: files passed over as no one's images (``.DS_Store``, ``Thumbs.db``, ...).
        duplicates: entries of an archive that a later one of the same name replaces.
        copies: images that are byte for byte the same as another one; they are kept.
        not_chosen: left out because of ``data.max_images``.
        reencoded: images stored in another form than they were found in (turned, shrunk, made RGB, ...).
        files: every object below the manifest's folder. Their names contain digests of their content: preparations that
            are under way at once replace nothing of each other.
        listing: the one that lists the files of the source, see :mod:`esvit_core.data.ingest.listing`; None: there is none.
        base: folder of the earlier data that these build on; None: they stand alone.
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
    duplicates: int = 0
    copies: int = 0
    not_chosen: int = 0
    reencoded: int = 0
    files: dict[str, StoredFile]
    listing: str | None = None
    base: str | None = None

    @property
    def samples(self) -> int:
        """Images of all splits together."""
        return sum(split.samples for split in self.splits.values())

    @classmethod
    def read(cls, store: ObjectStore, prefix: str) -> Self:
        """The manifest of the prepared data at ``prefix``.

        Raises:
            NotFound: no data were prepared there.
            UserError: what is there is not a manifest of prepared data.
        """
        uri = join_uri(prefix, MANIFEST)
        try:
            values = store.get_json(uri)
        except NotFound:
            raise NotFound(f"{prefix}: no prepared data is there; run the step prepare_data first") from None
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise UserError(
                f"{uri}: not a manifest of prepared data ({where}: {first['msg']}); prepare the data again elsewhere"
            ) from None

    def publish(self, store: ObjectStore, prefix: str) -> bool:
        """Store the manifest, after everything that it names; False if there is one already."""
        return store.put_if_absent(join_uri(prefix, MANIFEST), encode_json(self.model_dump(mode="json")))

    def describe(self) -> str:
        """The data in one line."""
        splits = ", ".join(f"{split.samples:,} {name}" for name, split in self.splits.items())
        classes = f" in {len(self.classes):,} classes" if self.classes else ", no labels"
        parts = [f"{self.samples:,} images{classes} ({splits}), {self.bytes / 2**20:,.1f} MiB"]
        if bad := self.bad.count:
            parts.append(f"{bad:,} bad {'file' if bad == 1 else 'files'} left out")
        if self.not_chosen:
            parts.append(f"{self.not_chosen:,} not chosen")
        return "; ".join(parts)

    def summary(self) -> dict[str, Any]:
        """The figures that stand for the data in an artifact's metadata."""
        return {
            "images": self.samples,
            **{name: split.samples for name, split in self.splits.items()},
            "classes": len(self.classes),
            "bytes": self.bytes,
            "bad_files": self.bad.count,
            "fingerprint": self.fingerprint,
        }
