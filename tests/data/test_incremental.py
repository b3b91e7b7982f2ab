"""Incremental preparation: only new images are read, the others are reused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prepared_data import names_of_objects, shards_below

from esvit_core.config import DataConfig
from esvit_core.data.ingest import listing
from esvit_core.data.ingest import prepare_part as module
from esvit_core.data.ingest.incremental import read_listing
from esvit_core.data.ingest.listing import (
    File,
    FileTable,
    changes,
    compare,
    content_digest,
    decode_listing,
    encode_listing,
    hash_touched_files,
    hash_touched_files_in,
    scan_source,
)
from esvit_core.data.ingest.prepare import prepare
from esvit_core.data.shards.manifest import Manifest
from esvit_core.data.shards.reader import ShardDataset

CONFIG = DataConfig(val_fraction=0.3, shard_mib=0.01)


@pytest.fixture
def grow(store, monkeypatch):
    """Prepare a source on top of earlier data: ``manifest, names of the files that were read = grow(...)``."""

    def run(source, at, base=None, config=CONFIG, scan=None):
        read: list[str] = []
        load = module.load
        monkeypatch.setattr(module, "load", lambda job, x: (read.append(x.entry.name), load(job, x))[1])
        base_uri = store.uri(base) if base else None
        manifest = prepare(str(source), store, store.uri(at), config, scan=scan, base=base_uri)
        monkeypatch.setattr(module, "load", load)
        return manifest, sorted(read)

    return run


def contents(store, at) -> dict[str, dict[str, tuple[str | None, bytes]]]:
    """Return class and content of every image in prepared data, by split and name."""
    manifest = Manifest.read(store, store.uri(at))
    found: dict[str, dict[str, tuple[str | None, bytes]]] = {}
    for split in manifest.splits:
        dataset = ShardDataset(store, store.uri(at), split)
        found[split] = {
            dataset.name(i): (manifest.classes[dataset.label(i)] if dataset.label(i) >= 0 else None, dataset.encoded(i))
            for i in range(len(dataset))
        }
    return found


def flat(found):
    return {name: entry for split in found.values() for name, entry in split.items()}


def test_only_new_images_are_read_and_the_others_are_reused(store, grow, folder, make):
    first, read = grow(folder, "one")
    assert len(read) == 18
    make.folder(folder, {f"class{i}/new{j}.png": make.file(900 + 10 * i + j) for i in range(3) for j in range(4)})
    second, read = grow(folder, "two", base="one")
    assert len(read) == 12 and all("new" in name for name in read)
    before, after = contents(store, "one"), contents(store, "two")
    for split in ("train", "val"):
        assert before[split].items() <= after[split].items()
    assert len(flat(after)) == 30 and second.samples == 30 and second.base == store.uri("one")
    assert second.fingerprint != first.fingerprint
    # Nothing is stored twice: the new data contain only the shards of the new images.
    new = {stat.uri.removeprefix(store.uri("two/")) for stat in store.list(store.uri("two"))}
    assert new == names_of_objects(store, store.uri("two"))
    old = [uri for uri, _ in shards_below(store, store.uri("one"))]
    assert {*old} == {uri for uri, _ in shards_below(store, store.uri("two")) if uri.startswith(store.uri("one"))}
    # The parts themselves are referred to.
    assert [part.located_in(store.uri("one")) for part in first.parts] == [p for p in second.parts if p.is_external]


def test_incremental_preparation_gives_the_images_and_splits_of_a_full_one(store, grow, folder, make):
    grow(folder, "one")
    make.folder(folder, {f"class{i}/new{j}.png": make.file(900 + 10 * i + j) for i in range(3) for j in range(8)})
    grow(folder, "two", base="one")
    grow(folder, "anew")
    assert contents(store, "two") == contents(store, "anew")


def test_a_removed_image_is_not_in_the_new_data(store, grow, folder):
    grow(folder, "one")
    gone = ["class0/0.png", "class1/3.png"]
    for name in gone:
        (folder / name).unlink()
    manifest, read = grow(folder, "two", base="one")
    assert read == [] and manifest.samples == 16
    assert flat(contents(store, "one")).keys() - flat(contents(store, "two")).keys() == set(gone)
    assert sum(manifest.splits["train"].per_class) + sum(manifest.splits["val"].per_class) == 16


def test_a_changed_image_is_read_again_and_keeps_its_split(store, grow, folder, make):
    grow(folder, "one")
    before = contents(store, "one")
    changed = {split: next(iter(sorted(names))) for split, names in before.items()}
    for split, name in changed.items():
        (folder / name).write_bytes(make.file(4321 + len(split)))
    _, read = grow(folder, "two", base="one")
    after = contents(store, "two")
    assert read == sorted(changed.values())
    for split, name in changed.items():
        assert after[split][name] != before[split][name]
        assert after[split].keys() == before[split].keys()


def test_a_file_known_to_be_bad_is_not_read_again_but_listed(store, grow, folder, make):
    (folder / "class0" / "broken.png").write_bytes(b"no image")
    config = CONFIG.model_copy(update={"max_bad_fraction": 0.5})
    assert grow(folder, "one", config=config)[0].bad.count == 1
    make.folder(folder, {"class0/new.png": make.file(77)})
    manifest, read = grow(folder, "two", base="one", config=config)
    assert read == ["class0/new.png"] and manifest.bad.count == 1
    assert b"broken.png" in store.get_bytes(store.uri(f"two/{manifest.bad.list}"))
    (folder / "class0" / "broken.png").write_bytes(make.file(78))
    manifest, read = grow(folder, "three", base="two", config=config)
    assert read == ["class0/broken.png"] and manifest.bad.count == 0


def test_a_new_class_gets_the_next_number_and_the_others_keep_theirs(store, grow, folder, make):
    grow(folder, "one")
    make.folder(folder, {f"bear/{j}.png": make.file(600 + j) for j in range(6)})
    manifest, _ = grow(folder, "two", base="one")
    assert manifest.classes == ["class0", "class1", "class2", "bear"]
    assert all(name.split("/")[0] == label for name, (label, _) in flat(contents(store, "two")).items())


def test_a_new_copy_of_an_image_that_is_trained_on_is_not_held_out(store, grow, folder):
    grow(folder, "one")
    trained = sorted(contents(store, "one")["train"])
    for number, name in enumerate(trained * 4):
        (folder / f"{name[:6]}" / f"copy{number}.png").write_bytes((folder / name).read_bytes())
    grow(folder, "two", base="one")
    after = contents(store, "two")
    assert not {data for _, data in after["train"].values()} & {data for _, data in after["val"].values()}


def test_a_chain_of_three_reads_each_image_from_its_original_shard(store, grow, folder, make):
    grow(folder, "one")
    for step, base in (("two", "one"), ("three", "two")):
        make.folder(
            folder, {f"class1/{step}{j}.png": make.file(700 + 10 * len(step) + ord(step[0]) + j) for j in range(3)}
        )
        _, read = grow(folder, step, base=base)
        assert len(read) == 3
    places = {uri.split("/")[3] for uri, _ in shards_below(store, store.uri("three"))}
    assert places == {"one", "two", "three"} and len(flat(contents(store, "three"))) == 24
    train = ShardDataset(store, store.uri("three"), "train")
    assert sum(train.shard_sizes) == len(train)


def test_files_added_after_the_scan_are_left_for_the_next_preparation(store, grow, folder, make):
    scan = scan_source(str(folder), store)
    make.folder(folder, {"class0/late.png": make.file(55)})
    (folder / "class1" / "0.png").write_bytes(make.file(54))  # changed after the scan
    manifest, read = grow(folder, "one", scan=scan)
    assert "class0/late.png" not in read and "class1/0.png" not in read and manifest.samples == 17
    assert manifest.source_fingerprint == scan.fingerprint
    assert grow(folder, "one", scan=scan)[0] == manifest  # the data exist already
    found = changes(in_the_listing(store, "one"), scan_source(str(folder), store).files)
    assert [*found] == [("new", "class0/late.png"), ("new", "class1/0.png")]


def test_files_that_are_not_chosen_do_not_count_as_new(store, grow, folder):
    config = CONFIG.model_copy(update={"max_images": 9})
    grow(folder, "one", config=config)
    before = in_the_listing(store, "one")
    assert compare(before, scan_source(str(folder), store).files).to_read == 0


def in_the_listing(store, at) -> FileTable:
    return read_listing(store, store.uri(at), Manifest.read(store, store.uri(at)))


def redate(folder: Path, seconds: int) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (seconds, seconds))


def test_a_copy_of_the_source_with_other_dates_is_not_read_again(store, grow, folder, make, tmp_path):
    (folder / "class0" / "broken.png").write_bytes(b"no image")
    config = CONFIG.model_copy(update={"max_bad_fraction": 0.5})
    grow(folder, "one", config=config)
    copy = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    redate(copy, 1_000)
    before = in_the_listing(store, "one")
    now = scan_source(str(copy), store).files
    assert compare(before, now).to_read == 19
    now.update(hash_touched_files_in(str(copy), store, before, now))
    assert compare(before, now).to_read == 0
    make.folder(copy, {"class0/new.png": make.file(77)})
    manifest, read = grow(copy, "two", base="one", config=config)
    assert read == ["class0/new.png"] and manifest.samples == 19 and manifest.bad.count == 1
    # The new listing has the new dates, so the next scan reads nothing.
    assert compare(in_the_listing(store, "two"), scan_source(str(copy), store).files).to_read == 0


def test_a_file_edited_without_a_change_of_size_is_read_again(store, grow, folder):
    grow(folder, "one")
    path = folder / "class0" / "0.png"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    redate(folder, 1_000)
    _, read = grow(folder, "two", base="one")
    assert read == ["class0/0.png"]


def test_an_edit_that_the_fingerprint_does_not_cover_is_warned_about(store, grow, tmp_path, make, capsys):
    def bitmap(seed, place=None):
        data = bytearray(make.file(make.pixels(seed, 400, 300), "BMP"))
        if place is not None:
            data[place] ^= 255
        return bytes(data)

    folder = make.folder(tmp_path / "x", {f"{i}.bmp": bitmap(i) for i in range(6)})
    first, _ = grow(folder, "one")
    assert "warning" not in capsys.readouterr().out
    (folder / "3.bmp").write_bytes(bitmap(3, place=180_000))  # in the middle of the file, not in its ends
    again, read = grow(folder, "one")
    output = capsys.readouterr().out
    assert again == first and not read
    assert "warning: 1 file was edited after being prepared" in output and "3.bmp" in output
    (folder / "3.bmp").write_bytes(bitmap(3))
    redate(folder, 1_000)
    grow(folder, "one")
    assert "warning" not in capsys.readouterr().out


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
files = st.builds(
    File,
    name=names,
    size=st.integers(0, 2**40),
    stamp=names,
    status=st.sampled_from([None, "train", "val", "test", "bad", "unreadable", "skipped"]),
    digest=st.text("0123456789abcdef", max_size=32),
    reason=st.text(max_size=8),
)
KINDS = ("new", "changed", "removed")
listings = st.lists(files, unique_by=lambda file: file.name, max_size=6)


@given(listings)
def test_a_listing_survives_encoding(listed):
    assert list(decode_listing(encode_listing(listed))) == listed
    assert encode_listing(listed) == encode_listing(list(listed))


@given(listings, listings)
def test_every_file_is_new_changed_removed_or_the_same(before, now):
    found = {
        kind: {name for change, name in changes(FileTable(before), FileTable(now)) if change == kind} for kind in KINDS
    }
    known, there = {file.name: file for file in before}, {file.name for file in now}
    same = {file.name for file in now if file.name in known and known[file.name].is_same(file)}
    assert found["new"] | found["changed"] | same == there and found["new"].isdisjoint(known)
    assert found["removed"] == {name for name, file in known.items() if file.split} - there
    difference = compare(FileTable(before), FileTable(now))
    assert [difference.new, difference.changed, difference.removed] == [len(found[kind]) for kind in KINDS]
    assert compare(FileTable(now), FileTable(now)).to_read == 0


def test_changes_of_a_prefix_are_detected_by_content(store, grow, folder, make, tmp_path: Path):
    for name, data in make.labeled(each=3).items():
        store.put_bytes(store.uri(f"in/{name}"), data)
    grow(store.uri("in"), "one")
    store.put_bytes(store.uri("in/class0/0.png"), make.file(0))  # the same again
    store.put_bytes(store.uri("in/class0/1.png"), make.file(12345))
    store.put_bytes(store.uri("in/class0/9.png"), make.file(9))
    store.remove(store.uri("in/class2/2.png"))
    found = changes(in_the_listing(store, "one"), scan_source(store.uri("in"), store).files)
    assert [*found] == [("changed", "class0/1.png"), ("new", "class0/9.png"), ("removed", "class2/2.png")]
    manifest, read = grow(store.uri("in"), "two", base="one")
    assert read == ["class0/1.png", "class0/9.png"] and manifest.samples == 9
    dataset = ShardDataset(store, store.uri("two"), "train", tmp_path / "cache")
    assert np.isfinite(dataset.image(0)).all()


@pytest.mark.parametrize("ending", ["zip", "tar"])
def test_an_archive_can_be_prepared_incrementally(store, grow, folder, make, tmp_path: Path, ending):
    def pack(name):
        return shutil.make_archive(str(tmp_path / name), ending, folder)

    grow(pack("first"), "one")
    make.folder(folder, {"class1/new.png": make.file(321)})
    changed = folder / "class0" / "0.png"
    size = changed.stat().st_size
    other = next(data for seed in range(600, 700) if len(data := make.file(seed)) <= size)
    changed.write_bytes(other.ljust(size, b"\0"))  # same size
    os.utime(changed, (1e9, 1e9))
    manifest, read = grow(pack("second"), "two", base="one")
    assert read == ["class0/0.png", "class1/new.png"] and manifest.samples == 19


contents_by_name = st.dictionaries(names, st.binary(min_size=1, max_size=2), max_size=8)


@given(contents_by_name, contents_by_name, st.integers(1, 4))
def test_a_file_counts_as_changed_exactly_if_its_content_did_whatever_its_date(before, now, sample):
    """The exception: nearly all dates differ and a sample is unchanged, so the source is taken for a copy."""

    def files(contents, stamp, known):
        return [
            File(name, len(data), stamp, "train" if known else None, content_digest(data) if known else "")
            for name, data in contents.items()
        ]

    earlier, seen, read = FileTable(files(before, "old", True)), FileTable(files(now, "new", False)), []
    listing._COPY_SAMPLE, kept = sample, listing._COPY_SAMPLE
    try:
        seen.update(hash_touched_files(earlier, seen, lambda file: (read.append(file.name), now[file.name])[1]))
    finally:
        listing._COPY_SAMPLE = kept
    found = {kind: {name for change, name in changes(earlier, seen) if change == kind} for kind in KINDS}
    changed = {name for name in now if name in before and now[name] != before[name]}
    assert found["new"] == now.keys() - before.keys()
    assert found["removed"] == before.keys() - now.keys()
    assert found["changed"] <= changed
    redated = {name for name in now if name in before and len(now[name]) == len(before[name])}
    if {*read} >= redated:
        assert found["changed"] == changed
    else:  # taken for a copy
        assert len(redated) > 0.9 * len(before) and len(read) == sample and not changed & {*read}
