"""Fingerprints of sources: names, sizes and content count; location and dates do not."""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esvit_core.data.ingest import fingerprint as module
from esvit_core.data.ingest.sources import open_source, source_fingerprint
from esvit_core.storage import ObjectStore
from esvit_core.storage.embedded import EmbeddedStore
from esvit_core.storage.marker import MARKER, mark

FILES = {"cat/1.png": b"one", "cat/sub/2.png": b"two", "dög/ü 3.png": b"three"}


@pytest.fixture
def source(tmp_path: Path, make) -> Path:
    return make.folder(tmp_path / "first", FILES)


def aged(place: Path, seconds: int) -> Path:
    for path in (place, *place.rglob("*")):
        os.utime(path, (seconds, seconds))
    return place


def test_a_copy_with_other_dates_in_another_folder_has_the_same_fingerprint(source: Path, tmp_path: Path) -> None:
    aged(source, 1_000)
    copy = aged(Path(shutil.copytree(source, tmp_path / "mounted elsewhere" / "b")), 2_000)
    assert source_fingerprint(str(copy)) == source_fingerprint(str(source))
    (copy / ".DS_Store").write_bytes(b"x")
    assert source_fingerprint(str(copy)) == source_fingerprint(str(source))
    with open_source(str(source)) as opened:
        assert source_fingerprint(str(source), opened=opened) == source_fingerprint(str(source))


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "longer", "edited"])
def test_a_change_of_any_file_changes_the_fingerprint(source: Path, change: str) -> None:
    before = source_fingerprint(str(source))
    path = source / "cat/1.png"
    if change == "added":
        (source / "new.png").write_bytes(b"one")
    elif change == "removed":
        path.unlink()
    elif change == "renamed":
        path.rename(source / "dög/1.png")
    else:
        path.write_bytes({"longer": b"one!", "edited": b"eno"}[change])
        os.utime(path, (1_000, 1_000))
    assert source_fingerprint(str(source)) != before


def test_the_same_objects_in_another_bucket_have_the_same_fingerprint(store) -> None:
    for place in ("a", "other/b"):
        for name, data in FILES.items():
            store.put_bytes(store.uri(f"{place}/{name}"), data)
    first = source_fingerprint(store.uri("a"), store)
    assert source_fingerprint(store.uri("other/b"), store) == first
    store.put_bytes(store.uri("a/cat/1.png"), b"eno")
    assert source_fingerprint(store.uri("a"), store) != first


def test_the_part_size_of_an_upload_does_not_change_the_fingerprint(store, tmp_path, monkeypatch) -> None:
    (tmp_path / "large.png").write_bytes(os.urandom(6 * 2**20))
    for place, part in (("a", 5 * 2**20), ("b", 8 * 2**20)):
        monkeypatch.setattr("esvit_core.storage.parallel_transfer.PART_BYTES", part)
        store.put_file(store.uri(f"{place}/large.png"), tmp_path / "large.png")
    (first,), (second,) = (list(store.list(store.uri(place))) for place in "ab")
    assert first.etag != second.etag
    assert source_fingerprint(store.uri("a"), store) == source_fingerprint(store.uri("b"), store)


def archived(source: Path, path: Path) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in FILES.items():
                archive.writestr(zipfile.ZipInfo(name), data)
    else:
        with tarfile.open(path, "w") as tar:
            tar.add(source, "x")
    return path


@pytest.mark.parametrize("whole", [2**20, 1000])
@pytest.mark.parametrize("ending", ["zip", "tar"])
def test_the_fingerprint_of_an_archive_depends_on_its_content_only(
    source: Path, store, tmp_path: Path, monkeypatch, ending: str, whole: int
) -> None:
    monkeypatch.setattr(module, "_WHOLE_ARCHIVE", whole)
    monkeypatch.setattr(module, "_PIECE", 64)
    path = archived(source, tmp_path / f"a.{ending}")
    first = source_fingerprint(str(path))
    copy = shutil.copyfile(path, tmp_path / f"b.{ending}")
    os.utime(copy, (5, 5))
    store.put_file(store.uri(f"in/c.{ending}"), path)
    assert source_fingerprint(str(copy)) == first == source_fingerprint(store.uri(f"in/c.{ending}"), store)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(data)
    assert source_fingerprint(str(copy)) != first


