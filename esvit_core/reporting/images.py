"""Images as data URIs, small enough for a page."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

_SHARP = 64  # images up to this side stay exact; larger ones are photographs on their way to a small place
_LARGEST = 192
_HEAVY = 350_000  # bytes of a PNG from which a lossy form is worth its losses
_WIDEST = 1600


def thumbnail(pixels: np.ndarray, largest: int = _LARGEST) -> str:
    """An image or crop (H, W, 3) uint8 as a data URI, at most ``largest`` pixels on its longer side."""
    image = Image.fromarray(pixels)
    image.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if max(image.size) <= _SHARP:
        image.save(buffer, format="PNG", optimize=True)
        return data_uri(buffer.getvalue(), "png")
    image.save(buffer, format="JPEG", quality=85)
    return data_uri(buffer.getvalue(), "jpeg")


def figure_uri(png: bytes) -> tuple[str, int, int]:
    """A drawn figure as a data URI, re-encoded where it is heavy, and its width and height in pixels."""
    with Image.open(io.BytesIO(png)) as image:
        width, height = image.size
        if len(png) <= _HEAVY:
            return data_uri(png, "png"), width, height
        image.thumbnail((_WIDEST, 8 * _WIDEST), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, format="WEBP", quality=86, method=4)  # keeps the transparency, which JPEG does not
        return data_uri(buffer.getvalue(), "webp"), *image.size


def data_uri(data: bytes, kind: str) -> str:
    """``data:image/<kind>;base64,...``"""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
