"""Which files of a source are images, which are ignored, and which are bad."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import pytest

from esvit_core.data.ingest.decode import FORMATS, BadImage
from esvit_core.data.ingest.file_kinds import (
    HEAD,
    ignored_kind,
    is_ignored,
    is_image_head,
    is_named_as_image,
    is_sidecar,
    may_be_image,
)
from esvit_core.data.ingest.read_image import NotAnImage, read_image_file
from esvit_core.data.ingest.sources import open_source
from esvit_core.errors import UserError

SIDECARS = {
    "a/1.txt": b"0 0.5 0.5 0.1 0.1",  # YOLO
    "a/1.xml": b"<annotation/>",  # VOC
    "annotations/instances.json": b"{}",  # COCO
    "a/1.jpg.json": b"{}",  # Takeout
    "a/1.aae": b"<plist/>",
    "a/1.xmp": b"<xmp/>",
    "a/1.cls": b"3",
    "table.CSV": b"a,b",
    "README.md": b"BMW is not a bitmap",
    "data.yaml": b"names: []",
    "LICENSE": b"BMW is not a bitmap, P3 neither",
    "notes.unknown": b"P6 is not a pixmap" * 100,
}
JUNK = {
    "@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg": "@eaDir/",
    "#recycle/old.png": "#recycle/",
    "a/Thumbs.db": ".db",
    "a/.DS_Store": ".DS_Store",
    "a/._1.png": "._*",
    "a/.ipynb_checkpoints/1.png": ".ipynb_checkpoints/",
    "a/.@__thumb/s1.jpg": ".@__thumb/",
    "__MACOSX/a/._1.png": "__MACOSX/",
    "$RECYCLE.BIN/1.png": "$RECYCLE.BIN/",
}


def of_format(make, form: str) -> bytes:
    if form == "DIB":  # a BMP without its file header
        return make.file(0, "BMP")
    return make.file(0, form)


@pytest.mark.parametrize("form", FORMATS)
def test_the_first_bytes_of_every_format_are_known(make, form):
    assert is_image_head(of_format(make, form)[:HEAD])


@pytest.mark.parametrize(
    "data", [b"", b"BMW cars are here and there", b"P6er", b"%PDF-1.4", b"\0" * HEAD, b"RIFF1234WAVE"]
)
def test_other_files_do_not_begin_as_images(data):
    assert not is_image_head(data)


def test_sidecars_and_other_files_are_ignored_and_counted_and_never_bad(prepared, folder, make):
    alone = prepared(folder, at="alone", val_fraction=0.0)
    make.folder(folder, SIDECARS | {name: make.file(0) for name in JUNK})
    manifest = prepared(folder, val_fraction=0.0, max_bad_fraction=0.0)
    assert manifest.bad.count == 0 and manifest.samples == 18
    assert manifest.fingerprint == alone.fingerprint
    assert manifest.ignored == len(SIDECARS) + len(JUNK) == sum(manifest.ignored_kinds.values())
    assert manifest.ignored_kinds[".json"] == 2 and manifest.ignored_kinds[".csv"] == 1
    assert all(manifest.ignored_kinds[kind] == 1 for kind in JUNK.values())
    assert "21 other files ignored" in manifest.describe()


@pytest.mark.parametrize("name", JUNK)
def test_files_of_systems_are_ignored(name):
    assert is_ignored(name) and ignored_kind(name) == JUNK[name]


@pytest.mark.parametrize(
    "name", [".DS_Store", "a/.hidden.jpg", "__MACOSX/a/._1.jpg", "a/Thumbs.db", "DESKTOP.INI", ".git/objects/1"]
)
def test_hidden_files_are_ignored(name):
    assert is_ignored(name)


def test_names_of_images():
    assert is_named_as_image("a/b.JPeG") and not is_named_as_image("a.jpg/b") and not is_named_as_image("a.txt")
    assert may_be_image("a/0123abc") and not may_be_image("a/b.csv")
    assert not is_ignored("a/1.jpg") and not is_sidecar("a/1.jpg") and is_sidecar("a/1.jpg.json")


def test_a_file_is_bad_only_if_its_name_or_its_first_bytes_say_image(prepared, folder, make):
    image = make.file(1)
    make.folder(
        folder,
        {
            "class0/image.dat": make.file(900),  # another name, but an image
            "class0/cut.dat": image[: len(image) // 2],  # begins as an image
            "class0/no.png": b"text",
            "class0/photo.PSD": b"8BPS",
            "class0/no.dat": b"text",
        },
    )
    manifest = prepared(folder, max_bad_fraction=0.5)
    assert manifest.samples == 19 and manifest.bad.count == 3 and manifest.ignored_kinds == {".dat": 1}
    assert manifest.bad.reasons["no reader for .psd"] == manifest.bad.reasons["not an image"] == 1


def test_a_source_of_other_files_names_them(prepared, tmp_path, make):
    with pytest.raises(UserError, match=r"no images in it \(ignored: 2 \.csv, 1 \.txt\); expected JPEG"):
        prepared(make.folder(tmp_path / "x", {"a.csv": b"1", "b.csv": b"2", "c.txt": b"3"}))
    with pytest.raises(UserError, match=r"no images in it \(ignored: 1 \.bin\)"):
        prepared(make.folder(tmp_path / "y", {"a.bin": b"data"}))


def test_an_ignored_file_is_not_read_again(prepared, folder, make, store, monkeypatch):
    make.folder(folder, {"class0/notes.unknown": b"text"})
    prepared(folder)
    make.folder(folder, {"class0/new.png": make.file(77)})
    from esvit_core.config import DataConfig
    from esvit_core.data.ingest import prepare_part as module
    from esvit_core.data.ingest.prepare import prepare

    read = []
    original = module.read_image_file
    monkeypatch.setattr(
        module, "read_image_file", lambda opened, entry: read.append(entry.name) or original(opened, entry)
    )
    manifest = prepare(str(folder), store, store.uri("more"), DataConfig(), base=store.uri("data"))
    assert read == ["class0/new.png"] and manifest.ignored_kinds == {".unknown": 1}


@pytest.mark.parametrize("name", ["zeros.png", "zeros.bin", "zeros"])
def test_a_large_file_that_is_no_image_is_not_read(tmp_path, name, monkeypatch):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, bytes(40 * 2**20))
    with open_source(str(path)) as opened:
        monkeypatch.setattr(opened, "read", lambda entry: pytest.fail("read"))
        with pytest.raises(BadImage if name.endswith(".png") else NotAnImage):
            read_image_file(opened, opened.entries[0])


def test_a_large_member_of_a_zip_is_in_memory_once(tmp_path):
    """Also if it begins as an image; measured in a process of its own."""
    path = tmp_path / "x.zip"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("a.png", "w") as file,
    ):
        file.write(b"\x89PNG\r\n\x1a\n")
        for _ in range(200):
            file.write(bytes(2**20))
    code = (
        "import resource, sys\n"
        "from esvit_core.data.ingest.sources import open_source\n"
        "with open_source(sys.argv[1]) as opened:\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "    assert len(opened.read(opened.entries[0])) == 200 * 2**20 + 8\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    kib = int(subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True).stdout)
    assert kib < 1.3 * 200 * 1024
