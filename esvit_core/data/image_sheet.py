"""A contact sheet of the augmentation: images of a source, each beside its crops as the training sees them."""

from __future__ import annotations

import heapq
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from esvit_core.config import Config
from esvit_core.data.ingest.archives import FileReadError, Source, sampling_key
from esvit_core.data.ingest.decode import BadImage, to_stored_image
from esvit_core.data.ingest.entries import Entry
from esvit_core.data.ingest.file_kinds import suffix
from esvit_core.data.ingest.intensity_scale import find_scales
from esvit_core.data.ingest.layout import LayoutSettings
from esvit_core.data.ingest.pixels import PixelSettings
from esvit_core.data.ingest.read_image import NotAnImage, read_image_file
from esvit_core.data.ingest.source_reading import read_names
from esvit_core.data.ingest.sources import open_source
from esvit_core.data.loading.augment import MultiCrop, sample_rng
from esvit_core.data.shards.reader import decode_image
from esvit_core.errors import UserError
from esvit_core.storage import ObjectStore

CELL = 96  # side of an image on the sheet, pixels
_GAP = 4
_TITLE = 16  # height of the line of titles, pixels


def augmentation_sheet(source: str, config: Config, images: int = 8, store: ObjectStore | None = None) -> Image.Image:
    """Draw a row for each of a few images: the image, its global crops, its local crops.

    Args:
        source: folder, tar, zip, or ``s3://bucket/prefix``.
        config: configuration; its sections ``data`` and ``augment`` determine the crops.
        images: number of images, which their names choose.
        store: store of an ``s3://`` source; None: the one that ``ESVIT_S3_*`` name.

    Raises:
        UserError: the source cannot be read, or none of the images can be decoded.
    """
    multicrop = MultiCrop(config.augment)
    rows = []
    for number, pixels in enumerate(sample_images(source, config, images, store)):
        crops = multicrop(pixels, sample_rng(config.seed, 0, number))
        rows.append([pixels, *(_levels(crop, config) for crop in crops)])
    if not rows:
        raise UserError(f"{source}: none of the images could be decoded; `esvit data inspect` says why")
    number_global = config.augment.global_crops.number
    titles = ["image", *(f"{crop.shape[0]} px" for crop in rows[0][1:])]
    titles[1] = f"global, {titles[1]}"
    if len(titles) > 1 + number_global:
        titles[1 + number_global] = f"local, {titles[1 + number_global]}"
    return draw_sheet(rows, titles)


def sample_images(source: str, config: Config, images: int, store: ObjectStore | None = None) -> Iterator[np.ndarray]:
    """Yield images of a source as they are stored for training, (H, W, 3) uint8; their names choose them.

    Raises:
        UserError: the source cannot be read.
    """
    data, found = config.data, 0
    with open_source(source, store) as opened, warnings.catch_warnings(action="ignore"):
        settings = LayoutSettings(data.labels, data.splits, require_train=False)
        reading = read_names(opened.entries, source, data, settings, opened.read)
        candidates = reading.readable.some(reading.likely)
        settings_of_pixels = PixelSettings.of(data, find_scales(opened, candidates, data))
        for entry in heapq.nsmallest(4 * images, candidates, key=sampling_key):
            if found < images and (pixels := _decode(opened, entry, config, settings_of_pixels)) is not None:
                found += 1
                yield pixels


def draw_sheet(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str] = ()) -> Image.Image:
    """Arrange images in rows, each shrunk or enlarged to a cell.

    Args:
        rows: images (H, W, 3) uint8.
        titles: of the columns.
    """
    columns = max(map(len, rows))
    top = _TITLE if titles else 0
    size = (columns * (CELL + _GAP) + _GAP, top + len(rows) * (CELL + _GAP) + _GAP)
    sheet = Image.new("RGB", size, "white")
    text = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        text.text((_GAP + column * (CELL + _GAP), 2), title, fill="black")
    for row, images in enumerate(rows):
        for column, pixels in enumerate(images):
            image = Image.fromarray(pixels)
            scale = CELL / max(image.size)
            sides = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            place = (_GAP + column * (CELL + _GAP), top + _GAP + row * (CELL + _GAP))
            sheet.paste(image.resize(sides, Image.Resampling.BICUBIC), place)
    return sheet


def save_sheet(sheet: Image.Image, out: Path) -> None:
    """Write a sheet as a file whose suffix names the format.

    Raises:
        UserError: the suffix names no image format, or the file cannot be written.
    """
    try:
        sheet.save(out)
    except ValueError:
        raise UserError(f"--out {out}: unknown kind of image; name a .png or .jpg file") from None
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); name another file") from None


def _decode(opened: Source, entry: Entry, config: Config, pixels: PixelSettings) -> np.ndarray | None:
    data = config.data
    try:
        content = read_image_file(opened, entry)
        stored = to_stored_image(
            content,
            data.max_megapixels,
            data.store_short_side,
            data.max_aspect_ratio,
            pixels,
            suffix(entry.name),
        )
    except (NotAnImage, BadImage, FileReadError):
        return None
    return decode_image(stored.data)


def _levels(crop: Tensor, config: Config) -> np.ndarray:
    """Return a normalized crop (3, S, S) as levels (S, S, 3) uint8."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.augment.mean, config.augment.std))
    levels = ((crop * std + mean) * 255).round().clamp(0, 255)
    return levels.to(torch.uint8).permute(1, 2, 0).numpy()
