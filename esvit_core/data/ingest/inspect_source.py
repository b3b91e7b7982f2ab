"""Find out how a source would be understood, from its listing and a sample of its images, in seconds."""

from __future__ import annotations

import heapq
import io
import time
import warnings
from collections import Counter
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from esvit_core.config import DataConfig
from esvit_core.data.ingest.archives import FileReadError, Source, sampling_key
from esvit_core.data.ingest.decode import BadImage, to_stored_image
from esvit_core.data.ingest.entries import Entry
from esvit_core.data.ingest.file_kinds import (
    HEAD,
    UNREADABLE_SUFFIXES,
    describe_ignored,
    ignored_kind,
    is_image_head,
    is_named_as_image,
    suffix,
)
from esvit_core.data.ingest.intensity_scale import describe_scales, find_scales
from esvit_core.data.ingest.layout import LayoutSettings
from esvit_core.data.ingest.optional_formats import why_unreadable
from esvit_core.data.ingest.pixels import PixelSettings
from esvit_core.data.ingest.prefetch import prefetch, reading_threads
from esvit_core.data.ingest.read_image import NotAnImage, read_image_file
from esvit_core.data.ingest.source_reading import Reading, read_names
from esvit_core.data.ingest.source_summary import Counts, count_images, describe_counts, find_oddities
from esvit_core.data.ingest.sources import open_source
from esvit_core.storage import ObjectStore

_SAMPLE = 256  # images that are decoded
_HEADS = 2000  # files without a telling name of which the first bytes are read
_SECONDS = 5.0  # after this time no further image is decoded
_SHOWN = 3  # bad files that are named
_SMALL = 32  # pixels


@dataclass(frozen=True)
class Inspection:
    """How a source would be understood.

    Attributes:
        counts: numbers of images, without those that are known to be bad.
        ignored: numbers of files that are no images, by kind.
        bad: names and reasons of the bad files that the listing and the sample show.
        lines: the same for the user.
    """

    counts: Counts
    ignored: dict[str, int]
    bad: list[tuple[str, str]]
    lines: list[str]

    def summary(self) -> dict[str, object]:
        """Return the figures; ``splits`` has those that the source has."""
        return {
            "images": self.counts.images,
            "labelled": bool(self.counts.classes),
            "classes": len(self.counts.classes),
            "splits": self.counts.splits,
            "ignored": self.ignored,
            "bad": len(self.bad),
        }


def inspect_source(source: str, config: DataConfig, store: ObjectStore | None = None) -> Inspection:
    """List a source and decode a sample of its images.

    Args:
        source: folder, tar, zip, or ``s3://bucket/prefix``.
        config: the ``data`` section of the configuration.
        store: store of an ``s3://`` source; None: the one that ``ESVIT_S3_*`` name.

    Raises:
        UserError: the source does not exist, contains no images, or the settings do not fit it.
    """
    with open_source(source, store) as opened:
        settings = LayoutSettings(config.labels, config.splits, require_train=False)
        reading = read_names(opened.entries, source, config, settings, opened.read)
        images, others, unread = _told_by_head(opened, reading)
        ignored = reading.ignored + Counter(ignored_kind(name) for name in others)
        bad = dict(reading.bad)
        optional = (name for name in reading.readable.some(images).names if suffix(name) in UNREADABLE_SUFFIXES)
        bad |= {name: reason for name in optional if (reason := why_unreadable(suffix(name))) is not None}
        entries = reading.readable.some(_without(images, reading, bad))
        scales = find_scales(opened, entries, config)
        sample = _decode_sample(opened, entries, config, PixelSettings.of(config, scales))
        bad |= sample.bad
        good = reading.layout.assignments.counts(_without(images, reading, bad))
        duplicates, notes = opened.duplicates, opened.notes
    counts, listed = count_images(good), sorted(bad.items())
    lines = [
        *notes,
        *reading.layout.messages,
        *describe_counts(counts),
        *describe_scales(scales, config if scales else DataConfig()),
        *sample.lines(counts.images),
        *find_oddities(good),
    ]
    if unread:
        lines.append(f"odd: files whose names do not tell their type, not read and not counted: {unread:,}")
    if duplicates:
        lines.append(f"odd: entries that a later one with the same name replaces: {duplicates:,}")
    if ignored:
        lines.append(f"ignored: {describe_ignored(ignored)}")
    if listed:
        shown = ", ".join(f"{name} ({reason})" for name, reason in listed[:_SHOWN])
        lines.append(f"bad files: {len(listed):,}: {shown}{', ...' if len(listed) > _SHOWN else ''}")
    return Inspection(counts, dict(sorted(ignored.items())), listed, lines)


