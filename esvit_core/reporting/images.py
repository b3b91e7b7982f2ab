"""Encode images as data URIs, small enough for a page."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

_SHARP = 64  # images up to this size, pixels, are encoded without loss
_LARGEST = 192  # default size of a thumbnail, pixels
_HEAVY = 350_000  # PNG files above this size, bytes, are re-encoded with loss
_WIDEST = 1600  # pixels


def thumbnail(pixels: np.ndarray, largest: int = _LARGEST) -> str:
    """Encode an image or crop (H, W, 3) uint8 as a data URI, at most ``largest`` pixels on its longer side."""
    image = Image.fromarray(pixels)
    image.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if max(image.size) <= _SHARP:
        image.save(buffer, format="PNG", optimize=True)
        return data_uri(buffer.getvalue(), "png")
    image.save(buffer, format="JPEG", quality=85)
    return data_uri(buffer.getvalue(), "jpeg")


def figure_uri(png: bytes) -> tuple[str, int, int]:
    """Encode a figure as a data URI, with loss if it is large; return it with its width and height in pixels."""
    with Image.open(io.BytesIO(png)) as image:
        width, height = image.size
        if len(png) <= _HEAVY:
            return data_uri(png, "png"), width, height
        image.thumbnail((_WIDEST, 8 * _WIDEST), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, format="WEBP", quality=86, method=4)  # unlike JPEG, keeps transparency
        return data_uri(buffer.getvalue(), "webp"), *image.size


def data_uri(data: bytes, kind: str) -> str:
    """Return ``data:image/<kind>;base64,...``."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
