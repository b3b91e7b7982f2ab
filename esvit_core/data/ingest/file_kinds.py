"""Decide from the names and the first bytes of files which are images and which are ignored."""

from __future__ import annotations

import functools
import re

from esvit_core.data.ingest.optional_formats import why_unreadable

_IMAGE_ENDINGS = "jpg jpeg jpe jfif mpo png gif webp bmp dib tif tiff ppm pgm pbm pnm jp2 j2k avif"
# Formats of images that only a package of the extra `formats` reads, or none. Where it is not installed, such a file is a
# bad file with a reason, never ignored.
_UNREADABLE_ENDINGS = "heic heif hif jxl dcm dicom dng cr2 cr3 nef arw orf rw2 raf exr hdr psd"
IMAGE_SUFFIXES = frozenset(f".{ending}" for ending in _IMAGE_ENDINGS.split())
UNREADABLE_SUFFIXES = frozenset(f".{ending}" for ending in _UNREADABLE_ENDINGS.split())
# Files that lie beside images and are ignored without being read. Files of other names are ignored if their first bytes
# are not those of an image.
_SIDECAR_ENDINGS = """
    txt md rst rtf pdf doc docx xls xlsx ppt pptx odt ods log nfo license
    json jsonl ndjson geojson xml csv tsv yaml yml toml ini cfg conf cls names data lst list map index
    aae xmp thm db sqlite mdb lnk url html htm css js py pyc ipynb sh bat sql
    mat npy npz pkl pickle pt pth ckpt h5 hdf5 parquet arrow feather lmdb tfrecord safetensors onnx prototxt caffemodel
    mp4 mov avi mkv m4v mts 3gp webm mpg mpeg wmv mp3 wav m4a aac ogg flac svg ai eps
    zip tar gz tgz bz2 xz 7z rar md5 sha1 sha256 torrent part crdownload bak tmp
"""
SIDECAR_SUFFIXES = frozenset(f".{ending}" for ending in _SIDECAR_ENDINGS.split())
_SYSTEM_FILES = frozenset(
    {
        *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "picasa.ini", "zbthumbnail.info"),
        *("__macosx", "system volume information", "$recycle.bin", "recycler", "lost+found", "found.000"),
        # Folders of thumbnails, deleted files and snapshots on the storage of Synology and QNAP.
        *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@__thumb", "@tmp", "@sharebin"),
    }
)
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_SIGNATURES = (
    *(b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", *TIFF_SIGNATURES),
    *(b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n", b"\0\0\0\x0cJXL \r\n\x87\n"),
)
_PPM = re.compile(rb"P[1-6]\s+[0-9#]")
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)  # sizes of the header that follows
_IMAGE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
HEAD = 132  # first bytes that :func:`is_image_head` looks at


def is_ignored(name: str) -> bool:
    """Return whether a file is hidden or created by an operating system or a storage system."""
    return _ignored_part(name) is not None


def is_sidecar(name: str) -> bool:
    """Return whether the suffix is that of a file that lies beside images and is none: annotations, video, text."""
    return suffix(name) in SIDECAR_SUFFIXES


def suffix(name: str) -> str:
    """Return the suffix in lower case, ``.jpg`` for ``a/b.JPG``; empty if there is none."""
    stem, dot, ending = name.rpartition("/")[2].rpartition(".")
    return f".{ending.lower()}" if dot and stem else ""


def is_named_as_image(name: str) -> bool:
    """Return whether the name has the suffix of an image that can be read."""
    return suffix(name) in IMAGE_SUFFIXES or _is_optional(suffix(name))


def may_be_image(name: str) -> bool:
    """Return whether the name has the suffix of an image or none, in which case only the content can tell."""
    return is_named_as_image(name) or not suffix(name)


@functools.cache
def _is_optional(ending: str) -> bool:
    """Return whether a package is installed that reads files with this suffix."""
    return ending in UNREADABLE_SUFFIXES and why_unreadable(ending) is None


def is_image_head(head: bytes) -> bool:
    """Return whether the first bytes of a file, at least :data:`HEAD` if it has that many, are those of an image."""
    if head.startswith(_SIGNATURES):
        return True
    if head.startswith(b"RIFF"):
        return head[8:12] == b"WEBP"
    if head[128:132] == b"DICM":
        return True
    if head[4:8] == b"ftyp":
        return head[8:12] in _IMAGE_BRANDS
    if head.startswith(b"BM"):  # also the start of a word
        return int.from_bytes(head[14:18], "little") in _BMP_HEADERS
    return _PPM.match(head) is not None


def ignored_kind(name: str) -> str:
    """Return under what an ignored file is counted: its suffix, or the system's name for such files.

    Examples: ``.txt``, ``.DS_Store``, ``._*``, ``@eaDir/``; ``no suffix`` for ``LICENSE``.
    """
    part = _ignored_part(name)
    if part is None:
        return suffix(name) or "no suffix"
    if part is not name.rpartition("/")[2] and f"{part}/" in name:
        return f"{part}/"
    return "._*" if part.startswith("._") else suffix(part) or part


def describe_ignored(counts: dict[str, int]) -> str:
    """Describe numbers of ignored files, the most frequent first: ``3 .txt, 1 .DS_Store``."""
    return ", ".join(
        f"{count:,} {kind}" for kind, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    )


def _ignored_part(name: str) -> str | None:
    """Return the part of a path that is hidden or a system's; None if there is none."""
    for part in name.split("/"):
        if (part.startswith(".") and part != "..") or part.casefold() in _SYSTEM_FILES or part.startswith("@Syno"):
            return part
    return None
