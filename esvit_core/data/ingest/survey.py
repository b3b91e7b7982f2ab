"""Count the images of a source and look at the sizes of a few, to choose a recipe: in seconds, and always the same."""

from __future__ import annotations

import heapq
import io
import statistics
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from PIL import Image

from esvit_core.config import DataConfig
from esvit_core.data.ingest.archives import FileReadError, Source, sampling_key
from esvit_core.data.ingest.entries import Entry
from esvit_core.data.ingest.layout import LayoutSettings
from esvit_core.data.ingest.source_reading import read_names
from esvit_core.data.ingest.source_summary import count_images
from esvit_core.data.ingest.sources import open_source
from esvit_core.storage import ObjectStore

SAMPLE = 64  # images of which the size is read
_HEAD = 64 * 2**10  # bytes; nearly every format states its size in them
_USUAL_SIDE = 256  # pixels; taken if no size could be read


@dataclass(frozen=True)
class Survey:
    """What a source contains, as far as its listing and a few headers show.

    Attributes:
        images: number of images, without those that the layout leaves out.
        held_out: number of images that the source holds out itself; None: it does not.
        classes: number of classes.
        short_side: median of the shorter sides of a sample, pixels.
    """

    images: int
    held_out: int | None
    classes: int
    short_side: int


def survey_source(source: str, config: DataConfig, store: ObjectStore | None = None) -> Survey:
    """List a source and read the headers of a sample of its images, which their names choose.

    Args:
        source: folder, tar, zip, or ``s3://bucket/prefix``.
        config: the ``data`` section of the configuration.
        store: store of an ``s3://`` source; None: the one that ``ESVIT_S3_*`` name.

    Raises:
        UserError: the source does not exist, contains no images, or the settings do not fit it.
    """
    with open_source(source, store) as opened:
        settings = LayoutSettings(config.labels, config.splits)
        reading = read_names(opened.entries, source, config, settings, opened.read)
        found = reading.layout.assignments.counts(reading.likely)
        side = _short_side(opened, reading.readable.some(reading.likely))
    images = sum(count for each, count in found.items() if each.split != "test")
    held_out = sum(count for each, count in found.items() if each.split == "val")
    return Survey(images, held_out or None, len(count_images(found).classes), side)


def _short_side(opened: Source, entries: Iterable[Entry]) -> int:
    """Return the median of the shorter sides of a sample, pixels."""
    chosen = heapq.nsmallest(SAMPLE, entries, key=sampling_key)
    sides = [side for entry in chosen if (side := _side(opened, entry)) is not None]
    return int(statistics.median_low(sides)) if sides else _USUAL_SIDE


def _side(opened: Source, entry: Entry) -> int | None:
    """Return the shorter side of an image, pixels; None if it cannot be read."""
    for read in (lambda: opened.peek(entry, _HEAD), lambda: opened.read(entry)):
        try:
            with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(read())) as image:
                return min(image.size)
        except FileReadError:
            return None
        except Exception:  # decoders raise anything; the size may follow later in the file
            continue
    return None
