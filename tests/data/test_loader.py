"""Batches: identical however they are loaded, divided among ranks, and resumable within an epoch."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from prepared_data import shards_of

from esvit_core.config import Config
from esvit_core.data.loading.loader import Batch, TrainLoader
from esvit_core.data.shards.reader import ShardDataset
from esvit_core.storage import IntegrityError

SMALL = {
    "augment": {
        "global_crops": {"size": 16, "number": 2, "scale": (0.4, 1.0)},
        "local_crops": {"size": 8, "number": 2, "scale": (0.05, 0.4)},
    },
}


def config(workers: int = 0, batch_size: int = 4) -> Config:
    return Config.from_mapping({**SMALL, "training": {"workers": workers, "batch_size": batch_size}})


@pytest.fixture
def dataset(store, prepared, folder, tmp_path) -> ShardDataset:
    """Eighteen images: four batches of four, and two left over."""
    prepared(folder, shard_mib=0.02, val_fraction=0.0)
    return ShardDataset(store, store.uri("data"), "train", tmp_path / "cache")


def same(a: Iterable[Batch], b: Iterable[Batch]) -> bool:
    return all(
        np.array_equal(x.indices, y.indices) and all(torch.equal(c, d) for c, d in zip(x.crops, y.crops, strict=True))
        for x, y in zip(a, b, strict=True)
    )


def test_batches_have_the_shapes_of_the_recipe(dataset):
    loader = TrainLoader(dataset, config(), seed=0)
    batches = list(loader.epoch(0))
    assert len(batches) == loader.steps_per_epoch == 4
    for batch in batches:
        assert [tuple(c.shape) for c in batch.crops] == [(4, 3, 16, 16)] * 2 + [(4, 3, 8, 8)] * 2
        assert batch.wait_seconds > 0
    assert len({i for b in batches for i in b.indices.tolist()}) == 16


def test_epochs_differ_and_repeat(dataset):
    loader = TrainLoader(dataset, config(), seed=0)
    assert same(loader.epoch(1), TrainLoader(dataset, config(), seed=0).epoch(1))
    assert not same(loader.epoch(0), loader.epoch(1))
    assert not same(loader.epoch(0), TrainLoader(dataset, config(), seed=1).epoch(0))


@pytest.mark.parametrize("start", [1, 3, 4])
def test_an_epoch_resumes_where_it_stopped(dataset, start):
    loader = TrainLoader(dataset, config(), seed=0)
    assert same(list(loader.epoch(2))[start:], loader.epoch(2, start_step=start))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batch_of_one(dataset, world):
    alone = list(TrainLoader(dataset, config(), seed=0).epoch(0))
    ranks = [list(TrainLoader(dataset, config(), 0, rank, world).epoch(0)) for rank in range(world)]
    joined = [
        Batch(
            [torch.cat(parts) for parts in zip(*(b.crops for b in step), strict=True)],
            np.concatenate([b.indices for b in step]),
            0.0,
        )
        for step in zip(*ranks, strict=True)
    ]
    assert same(alone, joined)


def test_worker_processes_change_nothing(dataset):
    """An epoch that is abandoned in the middle, as on a stop, changes nothing either."""
    here, there = TrainLoader(dataset, config(), seed=0), TrainLoader(dataset, config(workers=2), seed=0)
    assert same(here.epoch(0), there.epoch(0))
    next(there.epoch(1))
    assert same(here.epoch(2, start_step=1), there.epoch(2, start_step=1))


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_data_are_a_one_line_error(store, dataset, workers):
    for shard in shards_of(dataset):
        store.put_bytes(f"{store.uri('data')}/{shard.name}", b"damaged")
    with pytest.raises(IntegrityError, match=r"train-00000-00\d-[0-9a-f]{16}\.tar: damaged") as error:
        list(TrainLoader(dataset, config(workers), seed=0).epoch(0))
    assert "Traceback" not in str(error.value)