def _without(images: np.ndarray, reading: Reading, bad: Collection[str]) -> np.ndarray:
    """Return which of the readable files are images and not bad, (n,) bool."""
    if not bad:
        return images
    return images & np.fromiter((name not in bad for name in reading.readable.names), bool, len(images))


def _told_by_head(opened: Source, reading: Reading) -> tuple[np.ndarray, list[str], int]:
    """Find out about the files whose names do not tell whether they are images.

    Returns:
        Which of the readable files are images, (n,) bool; names of those that are none by their first bytes; and how many
        remain unknown.
    """
    images = np.zeros(len(reading.readable), dtype=bool)
    others: list[str] = []
    unknown = 0
    possible = reading.images | reading.unclear
    for number, entry in enumerate(reading.readable):
        if not possible[number]:
            continue
        if is_named_as_image(entry.name) or suffix(entry.name) in UNREADABLE_SUFFIXES:
            images[number] = True
            continue
        unknown += 1
        if unknown <= _HEADS:
            images[number] = _has_image_head(opened, entry)
            if not images[number]:
                others.append(entry.name)
    return images, others, max(0, unknown - _HEADS)


@dataclass(frozen=True)
class _Sample:
    """Images that were decoded.

    Attributes:
        sizes: width and height of the good ones, pixels.
        bad: names and reasons of the others.
    """

    sizes: list[tuple[int, int]]
    bad: dict[str, str]

    def lines(self, images: int) -> list[str]:
        if not self.sizes:
            return []
        sides = sorted(min(size) for size in self.sizes)
        read = len(self.sizes) + len(self.bad)
        what = "all images" if len(self.sizes) >= images else f"a sample of {read:,} images"
        found = [f"shorter side: {sides[0]:,} to {sides[-1]:,} pixels, median {sides[len(sides) // 2]:,} ({what})"]
        if sides[-1] < _SMALL:
            found.append(f"odd: every image of the sample is smaller than {_SMALL} pixels")
        return found


def _decode_sample(opened: Source, entries: Iterable[Entry], config: DataConfig, pixels: PixelSettings) -> _Sample:
    """Decode images that their names choose, as many as the time allows."""
    chosen = heapq.nsmallest(_SAMPLE, entries, key=sampling_key)
    sizes: list[tuple[int, int]] = []
    bad: dict[str, str] = {}

    def decode(entry: Entry) -> tuple[int, int] | None:
        try:
            data = read_image_file(opened, entry)
            stored = to_stored_image(
                data, config.max_megapixels, None, config.max_aspect_ratio, pixels, suffix(entry.name)
            )
        except NotAnImage:
            return None
        with Image.open(io.BytesIO(stored.data)) as image:
            return image.size

    end = time.monotonic() + _SECONDS
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(reading_threads(), thread_name_prefix="inspect") as pool,
    ):
        warnings.filterwarnings("ignore", module="PIL")  # about malformed files; bad files are listed
        for entry, future in prefetch(pool, decode, chosen, 2 * reading_threads()):
            try:
                if (size := future.result()) is not None:
                    sizes.append(size)
            except (BadImage, FileReadError) as error:
                bad[entry.name] = str(error)
            if time.monotonic() > end:
                break
    return _Sample(sizes, bad)


def _has_image_head(opened: Source, entry: Entry) -> bool:
    try:
        return is_image_head(opened.peek(entry, HEAD))
    except FileReadError:
        return False
