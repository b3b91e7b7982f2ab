"""Formats that are read where a package of the extra ``formats`` is installed: HEIC, JPEG XL, DICOM, camera RAW."""

from __future__ import annotations

import functools
from importlib.util import find_spec

_PACKAGES = {
    **dict.fromkeys((".heic", ".heif", ".hif"), "pillow_heif"),
    ".jxl": "pillow_jxl",
    **dict.fromkeys((".dcm", ".dicom"), "pydicom"),
    **dict.fromkeys((".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"), "rawpy"),
}
_DISTRIBUTIONS = {"pillow_heif": "pillow-heif", "pillow_jxl": "pillow-jxl-plugin"}
RAW_SUFFIXES = frozenset(ending for ending, package in _PACKAGES.items() if package == "rawpy")


def why_unreadable(ending: str) -> str | None:
    """Return why files with this suffix, one of an image without a built-in reader, cannot be read; None: they can.

    Args:
        ending: suffix in lower case, with the dot.
    """
    package = _PACKAGES.get(ending)
    if package is None:
        return f"no reader for {ending} (convert it to JPEG, PNG or TIFF)"
    if find_spec(package) is None:
        return f"no reader for {ending} (install {_DISTRIBUTIONS.get(package, package)}, or the extra esvit[formats])"
    return None


@functools.cache
def register_formats() -> tuple[str, ...]:
    """Make Pillow read the formats whose packages are installed, and return their names."""
    names = []
    if find_spec("pillow_heif") is not None:
        import pillow_heif

        pillow_heif.register_heif_opener()
        names.append("HEIF")
    if find_spec("pillow_jxl") is not None:
        import pillow_jxl  # noqa: F401 (importing it registers the format)

        names.append("JXL")
    return tuple(names)
