"""Find the scale of images of more than 8 bits from a sample: one for a whole source, never one per image."""

from __future__ import annotations

import heapq
import itertools
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from esvit_core.config import DataConfig
from esvit_core.data.ingest.archives import FileReadError, Source, sampling_key
from esvit_core.data.ingest.decode import BadImage, deep_span
from esvit_core.data.ingest.entries import Entry
from esvit_core.data.ingest.file_kinds import suffix
from esvit_core.data.ingest.pixels import PixelSettings, Scale, usual_scale
from esvit_core.data.ingest.prefetch import prefetch, reading_threads
from esvit_core.data.ingest.read_image import NotAnImage, read_image_file

_SAMPLE = 256  # files that may be deep
_HEAD = 32  # bytes of a PNG that show its depth
_MAYBE_DEEP = frozenset({".tif", ".tiff", ".png", ".ppm", ".pgm", ".pnm", ".jp2", ".j2k", ".dcm", ".dicom", ""})
_DECODED = 64  # images of more than 8 bits that are enough
_BYTES = 4 * 2**30  # that are read at most; of a PNG of 8 bits only the head is read


def find_scales(opened: Source, entries: Iterable[Entry], config: DataConfig) -> dict[str, Scale]:
    """Return the scale of each type of pixels in a source, by a sample that the names of the files choose.

    Args:
        opened: the source.
        entries: its images.
        config: the ``data`` section of the configuration.

    Returns:
        The values that become black and white, by type; empty if no image of the sample has more than 8 bits, or if
        ``data.intensity`` sets the scale.
    """
    if config.intensity != "auto":
        return {}
    maybe = (entry for entry in entries if suffix(entry.name) in _MAYBE_DEEP and entry.problem is None)
    sample = heapq.nsmallest(_SAMPLE, maybe, key=sampling_key)
    if not sample:
        return {}
    read_so_far = itertools.accumulate(0 if suffix(entry.name) == ".png" else entry.size for entry in sample)
    sample = [entry for entry, size in zip(sample, read_so_far, strict=True) if size <= _BYTES] or sample[:1]
    spans: dict[str, list[Scale]] = defaultdict(list)

    def read(entry: Entry) -> tuple[str, Scale] | None:
        try:
            if suffix(entry.name) == ".png" and opened.peek(entry, _HEAD)[24:25] != b"\x10":
                return None
            return deep_span(read_image_file(opened, entry), config.max_megapixels, PixelSettings.of(config))
        except (BadImage, FileReadError, NotAnImage):
            return None  # it is counted when it is prepared

    with warnings.catch_warnings(), ThreadPoolExecutor(reading_threads(), thread_name_prefix="intensity") as pool:
        warnings.filterwarnings("ignore", module="PIL")
        for _, future in prefetch(pool, read, sample, 2 * reading_threads()):
            if (found := future.result()) is not None:
                spans[found[0]].append(found[1])
            if sum(map(len, spans.values())) >= _DECODED:
                break
    return {
        kind: usual_scale(kind, min(low for low, _ in found), max(high for _, high in found))
        for kind, found in sorted(spans.items())
    }


def describe_scales(scales: Mapping[str, Scale], config: DataConfig) -> list[str]:
    """Say in lines how deep pixels are scaled."""
    if config.intensity != "auto":
        return [f"intensity: {config.intensity} becomes black to white in images of more than 8 bits (data.intensity)"]
    return [
        f"intensity: {kind} images are scaled from {low:g}..{high:g}, which a sample shows; data.intensity=LOW..HIGH overrides it"
        for kind, (low, high) in scales.items()
    ]
