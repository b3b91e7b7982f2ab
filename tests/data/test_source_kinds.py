"""Sources beside folders and archives: tables, WebDataset shards, the published code's files, Hugging Face data sets."""

from __future__ import annotations

import base64
import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from esvit_core.config import DataConfig
from esvit_core.data.ingest.ingest_plan import plan_ingest
from esvit_core.data.ingest.inspect_source import inspect_source
from esvit_core.data.ingest.sources import check_source, is_listed, open_source, source_fingerprint
from esvit_core.errors import UserError


def read_as(source: object, store=None, **settings) -> dict[str, tuple[str, str | None]]:
    """Return split and class of each image, by name, and check that every image can be read and peeked at."""
    check_source(str(source)) if store is None else None
    with open_source(str(source), store) as opened:
        plan = plan_ingest(opened.entries, str(source), DataConfig(**settings), read=opened.read)
        assert not plan.bad
        for candidate in plan.candidates:
            data = opened.read(candidate.entry)
            assert data[1:4] == b"PNG" and opened.peek(candidate.entry, 8) == data[:8]
            assert len(data) == candidate.entry.size
        return {c.entry.name: (c.split, plan.classes[c.label] if c.label >= 0 else None) for c in plan.candidates}


def summary(source: object, **settings) -> dict[str, object]:
    found = inspect_source(str(source), DataConfig(**settings)).summary()
    return {key: found[key] for key in ("images", "classes", "splits", "bad")}


def tar_of(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def zip_of(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


# --- tables


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.csv", "path,label,split\n{0},cat,train\n{1},dog,train\n{2},cat,val\n"),
        ("list.tsv", "id\tfile\tspecies\tsubset\n7\t{0}\tcat\tTraining\n8\t{1}\tdog\ttrain\n9\t{2}\tcat\tvalidation\n"),
        ("list.csv", "\ufefflabel;image;set\r\ncat;{0};train\r\ndog;{1};train\r\ncat;{2};dev\r\n"),
    ],
)
def test_a_table_names_images_their_labels_and_splits(tmp_path, make, name, text):
    make.folder(tmp_path, {f"any/{i}.png": make.file(i) for i in range(4)})
    (tmp_path / name).write_text(text.format("any/0.png", "./any/1.png", tmp_path / "any" / "2.png"))
    found = read_as(tmp_path / name)
    assert sorted(found.values()) == [("train", "cat"), ("train", "dog"), ("val", "cat")]
    assert found["any/2.png"] == ("val", "cat") and found["any/1.png"] == ("train", "dog")


def test_a_table_of_paths_alone_is_read_like_its_folders(tmp_path, make):
    make.folder(tmp_path, {f"{c}/{i}.png": make.file(i) for c in ("cat", "dog") for i in range(4)})
    (tmp_path / "list.csv").write_text("".join(f"{c}/{i}.png\n" for c in ("cat", "dog") for i in range(3)))
    assert summary(tmp_path / "list.csv") == {"images": 6, "classes": 2, "splits": {}, "bad": 0}


def test_a_table_in_the_store_names_objects(store, make):
    for i in range(3):
        store.put_bytes(store.uri(f"images/{i}.png"), make.file(i))
    table = f"file,label\n0.png,cat\n1.png,dog\n{store.uri('images/2.png')},cat\n"
    store.put_bytes(store.uri("images/list.csv"), table.encode())
    found = read_as(store.uri("images/list.csv"), store, val_fraction=0)
    assert sorted(found.values()) == [("train", "cat"), ("train", "cat"), ("train", "dog")]


def test_files_that_a_table_names_and_that_do_not_exist_are_bad_files(tmp_path, make):
    make.folder(tmp_path, {"0.png": make.file(0)})
    (tmp_path / "list.csv").write_text("path\n0.png\nnone.png\n")
    assert summary(tmp_path / "list.csv")["bad"] == 1


