"""The shards of the next window are in the cache before they are needed."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from esvit_core.config import Config
from esvit_core.data.loading.loader import TrainLoader
from esvit_core.data.loading.sampler import epoch_order, rank_batches
from esvit_core.data.loading.shard_prefetch import AHEAD, ShardPrefetcher, first_uses
from esvit_core.data.shards.reader import ShardDataset
from esvit_core.storage import ObjectStore


class Shards:
    """Records which shards are fetched."""

    def __init__(self, number: int, fails: int | None = None) -> None:
        self.shard_sizes, self.fails = [4] * number, fails
        self.fetched: list[int] = []
        self.changed = threading.Condition()

    def fetch_shard(self, number: int) -> None:
        with self.changed:
            self.fetched.append(number)
            self.changed.notify()
        if number == self.fails:
            raise OSError("the store is away")

    def wait_for(self, count: int) -> list[int]:
        """Return the shards once there are so many, sorted: several are fetched at a time."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.fetched) >= count, 20)
        time.sleep(0.05)  # it would go on
        return sorted(self.fetched)


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 3)])
def test_the_first_use_of_each_shard(rank, world):
    sizes = [5, 1, 7, 4, 30, 2]
    batches = rank_batches(epoch_order(3, 0, sizes, window=2), 6, rank, world)
    starts = np.cumsum([0, *sizes])
    expected: dict[int, int] = {}
    for position, indices in enumerate(batches):
        for index in indices:
            expected.setdefault(int(np.searchsorted(starts, index, side="right")) - 1, position)
    found = first_uses(batches, sizes)
    assert {shard: position for position, shard in found} == expected
    assert [position for position, _ in found] == sorted(expected.values())
    assert first_uses([], sizes) == []


def test_so_many_shards_ahead_of_those_in_use_are_fetched():
    shards = Shards(30)
    prefetcher = ShardPrefetcher(shards)
    prefetcher.plan([(shard // 8 * 10, shard) for shard in range(30)])
    assert shards.wait_for(8 + AHEAD) == list(range(8 + AHEAD))
    prefetcher.reach(9)
    assert len(shards.wait_for(8 + AHEAD)) == 8 + AHEAD
    prefetcher.reach(10)
    assert shards.wait_for(16 + AHEAD) == list(range(16 + AHEAD))
    prefetcher.reach(30)
    assert shards.wait_for(30) == list(range(30))
    prefetcher.plan([(0, 7)])  # the next epoch
    assert shards.wait_for(31) == sorted([*range(30), 7])


def test_a_shard_is_fetched_while_another_one_takes_long():
    shards, go = Shards(3), threading.Event()
    fetch = shards.fetch_shard

    def slow(number: int) -> None:
        fetch(number)
        if number == 0:
            assert go.wait(20)

    shards.fetch_shard = slow  # type: ignore[method-assign]
    ShardPrefetcher(shards).plan([(0, shard) for shard in range(3)])
    assert shards.wait_for(3) == [0, 1, 2]
    go.set()


def test_a_shard_that_cannot_be_fetched_is_left_to_its_reader(monkeypatch):
    monkeypatch.setattr("esvit_core.data.loading.shard_prefetch._PAUSE_SECONDS", 0.01)
    shards = Shards(4, fails=1)
    ShardPrefetcher(shards).plan([(0, shard) for shard in range(4)])
    assert shards.wait_for(4) == [0, 1, 2, 3]


@pytest.mark.parametrize("workers", [0, 2])
def test_training_finds_the_next_shards_in_the_cache(store, prepared, make, tmp_path, workers):
    """Of three windows of shards, the second one is there while the first one is used."""
    files = {f"{number}.png": make.file(make.pixels(number, 60, 60)) for number in range(60)}
    prepared(make.folder(tmp_path / "images", files), shard_mib=0.02, val_fraction=0.0)
    dataset = ShardDataset(store, store.uri("data"), "train", tmp_path / "cache")
    assert len(dataset.shard_sizes) > 2 * AHEAD + 2
    config = Config.load("demo", [f"training.workers={workers}", "training.batch_size=2"])
    batches = TrainLoader(dataset, config, seed=0).epoch(0)
    next(batches)
    end = time.monotonic() + 20
    while len(list((tmp_path / "cache").glob("*.tar"))) <= AHEAD and time.monotonic() < end:
        time.sleep(0.02)
    assert len(list((tmp_path / "cache").glob("*.tar"))) > AHEAD
    assert len(list(batches)) == 29


def test_an_unchanged_shard_is_verified_once(store, prepared, folder, tmp_path, monkeypatch):
    prepared(folder, val_fraction=0.0)
    ShardDataset(store, store.uri("data"), "train", tmp_path / "cache").fetch_shard(0)
    monkeypatch.setattr("hashlib.file_digest", _fail)
    monkeypatch.setattr(ObjectStore, "get_file", _fail)
    ShardDataset(store, store.uri("data"), "train", tmp_path / "cache").image(0)


def _fail(*_: object) -> None:
    raise AssertionError("verified or downloaded again")
