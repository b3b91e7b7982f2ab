"""Preparation of folders with all types of files: they become shards, or the error is one line."""

from __future__ import annotations

import errno
import io
import json
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prepared_data import names_of_objects, shards_below

from esvit_core.config import DataConfig
from esvit_core.data.ingest import prepare_part as module
from esvit_core.data.ingest.prefetch import reading_threads
from esvit_core.data.ingest.prepare import prepare
from esvit_core.data.shards.manifest import Manifest
from esvit_core.data.shards.reader import ShardDataset
from esvit_core.errors import UserError
from esvit_core.storage import ObjectStore, StoreFull


def stored(store, at: str = "data") -> dict[str, dict[str, tuple[int, np.ndarray]]]:
    """Return label and image of everything stored, by split and name."""
    manifest = Manifest.read(store, store.uri(at))
    found = {}
    for split in manifest.splits:
        dataset = ShardDataset(store, store.uri(at), split)
        found[split] = {dataset.name(i): (dataset.label(i), dataset.image(i)) for i in range(len(dataset))}
    return found


def bad_files(store, at: str = "data") -> dict[str, str]:
    manifest = Manifest.read(store, store.uri(at))
    text = store.get_bytes(store.uri(f"{at}/{manifest.bad.list}")).decode()
    return {line["name"]: line["reason"] for line in map(json.loads, text.splitlines())}


def test_a_labelled_folder(store, prepared, folder, make):
    manifest = prepared(folder, val_fraction=0.3)
    assert manifest == Manifest.read(store, store.uri("data"))
    assert manifest.classes == ["class0", "class1", "class2"] and manifest.samples == 18
    images = stored(store)
    assert sorted([*images["train"], *images["val"]]) == sorted(make.labeled())
    for split, found in images.items():
        assert manifest.splits[split].labeled and manifest.splits[split].samples == len(found)
        counts = [sum(label == c for label, _ in found.values()) for c in range(3)]
        assert manifest.splits[split].per_class == counts and min(counts) >= 1
        for name, (label, image) in found.items():
            assert label == int(name[5]) and np.array_equal(image, make.pixels(label * 100 + int(name[7])))
    assert manifest.bad.count == manifest.reencoded == manifest.copies == 0 and bad_files(store) == {}


def test_everything_stored_is_in_the_manifest_with_its_size_and_digest(store, prepared, folder, tmp_path):
    manifest = prepared(folder, shard_mib=0.02)
    names = {stat.uri.removeprefix(store.uri("data/")) for stat in store.list(store.uri("data"))}
    assert names == names_of_objects(store, store.uri("data"))
    shards = [shard for _, shard in shards_below(store, store.uri("data"))]
    assert manifest.bytes == sum(shard.bytes for shard in shards) and len(shards) == manifest.shard_count
    assert all(shard.bytes <= 0.02 * 2**20 for shard in shards)
    store.fetch(store.uri("data"), tmp_path / "all")  # as any published set
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


def test_the_summary_is_figures_only(prepared, folder):
    summary = prepared(folder).summary()
    assert summary["images"] == 18 and summary["classes"] == 3 and summary["train"] + summary["val"] == 18
    assert all(isinstance(value, (int, str)) for value in summary.values())