def test_the_fingerprint_of_a_table_follows_its_labels_and_its_images(tmp_path, make):
    make.folder(tmp_path, {f"{i}.png": make.file(i) for i in range(2)})
    table = tmp_path / "list.csv"

    def fingerprint(text: str) -> str:
        table.write_text(text)
        return source_fingerprint(str(table))

    first = fingerprint("path,label\n0.png,cat\n1.png,dog\n")
    assert is_listed(str(table)) and first == fingerprint("path,label\n1.png,dog\n0.png,cat\n")
    assert first != fingerprint("path,label\n0.png,cat\n1.png,cat\n")
    before = fingerprint("path,label\n0.png,cat\n1.png,dog\n")
    make.folder(tmp_path, {"1.png": make.file(5)})
    assert before != source_fingerprint(str(table))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "names no images; expected a column of paths"),
        ("path\nhttp://x/1.png\n", "copy them to a folder"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_line(tmp_path, text, message):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        check_source(str(tmp_path / "list.csv"))


def test_a_parquet_file_of_paths(tmp_path, make):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    make.folder(tmp_path, {f"{i}.png": make.file(i) for i in range(2)})
    pq.write_table(pa.table({"path": ["0.png", "1.png"], "label": [3, 5]}), tmp_path / "list.parquet")
    assert read_as(tmp_path / "list.parquet", val_fraction=0) == {"0.png": ("train", "3"), "1.png": ("train", "5")}


# --- WebDataset shards


def shards(place: Path, make, split: str = "", ending: str = ".tar") -> None:
    for number in range(3):
        files = {}
        for i in range(2):
            files |= {
                f"{i:04d}.png": make.file(10 * number + i),
                f"{i:04d}.cls": str(i).encode(),
                f"{i:04d}.txt": b"a cat",
            }
        tar_of(place / f"{split}{number:06d}{ending}", files, "w:gz" if ending == ".tar.gz" else "w")


@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_a_folder_of_shards_is_one_labelled_source(tmp_path, make, ending):
    shards(tmp_path / "set", make, "imagenet-train-", ending)
    shards(tmp_path / "set", make, "imagenet-val-", ending)
    found = read_as(tmp_path / "set")
    assert len(found) == 12 and found["imagenet-val/000001-0000.png"] == ("val", "0")
    assert sorted(found.values()) == [(s, c) for s in ("train", "val") for c in ("0", "1") for _ in range(3)]


@pytest.mark.parametrize("pattern", ["{}/part-{{000000..000002}}.tar", "{}/*.tar", "{}/part-00000[0-2].tar"])
def test_a_pattern_of_shards(tmp_path, make, pattern):
    shards(tmp_path / "set", make, "part-")
    shards(tmp_path / "other", make)
    source = pattern.format(tmp_path / "set")
    assert len(read_as(source)) == 6 and source_fingerprint(source) == source_fingerprint(
        pattern.format(tmp_path / "set")
    )


def test_labels_in_json_and_other_images_of_a_sample(tmp_path, make):
    files = {}
    for i in range(3):
        files |= {f"{i}.png": make.file(i), f"{i}.seg.png": make.file(50 + i)}
        files[f"{i}.json"] = json.dumps({"caption": "a b", "label": "cat" if i else "dog"}).encode()
    found = read_as(tar_of(tmp_path / "one.tar", files), val_fraction=0)
    assert found == {"0.png": ("train", "dog"), "1.png": ("train", "cat"), "2.png": ("train", "cat")}


def test_shards_in_the_store(store, tmp_path, make):
    shards(tmp_path / "set", make, "part-")
    for path in (tmp_path / "set").iterdir():
        store.put_bytes(store.uri(f"shards/{path.name}"), path.read_bytes())
    assert len(read_as(store.uri("shards"), store)) == len(read_as(store.uri("shards/part-*.tar"), store)) == 6
    assert source_fingerprint(store.uri("shards"), store) != source_fingerprint(store.uri("shards/*-000001.tar"), store)


def test_archives_in_a_folder_are_read_like_folders_of_their_names(tmp_path, make):
    (tmp_path / "set").mkdir()
    for split, count in (("train", 3), ("test", 2)):
        zip_of(tmp_path / "set" / f"{split}.zip", {f"{c}/{i}.png": make.file(i) for c in "ab" for i in range(count)})
    assert summary(tmp_path / "set") == {"images": 10, "classes": 2, "splits": {"train": 6, "test": 4}, "bad": 0}


def test_archives_beside_images_are_no_images(tmp_path, make):
    make.folder(tmp_path / "set", {"0.png": make.file(0)})
    zip_of(tmp_path / "set" / "more.zip", {"1.png": make.file(1)})
    assert [*read_as(tmp_path / "set", val_fraction=0)] == ["0.png"]


def test_a_pattern_without_archives_is_refused(tmp_path, make):
    make.folder(tmp_path, {"0.png": make.file(0)})
    with pytest.raises(UserError, match="no file matches"):
        check_source(f"{tmp_path}/*.tar")
    with pytest.raises(UserError, match="matches no archives"), open_source(f"{tmp_path}/*.png"):
        pass


def test_a_truncated_shard_is_an_error_that_names_it(tmp_path, make):
    shards(tmp_path / "set", make)
    path = tmp_path / "set" / "000001.tar"
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(UserError, match=r"000001\.tar: damaged archive"), open_source(str(tmp_path / "set")):
        pass


# --- the published code's files


def test_the_published_zips_with_their_maps(tmp_path, make):
    for split, count in (("train", 3), ("val", 1)):
        names = [f"n0144{c}/{i}.png" for c in range(2) for i in range(count)]
        zip_of(tmp_path / f"{split}.zip", {name: make.file(0) for name in [*names, "n9/unmapped.png"]})
        lines = [f"{split}.zip@/{name}\t{name[5]}" for name in names]
        (tmp_path / f"{split}_map.txt").write_text("\n".join(lines))
    found = read_as(tmp_path)
    assert found["train/n01441/2.png"] == ("train", "1") and found["val/n01440/0.png"] == ("val", "0")
    assert len(found) == 8
    with open_source(str(tmp_path)) as opened:
        assert "left out: 1 images that train_map.txt does not name" in opened.notes


def rows_of_tsv(make, labels: list[str]) -> bytes:
    rows = ("\t".join([f"key_{i}", label, base64.b64encode(make.file(i)).decode()]) for i, label in enumerate(labels))
    return ("\n".join(rows) + "\n").encode()


@pytest.mark.parametrize("indexed", [False, True])
def test_the_published_tsv_files(tmp_path, make, indexed):
    train = rows_of_tsv(make, ["0", "1", "0"])
    make.folder(tmp_path, {"train.tsv": train, "val.tsv": rows_of_tsv(make, ["0", "1"])})
    if indexed:
        starts = [0, *(i + 1 for i, byte in enumerate(train[:-1]) if byte == 10)]
        (tmp_path / "train.lineidx").write_text("".join(f"{start}\n" for start in starts))
    found = read_as(tmp_path)
    assert found["train/key_1.png"] == ("train", "1") and found["val/key_0.png"] == ("val", "0") and len(found) == 5
    assert read_as(tmp_path / "train.tsv", val_fraction=0)["key_2.png"] == ("train", "0")


def test_labels_of_a_published_tsv_in_json(tmp_path, make):
    (tmp_path / "x.tsv").write_bytes(rows_of_tsv(make, ['[{"class": "n01440764"}]', '[{"class": "n01443537"}]']))
    assert read_as(tmp_path / "x.tsv", val_fraction=0)["key_0.png"] == ("train", "n01440764")


# --- Hugging Face data sets


def write_arrow(path: Path, make, labels: list[int], first: int = 0) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    images = [{"bytes": make.file(first + i), "path": f"{i}.png"} for i in range(len(labels))]
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema(
        {"image": kind, "label": pa.int64()}, metadata={"huggingface": json.dumps({"info": {"features": features}})}
    )
    table = pa.table({"image": images, "label": labels}, schema=schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=2)
        return
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        writer.write_table(table, max_chunksize=2)


@pytest.mark.parametrize("form", ["arrow", "parquet"])
def test_a_hugging_face_data_set_on_disk(tmp_path, make, form):
    for split, labels in (("train", [0, 1, 1]), ("test", [1, -1])):
        names = [f"{split}/data-00000-of-00001.arrow"] if form == "arrow" else [f"data/{split}-00000-of-00001.parquet"]
        for name in names:
            write_arrow(tmp_path / name, make, labels)
    make.folder(tmp_path, {"dataset_dict.json": b"{}", "train/state.json": b"{}"})
    found = read_as(tmp_path)
    assert sorted(found.values(), key=str) == sorted(
        [("train", "cat"), ("train", "dog"), ("train", "dog"), ("val", "dog"), ("val", None)], key=str
    )


def test_without_pyarrow_one_line_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "data-00000-of-00001.arrow").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr("esvit_core.data.ingest.arrow_files.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs pyarrow; install the extra `esvit\[formats\]`"):
        check_source(str(tmp_path))


def test_a_damaged_arrow_file_is_one_line(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "data.arrow").write_bytes(b"no arrow file at all")
    with pytest.raises(UserError, match="expected a column of encoded images"), open_source(str(tmp_path)):
        pass


def test_shards_are_prepared_like_a_folder_of_the_same_images(store, prepared, tmp_path, make):
    shards(tmp_path / "set", make)
    manifest = prepared(tmp_path / "set", val_fraction=0)
    assert manifest.samples == 6 and manifest.classes == ["0", "1"] and manifest.splits["train"].labeled
    assert manifest.ignored_kinds == {".cls": 6, ".txt": 6} and any(
        "images in 3 .tar" in line for line in manifest.reading
    )