def test_of_many_files_a_sample_is_read(tmp_path: Path, make, monkeypatch) -> None:
    monkeypatch.setattr(module, "SAMPLE", 5)
    folder = make.folder(tmp_path / "x", {f"{i:03d}.png": b"0123456789" for i in range(60)})
    before = source_fingerprint(str(folder))
    seen = 0
    for path in sorted(folder.iterdir()):
        path.write_bytes(b"0123456780")
        seen += source_fingerprint(str(folder)) != before
        path.write_bytes(b"012345678")
        assert source_fingerprint(str(folder)) != before
        path.write_bytes(b"0123456789")
    assert seen == 5 and source_fingerprint(str(folder)) == before


def test_only_the_ends_of_a_large_file_are_read(tmp_path: Path, make) -> None:
    data = bytearray(os.urandom(300_000))
    folder = make.folder(tmp_path / "x", {"1.png": bytes(data)})
    before = source_fingerprint(str(folder))
    for place, same in ((0, False), (150_000, True), (299_999, False)):
        data[place] ^= 1
        (folder / "1.png").write_bytes(data)
        assert (source_fingerprint(str(folder)) == before) is same
        data[place] ^= 1


names = st.text(st.sampled_from("abcü. "), min_size=1, max_size=6).map(lambda text: f"n{text}n.png")
trees = st.dictionaries(names, st.binary(max_size=6), min_size=1, max_size=5)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=trees, second=trees, dates=st.lists(st.integers(0, 2**31), min_size=2, max_size=2))
def test_two_folders_have_the_same_fingerprint_exactly_if_their_content_is_the_same(make, first, second, dates) -> None:
    with tempfile.TemporaryDirectory() as place:
        folders = [
            aged(make.folder(Path(place) / name, files), date)
            for name, files, date in zip(["a", "b/c"], [first, second], dates, strict=True)
        ]
        one, other = (source_fingerprint(str(folder)) for folder in folders)
        assert (one == other) is (first == second)


def test_stores_and_runs_inside_the_data_are_ignored(source: Path) -> None:
    """`esvit run` in the folder of images stores everything below it, in esvit-runs."""
    before = source_fingerprint(str(source))
    server = EmbeddedStore(source / "esvit-runs" / "store")
    store = ObjectStore(server.start())
    try:
        store.ensure_bucket("esvit")
        store.put_bytes("s3://esvit/runs/a/data", b"x" * 100_000)
        assert source_fingerprint(str(source)) == before
    finally:
        server.stop()
    run = source / "esvit-runs" / "demo-0123456789"
    run.mkdir()
    mark(run)
    (run / "backbone.png").write_bytes(b"x")
    assert source_fingerprint(str(source)) == before
    (source / "esvit-runs" / "mine.png").write_bytes(b"x")
    assert source_fingerprint(str(source)) != before


@pytest.mark.parametrize("files", [{"identities.json", "security.toml"}, {"config.yaml", "run.log"}])
def test_an_unmarked_store_or_run_is_recognized(source: Path, make, files: set[str]) -> None:
    before = source_fingerprint(str(source))
    make.folder(source / "old", dict.fromkeys([*files, "data/1.png"], b"x"))
    assert source_fingerprint(str(source)) == before


def test_a_folder_that_only_resembles_ours_belongs_to_the_data(source: Path, make) -> None:
    before = source_fingerprint(str(source))
    make.folder(source / "esvit-runs", {MARKER: b"mine", "1.png": b"x"})
    assert source_fingerprint(str(source)) != before