def archives(place: Path, files: dict[str, bytes]) -> dict[str, Path]:
    with tarfile.open(place / "x.tar.gz", "w:gz") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(f"set/{name}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    with zipfile.ZipFile(place / "x.zip", "w") as archive:
        for name, data in sorted(files.items(), reverse=True):
            archive.writestr(name, data)
    return {"tar": place / "x.tar.gz", "zip": place / "x.zip"}


def test_folder_tar_zip_and_prefix_give_the_same_shards(store, prepared, folder, tmp_path, make):
    for name, data in make.labeled().items():
        store.put_bytes(store.uri(f"in/{name}"), data)
    sources = {"folder": folder, "prefix": store.uri("in"), **archives(tmp_path, make.labeled())}
    manifests = {kind: prepared(source, at=kind, val_fraction=0.3) for kind, source in sources.items()}
    assert len({m.fingerprint for m in manifests.values()}) == 1
    # The names in the source are stored too, and the images of the tar are in a folder.
    alike = [[shard for _, shard in shards_below(store, store.uri(kind))] for kind in sources if kind != "tar"]
    assert alike[0] == alike[1] == alike[2]


def test_a_repeated_preparation_finds_the_data(store, prepared, folder, monkeypatch):
    first = prepared(folder)
    monkeypatch.setattr(ObjectStore, "put_bytes", _never)
    assert prepared(folder) == first


def _never(*arguments: object, **named: object) -> None:
    raise AssertionError("not to be called")


def test_other_images_or_settings_do_not_overwrite(prepared, folder, make):
    prepared(folder)
    with pytest.raises(UserError, match="different content or settings; choose another run"):
        prepared(folder, val_fraction=0.2)
    make.folder(folder, {"class0/new.png": make.file(7)})
    with pytest.raises(UserError, match="with different content or settings"):
        prepared(folder)


def test_leftovers_of_a_killed_attempt_are_removed(store, prepared, folder):
    store.put_bytes(store.uri("data/shards/train-000007.tar"), b"half")
    prepared(folder)
    names = {stat.uri.removeprefix(store.uri("data/")) for stat in store.list(store.uri("data"))}
    assert names == names_of_objects(store, store.uri("data"))


def test_splits_of_the_source_are_kept(store, prepared, tmp_path, make):
    files = {f"train/{c}/{i}.png": make.file(10 * i + ord(c)) for c in "ab" for i in range(5)}
    files |= {f"test/{c}/{i}.png": make.file(500 + 10 * i + ord(c)) for c in "bc" for i in range(2)}
    manifest = prepared(make.folder(tmp_path / "x", files), val_fraction=0.5)
    assert manifest.classes == ["a", "b", "c"]
    assert manifest.splits["train"].per_class == [5, 5, 0] and manifest.splits["val"].per_class == [0, 2, 2]
    assert {n.split("/")[0] for n in stored(store)["val"]} == {"test"}


def test_images_without_labels(store, prepared, tmp_path, make):
    manifest = prepared(make.folder(tmp_path / "x", {f"{i}.png": make.file(i) for i in range(12)}))
    assert manifest.classes == [] and not manifest.splits["train"].labeled
    assert {label for split in stored(store).values() for label, _ in split.values()} == {-1}


def test_images_without_a_class_beside_classes(store, prepared, folder, make):
    manifest = prepared(make.folder(folder, {"loose.png": make.file(999)}), val_fraction=0.0)
    assert not manifest.splits["train"].labeled and manifest.splits["train"].per_class == [6, 6, 6]
    assert stored(store)["train"]["loose.png"][0] == -1


def test_an_exact_copy_of_a_training_image_is_not_held_out(store, prepared, tmp_path, make):
    files = {f"{i}.png": make.file(i % 10) for i in range(40)}
    manifest = prepared(make.folder(tmp_path / "x", files), val_fraction=0.5)
    assert manifest.copies + manifest.dropped == 30 and manifest.copies and manifest.dropped
    contents = {s: {p.tobytes() for _, p in found.values()} for s, found in stored(store).items()}
    assert not contents["train"] & contents.get("val", set())


def test_bad_and_unusual_files_of_a_folder(store, prepared, tmp_path, make):
    good = {f"a/{i}.png": make.file(i) for i in range(10)} | {
        f"b/{i}.jpg": make.file(50 + i, "JPEG") for i in range(10)
    }
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(make.pixels())
    odd = {
        "a/cmyk.jpg": make.file(image.convert("CMYK"), "JPEG"),
        "a/deep.png": make.file(np.arange(480, dtype=np.uint16).reshape(20, 24) * 136),
        "a/palette.png": make.file(image.quantize(16)),
        "a/grey.png": make.file(image.convert("L")),
        "a/alpha.png": make.file(np.dstack([make.pixels(3), make.pixels(4)[..., 0]])),
        "b/turned.jpg": make.file(make.pixels(1, 30, 20), "JPEG", exif=exif),
        "b/ü ö 図 🙂.png": make.file(61),
        "b/" + "x" * 240 + ".png": make.file(62),
        "b/no suffix": make.file(63),
        "b/wrong.png": make.file(64, "JPEG"),
        "b/anim.gif": make.file(image, "GIF"),
    }
    bad = {
        "a/text.png": b"not an image at all",
        "a/empty.jpg": b"",
        "a/cut.jpg": make.file(make.pixels(9, 90, 90), "JPEG")[:-400],
        "b/huge.png": make.file(Image.new("1", (2000, 1000))),
    }
    quiet = {"a/.DS_Store": b"x", "__MACOSX/a/._1.png": b"y", "b/Thumbs.db": b"z", ".git/config": b"w"}
    quiet |= {
        "b/notes.txt": b"read me",
        "LICENSE": b"text",
        "a/1.aae": b"<xml>",
        "clip.mov": b"video",
        "x.bin": b"data",
    }
    folder = make.folder(tmp_path / "x", good | odd | bad | quiet)
    (folder / "a/gone.png").symlink_to("nowhere.png")
    manifest = prepared(folder, max_bad_fraction=0.2, max_megapixels=1.5)
    reasons = bad_files(store)
    assert sorted(reasons) == sorted([*bad, "a/gone.png"])
    assert reasons["a/text.png"] == "not an image"
    assert reasons["a/empty.jpg"] == "empty file" and reasons["a/cut.jpg"].startswith("truncated")
    assert reasons["b/huge.png"] == "too large (2 megapixels, more than max_megapixels 1.5)"
    assert reasons["a/gone.png"] == "broken link"
    assert manifest.bad.count == 5 and sum(manifest.bad.reasons.values()) == 5
    assert manifest.bad.reasons["not an image"] == 1 and manifest.bad.reasons["too large"] == 1
    assert manifest.ignored_kinds == dict.fromkeys((".DS_Store", ".aae", ".bin", ".db", ".git/", ".mov", ".txt"), 1) | {
        "__MACOSX/": 1,
        "no suffix": 1,
    }
    assert manifest.ignored == 9 and manifest.considered == len(good | odd | bad) + 1
    found = {name: seen for split in stored(store).values() for name, seen in split.items()}
    assert sorted(map(_nfc, found)) == sorted(map(_nfc, good | odd)) and manifest.classes == ["a", "b"]
    assert found["b/turned.jpg"][1].shape == (30, 20, 3) and manifest.reencoded == 6


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def test_unusual_entries_of_an_archive(store, prepared, tmp_path, make):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, seed in [("a/1.png", 1), ("a/1.png", 2), ("../out.png", 3), ("b/ü.png", 4), ("__MACOSX/1.png", 5)]:
            data = make.file(seed)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    manifest = prepared(tmp_path / "x.tar", max_bad_fraction=0.5)
    assert (manifest.duplicates, manifest.ignored, manifest.bad.count) == (1, 1, 1)
    assert bad_files(store) == {"../out.png": "path outside the archive"}
    assert np.array_equal(stored(store)["train"]["a/1.png"][1], make.pixels(2))


def test_too_many_bad_files_are_an_error_that_lists_some(store, prepared, folder, make):
    make.folder(folder, {f"class0/bad{i}.png": b"x" for i in range(7)})
    with pytest.raises(UserError) as error:
        prepared(folder, max_bad_fraction=0.2)
    message = str(error.value)
    assert "7 of 25 files are bad, more than the allowed 20 %" in message and "\n" not in message
    assert (
        "class0/bad0.png (not an image)" in message and "and 2 more" in message and "data.max_bad_fraction" in message
    )
    assert prepared(folder, max_bad_fraction=0.3).bad.count == 7


def test_a_source_of_bad_files_fails_early(prepared, tmp_path, make, capsys):
    folder = make.folder(tmp_path / "x", {f"{i:04d}.jpg": b"x" for i in range(600)} | {"ok.png": make.file(0)})
    with pytest.raises(UserError, match="100 of 601 files are bad"):
        prepared(folder)


@pytest.mark.parametrize(
    "files", [{}, {"a.txt": b"x", "b/c.csv": b"y"}, {".hidden.png": b"x"}, {"a/1.png": b"", "a/2.jpg": b"text"}]
)
def test_a_folder_without_images(store, prepared, tmp_path, make, files):
    folder = make.folder(tmp_path / "x", files)
    folder.mkdir(exist_ok=True)
    with pytest.raises(UserError, match=r"x: (no images in it|none of its 2 files is an image)"):
        prepared(folder)
    assert not list(store.list(store.uri("data")))


def test_a_missing_folder(prepared, tmp_path):
    with pytest.raises(UserError, match="nowhere: does not exist"):
        prepared(tmp_path / "nowhere")


def test_large_images_are_shrunk_on_request(store, prepared, tmp_path, make):
    files = {f"{i}.jpg": make.file(make.pixels(i, 160, 120), "JPEG") for i in range(4)}
    manifest = prepared(make.folder(tmp_path / "x", files), store_short_side=30, val_fraction=0.0)
    assert manifest.reencoded == 4
    assert {p.shape for _, p in stored(store)["train"].values()} == {(30, 40, 3)}


def test_a_choice_of_images_is_balanced_and_fixed(store, prepared, tmp_path, make):
    sizes = {"a": 20, "b": 9, "c": 3}
    files = {f"{c}/{i}.png": make.file(ord(c) * 50 + i) for c, size in sizes.items() for i in range(size)}
    folder = make.folder(tmp_path / "x", files | {"README.md": b"x"})
    manifest = prepared(folder, max_images=15, val_fraction=0.0, max_bad_fraction=0.1)
    assert manifest.splits["train"].per_class == [6, 6, 3] and manifest.not_chosen == 17
    assert manifest.considered == 15 and manifest.bad.count == 0 and manifest.ignored_kinds == {".md": 1}
    again = prepared(folder, at="again", max_images=15, val_fraction=0.0, max_bad_fraction=0.1)
    assert again.fingerprint == manifest.fingerprint


def test_adding_images_does_not_move_others(store, prepared, tmp_path, make):
    files = {f"{c}/{i}.png": make.file(ord(c) * 50 + i) for c in "ab" for i in range(30)}
    folder = make.folder(tmp_path / "x", files)
    prepared(folder, val_fraction=0.3)
    make.folder(folder, {f"{c}/new{i}.png": make.file(ord(c) * 50 + 100 + i) for c in "abc" for i in range(10)})
    prepared(folder, at="more", val_fraction=0.3)
    before, after = stored(store), stored(store, "more")
    assert set(before["train"]) <= set(after["train"]) and set(before["val"]) <= set(after["val"])


def test_the_seed_changes_nothing(store, folder, prepared):
    settings = prepared(folder, at="one")
    assert prepare(str(folder), store, store.uri("two"), DataConfig(), seed=5).fingerprint == settings.fingerprint


def test_few_images_are_in_memory_at_a_time(prepared, tmp_path, make, monkeypatch):
    folder = make.folder(tmp_path / "x", {f"{i}.png": make.file(i) for i in range(120)})
    alive, peak = 0, 0
    load, add = module.load, module._PartPreparation._add

    def counted_load(*arguments):
        nonlocal alive, peak
        alive += 1
        peak = max(peak, alive)
        return load(*arguments)

    def counted_add(*arguments):
        nonlocal alive
        alive -= 1
        add(*arguments)

    monkeypatch.setattr(module, "load", counted_load)
    monkeypatch.setattr(module._PartPreparation, "_add", counted_add)
    prepared(folder)
    assert peak <= module._READ_AHEAD * max(module.REQUESTS, reading_threads()) + 1


@pytest.mark.parametrize("where", ["put_file", "put_if_absent"])
def test_a_full_store_is_an_error_and_leaves_no_manifest(store, prepared, folder, monkeypatch, where):
    def full(*arguments: object, **named: object) -> None:
        raise StoreFull("s3://x: the disk of the object store is full")

    monkeypatch.setattr(ObjectStore, where, full)
    with pytest.raises(StoreFull, match="the disk of the object store is full"):
        prepared(folder)
    assert not store.exists(store.uri("data/manifest.json"))


def test_a_full_local_disk_is_an_error(prepared, folder, monkeypatch):
    def full(*arguments: object, **named: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("esvit_core.data.shards.format.tarfile.TarFile.addfile", full)
    with pytest.raises(StoreFull, match="the disk is full"):
        prepared(folder)


def test_progress_and_result_are_printed(prepared, folder, make, capsys):
    prepared(make.folder(folder, {"class0/bad.png": b"x"}), max_bad_fraction=0.2)
    message = capsys.readouterr().out
    assert "prepare  19/19 images  100 %" in message
    assert "18 images in 3 classes (" in message and "; 1 bad file left out" in message
    prepared(folder, max_bad_fraction=0.2)
    assert "already done" in capsys.readouterr().out
