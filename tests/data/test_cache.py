"""The cache of shards: limited in size, keeps open shards, and uses a private folder."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from prepared_data import shards_of

from esvit_core.data.shards.cache import default_cache, size_limit
from esvit_core.data.shards.reader import ShardDataset
from esvit_core.errors import UserError
from esvit_core.storage import ObjectStore, StoreFull, parallel_transfer


@pytest.fixture
def opened(store, prepared, folder, tmp_path):
    """Open the same data, in several shards of 20 KiB, again: ``opened() -> ShardDataset``."""
    prepared(folder, shard_mib=0.02, val_fraction=0.0)
    return lambda: ShardDataset(store, store.uri("data"), "train", tmp_path / "cache")


def kept(place: Path) -> list[str]:
    return sorted(path.stem for path in place.glob("cache/*.tar"))


def limit_to(monkeypatch, dataset: ShardDataset, shards: int) -> int:
    """Limit the cache to a number of shards of the largest size; return the limit in bytes."""
    limit = shards * max(shard.bytes for shard in shards_of(dataset))
    monkeypatch.setenv("ESVIT_CACHE_GIB", repr(limit / 2**30))
    return limit


def first_of_each_shard(dataset: ShardDataset) -> list[int]:
    return [sum(dataset.shard_sizes[:i]) for i in range(len(dataset.shard_sizes))]


def test_the_cache_stays_below_its_limit_and_evicts_the_least_recently_opened(opened, tmp_path, monkeypatch):
    monkeypatch.setattr("esvit_core.data.shards.cache._IN_USE", 1)
    limit = limit_to(monkeypatch, opened(), 2)
    dataset = opened()
    names = [shard.sha256 for shard in shards_of(dataset)]
    assert sum(shard.bytes for shard in shards_of(dataset)) > 2 * limit
    for number, index in enumerate(first_of_each_shard(dataset), start=1):
        dataset.image(index)
        left = kept(tmp_path)
        assert left == sorted(names[number - len(left) : number]) and len(left) >= min(number, 2)
        assert sum(path.stat().st_size for path in tmp_path.glob("cache/*.tar")) <= limit
    del dataset
    oldest = next(name for name in names if name in kept(tmp_path))
    opened().image(first_of_each_shard(opened())[names.index(oldest)])  # now the most recently opened
    opened().image(0)
    assert {oldest, names[0]} <= {*kept(tmp_path)}


def _hold(dataset: ShardDataset, index: int, ready, over) -> None:
    dataset.image(index)
    ready.set()
    over.wait(60)
    dataset.image(index)


def test_a_shard_that_another_process_has_open_stays(opened, tmp_path, monkeypatch):
    monkeypatch.setattr("esvit_core.data.shards.cache._IN_USE", 1)
    limit_to(monkeypatch, opened(), 1)
    context = multiprocessing.get_context("fork")
    ready, over = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(opened(), 0, ready, over))
    other.start()
    assert ready.wait(60)
    dataset = opened()
    for index in first_of_each_shard(dataset)[1:]:
        dataset.image(index)
    names = [shard.sha256 for shard in shards_of(dataset)]
    assert names[0] in kept(tmp_path) and names[1] not in kept(tmp_path)
    over.set()
    other.join(60)
    assert other.exitcode == 0
    dataset.image(first_of_each_shard(dataset)[1])
    assert names[0] not in kept(tmp_path)


def test_open_shards_stay_even_beyond_the_limit(opened, tmp_path, monkeypatch):
    limit_to(monkeypatch, opened(), 1)
    dataset = opened()
    assert len(dataset.shard_sizes) <= 8
    monkeypatch.setattr(ObjectStore, "get_file", counted := _Counted())
    for _ in range(3):
        for index in first_of_each_shard(dataset):
            dataset.image(index)
    assert counted.calls == len(dataset.shard_sizes)


def test_a_folder_that_is_deleted_during_a_download_is_named(opened, tmp_path, monkeypatch):
    dataset = opened()
    write = parallel_transfer.write_at

    def write_at(descriptor, data, offset):
        shutil.rmtree(tmp_path / "cache")
        write(descriptor, data, offset)

    monkeypatch.setattr(parallel_transfer, "write_at", write_at)
    with pytest.raises(UserError, match=r"/cache: the folder of the shard cache was deleted while in use; start again"):
        dataset.image(0)


class _Counted:
    """Count the downloads."""

    def __init__(self) -> None:
        self.calls, self._get = 0, ObjectStore.get_file

    def __get__(self, store, kind):
        def get(uri, path):
            self.calls += 1
            return self._get(store, uri, path)

        return get


def test_unused_shards_are_removed_when_the_disk_is_full(opened, tmp_path, monkeypatch):
    before = opened()
    first, second, *_ = first_of_each_shard(before)
    before.image(first)
    del before
    get = ObjectStore.get_file

    def small(store, uri, path):
        if list(path.parent.glob("*.tar")):
            raise StoreFull(f"{path}: the disk is full")
        get(store, uri, path)

    monkeypatch.setattr(ObjectStore, "get_file", small)
    dataset = opened()
    dataset.image(second)
    assert kept(tmp_path) == [shards_of(dataset)[1].sha256]
    with pytest.raises(StoreFull, match="disk is full"):  # the only cached shard is in use
        dataset.image(first)


def test_old_shards_and_partial_downloads_are_removed(opened, tmp_path):
    dataset = opened()
    first, second, *_ = first_of_each_shard(dataset)
    expected = dataset.image(first)
    (old,) = (tmp_path / "cache").glob("*.tar")
    half = old.with_name(".0123.part")
    half.write_bytes(b"half")
    for path in (old, half):
        os.utime(path, (1, 1))
    dataset.image(second)
    assert old.exists() and not half.exists()  # it is open here
    del dataset
    opened().image(first_of_each_shard(opened())[2])
    assert not old.exists()
    assert np.array_equal(opened().image(first), expected)


@pytest.mark.parametrize("text", ["much", "0", "-1", "nan", "inf"])
def test_an_invalid_limit_is_a_user_error(opened, monkeypatch, text):
    monkeypatch.setenv("ESVIT_CACHE_GIB", text)
    with pytest.raises(UserError, match=f"ESVIT_CACHE_GIB={text}: expected a positive number of GiB"):
        opened()
    monkeypatch.setenv("ESVIT_CACHE_GIB", "1.5")
    assert size_limit() == 3 * 2**29


def test_the_default_location_of_the_cache(store, tmp_path, monkeypatch):
    monkeypatch.delenv("ESVIT_CACHE_DIR", raising=False)
    assert default_cache(store) == store.address.directory / "cache"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    elsewhere = ObjectStore(store.address)
    object.__setattr__(elsewhere, "address", type(store.address)(**{**vars(store.address), "directory": None}))
    place = default_cache(elsewhere)
    assert place == tmp_path / f"esvit-cache-{os.geteuid()}" and place.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("ESVIT_CACHE_DIR", str(tmp_path))
    assert default_cache(store) == tmp_path
