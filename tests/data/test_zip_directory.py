"""Zips whose directory is read piece by piece."""

from __future__ import annotations

import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from esvit_core.data.ingest import zip_directory
from esvit_core.data.ingest.sources import open_source
from esvit_core.errors import UserError


def filled(path: Path, count: int = 300, comment: bytes = b"") -> Path:
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        for number in range(count):
            archive.writestr(f"{number % 3}/ü {number}.png", str(number) * number)
        archive.comment = comment
    return path


def contents(path: Path) -> dict[str, bytes]:
    with open_source(str(path)) as opened, ThreadPoolExecutor(4) as pool:
        entries = [*opened.entries]
        assert all(opened.peek(entry, 2) == opened.read(entry)[:2] for entry in entries[:20])
        return dict(zip((entry.name for entry in entries), pool.map(opened.read, entries), strict=True))


EXPECTED = {f"{number % 3}/ü {number}.png": (str(number) * number).encode() for number in range(300)}


@pytest.mark.parametrize("comment", [b"", b"of the archive"], ids=len)
def test_a_zip_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comment: bytes) -> None:
    monkeypatch.setattr(zip_directory, "_PIECE", 1000)
    assert contents(filled(tmp_path / "a.zip", comment=comment)) == EXPECTED


@pytest.mark.parametrize("size", [1, 5 * 2**30], ids=["a kilobyte", "more than 32 bits can count"])
def test_a_zip_may_follow_other_bytes(tmp_path: Path, size: int) -> None:
    with (tmp_path / "a.zip").open("wb") as file:
        file.write(b"#!/bin/sh\n" * 100)
        file.truncate(max(size, file.tell()))
    assert contents(filled(tmp_path / "a.zip")) == EXPECTED


def test_a_zip_that_was_moved_behind_a_program_is_read(tmp_path: Path) -> None:
    data = filled(tmp_path / "a.zip").read_bytes()
    (tmp_path / "b.zip").write_bytes(b"#!/bin/sh\n" + data)
    assert contents(tmp_path / "b.zip") == EXPECTED


@pytest.mark.parametrize(("start", "stop"), [(-22, None), (-300, -200), (-4000, -3900), (-40, None)])
def test_a_damaged_zip_is_named(tmp_path: Path, start: int, stop: int | None) -> None:
    data = bytearray(filled(tmp_path / "a.zip").read_bytes())
    del data[start:stop]
    (tmp_path / "b.zip").write_bytes(data)
    with pytest.raises(UserError, match=r"b\.zip: damaged archive \("), open_source(str(tmp_path / "b.zip")):
        pass
