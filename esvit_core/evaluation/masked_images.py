"""Images with a mask of classes, in the layouts in which segmentation sets are distributed."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from PIL import Image

from esvit_core.data.ingest.sources import open_source
from esvit_core.data.ingest.split import hold_out
from esvit_core.errors import UserError
from esvit_core.storage import ObjectStore

IGNORED = 255
_MASK_FOLDERS = ("masks", "mask", "SegmentationClass", "annotations", "trimaps", "segmim", "labels")
_IMAGE_SUFFIXES, _MASK_SUFFIXES = (".jpg", ".jpeg", ".png"), (".png", ".jpg")
_TEST_FOLDERS = ("val", "validation", "test", "testing")
_TEST_SHARE = 0.2


@dataclass(frozen=True)
class MaskedImage:
    """An image and its mask, resized to the input of the network.

    Attributes:
        pixels: (S, S, 3) uint8.
        mask: class of each pixel, (S, S) uint8; 255 is ignored.
    """

    pixels: np.ndarray
    mask: np.ndarray


def find_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Pair images with their masks: the mask has the name of the image and lies in a folder such as ``masks``.

    This covers a folder ``images`` beside ``masks``, PASCAL VOC (``JPEGImages`` and ``SegmentationClass``), ADE20K (``images``
    and ``annotations``), Oxford-IIIT Pets (``annotations/trimaps``) and Oxford Flowers (``image_00001`` and
    ``segmim_00001``).

    Returns:
        Image and mask, sorted.
    """
    masks: dict[str, str] = {}
    images: dict[str, str] = {}
    for name in sorted(names):
        path = PurePosixPath(name)
        if path.name.startswith("."):
            continue
        stem = path.stem.removeprefix("segmim_").removeprefix("image_").removesuffix("_mask")
        if set(path.parts[:-1]) & set(_MASK_FOLDERS):
            if path.suffix.lower() in _MASK_SUFFIXES:
                masks.setdefault(stem, name)
        elif path.suffix.lower() in _IMAGE_SUFFIXES:
            images.setdefault(stem, name)
    return [(image, masks[stem]) for stem, image in sorted(images.items()) if stem in masks]


def read_mask(data: bytes, name: str) -> np.ndarray:
    """Decode a mask, (H, W) uint8: a palette or gray image holds the classes; blue is the background of a color image.

    Raises:
        UserError: the file is not an image.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode in ("P", "L", "1"):
                return np.array(image if image.mode != "1" else image.convert("L")).clip(0, 255).astype(np.uint8)
            colors = np.asarray(image.convert("RGB")).astype(np.int16)
    except OSError as error:
        raise UserError(f"mask {name}: it cannot be decoded ({error}); copy it again") from None
    # Oxford Flowers: a color JPEG whose background is blue.
    blue = (colors[..., 2] > 150) & (colors[..., 0] < 100) & (colors[..., 1] < 100)
    return (~blue).astype(np.uint8)


def read_masked_images(
    source: str, store: ObjectStore | None, side: int
) -> tuple[list[MaskedImage], list[MaskedImage]]:
    """Read the images that have a mask, to fit and to measure.

    Images in a folder such as ``val`` are for measuring; without one, a fifth of the images.

    Args:
        source: folder, tar, zip, or ``s3://bucket/prefix``.
        store: store of an ``s3://`` source.
        side: side of the images and masks, which are resized to a square, pixels.

    Raises:
        UserError: no image has a mask, or a file cannot be decoded.
    """
    with open_source(source, store) as opened:
        entries = {entry.name: entry for entry in opened.entries}
        pairs = find_pairs(list(entries))
        if not pairs:
            raise UserError(
                f"evaluation.segmentation {source}: no image has a mask; expected folders such as images and masks with "
                "files of the same names"
            )
        held = {n for n, (image, _) in enumerate(pairs) if set(PurePosixPath(image).parts) & set(_TEST_FOLDERS)}
        held = held or hold_out([image for image, _ in pairs], [None] * len(pairs), _TEST_SHARE)
        found: tuple[list[MaskedImage], list[MaskedImage]] = ([], [])
        for number, (image, mask) in enumerate(pairs):
            classes = Image.fromarray(read_mask(opened.read(entries[mask]), mask))
            try:
                with Image.open(io.BytesIO(opened.read(entries[image]))) as decoded:
                    pixels = decoded.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
            except OSError as error:
                raise UserError(f"image {image}: it cannot be decoded ({error}); copy it again") from None
            resized = np.asarray(classes.resize((side, side), Image.Resampling.NEAREST))
            found[number in held].append(MaskedImage(np.asarray(pixels), resized))
    return found
