"""How a source would be read is said before a run, and the preparation says the same."""

from __future__ import annotations

import json
import zipfile

import pytest

from esvit_core.config import DataConfig
from esvit_core.data.ingest import inspect_source as module
from esvit_core.data.ingest.inspect_source import inspect_source
from esvit_core.errors import UserError
from esvit_pipelines.cli.main import app


def inspect(source, **settings):
    return inspect_source(str(source), DataConfig(**settings))


@pytest.fixture
def split_folder(tmp_path, make):
    """Two classes in train, three in test; a bad image, a Photoshop file, two sidecars and a LICENSE."""
    images = {f"train/{c}/{i}.png": make.file(i) for c in ("cat", "dog") for i in range(5)}
    images |= {f"test/{c}/{i}.png": make.file(90 + i) for c in ("cat", "dog", "emu") for i in range(2)}
    others = {"train/cat/9.jpg": b"x", "train/cat/8.psd": b"x", "train/cat/1.txt": b"x", "train/dog/1.xml": b"x"}
    return make.folder(tmp_path / "source", images | others | {"train/LICENSE": b"text"})


def test_the_summary_counts_images_splits_classes_and_other_files(split_folder):
    found = inspect(split_folder)
    assert found.summary() == {
        "images": 16,
        "labelled": True,
        "classes": 3,
        "splits": {"train": 10, "test": 6},
        "ignored": {".txt": 1, ".xml": 1, "no suffix": 1},
        "bad": 2,
    }
    text = "\n".join(found.lines)
    assert "images: 16 (train 10, test 6)" in text
    assert "classes: 3 classes of 2 to 7 images: cat (7), dog (7), emu (2)" in text
    assert "odd: 1 class of held-out images without training images (emu)" in text
    assert "train/cat/9.jpg (not an image)" in text and "no reader for .psd" in text


def test_only_the_splits_that_are_there_are_named(folder):
    assert inspect(folder).summary() == {
        **{"images": 18, "labelled": True, "classes": 3, "splits": {}, "ignored": {}, "bad": 0}
    }
    assert inspect(folder, labels="none").summary()["labelled"] is False


def test_a_source_of_held_out_images_can_be_inspected(tmp_path, make):
    make.folder(tmp_path / "x", {"val/0.png": make.file(0), "test/1.png": make.file(1)})
    found = inspect(tmp_path / "x")
    assert found.summary()["splits"] == {"val": 1, "test": 1}
    assert "odd: there are no images to train on, only val and test" in found.lines


def test_the_content_decides_about_names_that_tell_nothing(tmp_path, make):
    make.folder(tmp_path / "x", {"0": make.file(0), "1.dat2": make.file(1), "2": b"text", "3.png": make.file(3)})
    found = inspect(tmp_path / "x").summary()
    assert found["images"] == 3 and found["ignored"] == {"no suffix": 1} and found["bad"] == 0


def test_only_a_sample_is_decoded(folder, monkeypatch):
    monkeypatch.setattr(module, "_SAMPLE", 4)
    (folder / "class0" / "0.png").write_bytes(b"x")
    decoded = []
    original = module.read_image_file
    monkeypatch.setattr(module, "read_image_file", lambda o, e: decoded.append(e.name) or original(o, e))
    found = inspect(folder)
    assert len(decoded) == 4 and any("a sample of 4 images" in line for line in found.lines)


def test_repeated_names_of_an_archive_and_of_classes_are_odd(tmp_path, make):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        for name in ["Cat/0.png", "Cat/1.png", "cat/0.png", "cat/1.png", "cat/1.png"]:
            archive.writestr(name, make.file(0))
    text = "\n".join(inspect(tmp_path / "x.zip").lines)
    assert "a later one with the same name replaces: 1" in text and "differ only in case (Cat and cat)" in text


def test_a_source_without_images_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"no images in it \(ignored: 1 \.txt\)"):
        inspect(tmp_path)


def test_the_last_line_of_the_command_is_json(split_folder, capsys):
    app(["data", "inspect", str(split_folder), "--set", "data.labels=none", "--json"], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == {**inspect(split_folder).summary(), "labelled": False, "classes": 0}
    assert lines[0] == str(split_folder) and "  labels: none, as data.labels says" in lines


def test_the_preparation_says_the_same_and_keeps_it(split_folder, prepared, capsys):
    manifest = prepared(split_folder, max_bad_fraction=0.5)
    output = capsys.readouterr().out
    for line in manifest.reading:
        assert f"prepare: {line}" in output
    text = "\n".join(manifest.reading)
    assert "images: 17 (train 11, test 6)" in text  # the bad one is not known yet
    assert "classes: 3 classes of 2 to 8 images: cat (8), dog (7), emu (2)" in text
    assert "odd: 1 class of held-out images without training images (emu)" in text
    assert "ignored: 1 .txt, 1 .xml" in text


def test_tables_beside_unlabelled_images_are_mentioned(tmp_path, make):
    """As competitions distribute them: the labels of the training images are in a table."""
    images = {f"train/{i:03x}.png": make.file(i) for i in range(6)} | {
        f"test/{i:03x}.png": make.file(i) for i in (7, 8)
    }
    table = "id,label\n" + "".join(f"{i:03x},{'ab'[i % 2]}\n" for i in range(6))
    source = make.folder(tmp_path / "x", images | {"labels.csv": table.encode(), "sample.csv": b"id,label\n"})
    assert "not read: labels.csv, sample.csv; if a table names the images and their classes, set data.labels=csv" in (
        inspect(source).lines
    )
    found = inspect(source, labels="csv")
    assert found.summary()["classes"] == 2 and not any("not read" in line for line in found.lines)
    assert not any("not read" in line for line in inspect(source, labels="none").lines)
