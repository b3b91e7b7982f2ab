"""Names of files as text: a reversible escape of names that are not UTF-8 or not printable, and the encoding of names in a zip."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterable
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

# What tools wrote before there was a flag for UTF-8, the most likely first: where several fit, the first is taken.
_ENCODINGS = ("cp932", "gb18030", "big5", "cp949", "cp437", "cp850", "cp866", "cp1251", "cp1252", "cp852")
_BACKSLASH_IN_CHARACTERS = {"cp932", "gb18030", "big5"}  # byte 0x5C is the second byte of some characters
_DETECTED_NAMES = 1000  # names that the encoding is detected from
_WINDOWS = (0, 10, 14)  # FAT, NTFS, VFAT: the systems that write a backslash between folders
_UTF8_FLAG = 0x800
_LAST_LATIN = "\u024f"
# Control characters, separators of lines, and those that reverse the direction of the text after them.
_CONTROL = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069]")
_ESCAPED_IN_TEXT = re.compile(f"%|{_CONTROL.pattern}")
_PLAIN_BYTES = frozenset(range(0x20, 0x7F)) - {0x25}
_UNICODE_PATH = 0x7075  # extra field of Info-ZIP: the name in UTF-8


def name_of_bytes(raw: bytes) -> str:
    """Return a path as text that can be printed.

    A part that is not UTF-8 has ``%XX`` for each byte that is not ASCII, and for each ``%``. A part with control characters,
    which could end a line or steer a terminal, has it for these and for each ``%``. :func:`bytes_of_name` is the inverse, so
    different names stay different. A part that looks like the result of the escape has its ``%`` escaped too.
    """
    return "/".join(_part_of_bytes(part) for part in raw.split(b"/"))


def bytes_of_name(name: str) -> bytes:
    """Return the bytes of a path that :func:`name_of_bytes` returned."""
    return b"/".join(unquote_to_bytes(part) if _is_escaped(part) else part.encode() for part in name.split("/"))


def name_of_text(name: str) -> str:
    """Return a name in which Python has replaced invalid bytes by surrogates as :func:`name_of_bytes` does."""
    if name.isascii() and name.isprintable() and "%" not in name:
        return name
    try:
        raw = name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raw = name.encode("utf-8", "surrogatepass")
    return name_of_bytes(raw)


class NameInZip(NamedTuple):
    """The name of a file in a zip.

    Attributes:
        text: as zipfile decodes it.
        flags: of the file.
        system: on which the zip was made.
        extra: the extra fields of the file.
    """

    text: str
    flags: int
    system: int
    extra: bytes

    @property
    def raw(self) -> bytes | None:
        """The bytes of the name; None if they are known to be UTF-8."""
        return None if self.flags & _UTF8_FLAG else self.text.encode("cp437")

    def decode(self, encoding: str | None) -> str:
        """Return the name. A backslash separates folders if the zip was made on Windows and ``encoding`` permits it."""
        raw = self.raw
        stated = self.text if raw is None else _unicode_path(self.extra, raw)
        name = raw.decode(encoding or "utf-8") if raw is not None and stated is None else str(stated)
        in_characters = stated is None and encoding in _BACKSLASH_IN_CHARACTERS
        if self.system in _WINDOWS and not in_characters:
            name = name.replace("\\", "/")
        return name_of_text(name.partition("\0")[0])


def encoding_in_zip(names: Iterable[NameInZip]) -> tuple[str | None, str]:
    """Return the encoding of the names in a zip, and a line about it; None, and no line, if it is certain.

    Names with the flag for UTF-8 are in UTF-8. The encoding of others is not recorded: UTF-8 if all are valid in it,
    otherwise it is detected from all of them.
    """
    unknown = {raw for name in names if (raw := name.raw) is not None and not raw.isascii()}
    encoding = _detect_encoding(unknown)
    if encoding is None:
        return None, ""
    shown = ", ".join(sorted(name.decode(encoding) for name in unknown)[:3])
    return encoding, f"names without a stated encoding: read as {encoding} ({shown})"


def has_unicode_path(extra: bytes) -> bool:
    """Return whether the extra fields of a file in a zip may state its name in UTF-8."""
    return struct.pack("<H", _UNICODE_PATH) in extra


def is_folder_in_zip(name: str) -> bool:
    """Return whether the name of an entry is that of a folder."""
    return name.endswith(("/", "\\"))


def _part_of_bytes(raw: bytes) -> str:
    try:
        part = raw.decode()
    except UnicodeDecodeError:
        return "".join(chr(byte) if byte in _PLAIN_BYTES else f"%{byte:02X}" for byte in raw)
    if _CONTROL.search(part):
        return _ESCAPED_IN_TEXT.sub(lambda found: "".join(f"%{byte:02X}" for byte in found[0].encode()), part)
    return part.replace("%", "%25") if _is_escaped(part) else part


def _is_escaped(name: str) -> bool:
    """Return whether undoing the escape of a name, once or several times, leads to bytes that are escaped."""
    while "%" in name:
        raw = unquote_to_bytes(name)
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            return True
        if text == name:
            return False
        if _CONTROL.search(text):
            return True
        name = text
    return False


def _detect_encoding(names: Iterable[bytes]) -> str | None:
    """Return the encoding of names; None: UTF-8, or ASCII."""
    from charset_normalizer import from_bytes  # rarely needed

    chosen = sorted(names)[:_DETECTED_NAMES]
    if not chosen or all(_is_valid(name, "utf-8") for name in names):
        return None
    found = from_bytes(b"\n".join(chosen), cp_isolation=list(_ENCODINGS), threshold=0.4)
    keys = {
        match.encoding: (round(match.chaos + _implausible(str(match)), 2), -match.coherence, order)
        for match in found
        if (order := _ENCODINGS.index(match.encoding) if match.encoding in _ENCODINGS else -1) >= 0
    }
    fitting = [
        encoding for encoding in sorted(keys, key=lambda e: keys[e]) if all(_is_valid(n, encoding) for n in names)
    ]
    return fitting[0] if fitting else "cp437"  # the standard's, in which every byte is a character


def _implausible(text: str) -> float:
    """Return how little a text looks like names, from 0 to 2.

    Chinese read as Japanese has halfwidth katakana. An accented letter read as a character of another script stands
    beside Latin letters.
    """
    others = [i for i, c in enumerate(text) if not c.isascii()]
    halfwidth = sum("\uff61" <= text[i] <= "\uff9f" for i in others)
    latin = [c.isascii() and c.isalpha() for c in text] + [False]  # [-1], before the first, is False too
    mixed = sum(text[i] > _LAST_LATIN and (latin[i - 1] or latin[i + 1]) for i in others)
    return (halfwidth + mixed) / max(len(others), 1)


def _is_valid(name: bytes, encoding: str) -> bool:
    try:
        name.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _unicode_path(extra: bytes, raw: bytes) -> str | None:
    """Return the name in UTF-8 that an extra field of the entry states; None: there is none that belongs to the name."""
    while len(extra) >= 4:
        kind, size = struct.unpack("<HH", extra[:4])
        field, extra = extra[4 : 4 + size], extra[4 + size :]
        if kind == _UNICODE_PATH and size > 5 and field[0] == 1 and field[1:5] == struct.pack("<I", zlib.crc32(raw)):
            try:
                return field[5:].decode()
            except UnicodeDecodeError:
                return None
    return None
