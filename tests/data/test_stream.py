"""Samples from shards: correct, verified, and shared between processes."""

from __future__ import annotations

import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from prepared_data import shards_of

from esvit_core.data.shards.format import read_part
from esvit_core.data.shards.manifest import Manifest
from esvit_core.data.shards.reader import ShardDataset
from esvit_core.errors import UserError
from esvit_core.storage import IntegrityError, NotFound, ObjectStore


@pytest.fixture
def dataset(store, prepared, folder, tmp_path) -> ShardDataset:
    """Eighteen labelled images in several shards."""
    prepared(folder, shard_mib=0.02, val_fraction=0.0)
    return ShardDataset(store, store.uri("data"), "train", tmp_path / "cache")


def test_samples_are_the_images_of_the_folder(dataset, make):
    assert len(dataset) == 18 and len(dataset.shard_sizes) > 2 and sum(dataset.shard_sizes) == 18
    names = [dataset.name(i) for i in range(18)]
    assert sorted(names) == sorted(make.labeled())
    for i, name in enumerate(names):
        number = int(name[5]) * 100 + int(name[7])
        assert np.array_equal(dataset.image(i), make.pixels(number))
        assert dataset.label(i) == dataset.labels[i] == int(name[5])
        assert dataset.image(i).flags.writeable
    with pytest.raises(IndexError):
        dataset.image(18)


def test_jpeg_is_decoded_as_by_pillow(store, prepared, make, tmp_path):
    for mode in ("RGB", "L"):
        folder = make.folder(tmp_path / mode, {"1.jpg": make.file(make.pixels(1, 200, 150), "JPEG")})
        prepared(folder, at=mode, val_fraction=0.0)
        image = ShardDataset(store, store.uri(mode), "train", tmp_path / "cache").image(0)
        assert image.shape == (150, 200, 3)
        assert np.abs(image.astype(int) - make.pixels(1, 200, 150)).mean() < 4


def test_nothing_is_downloaded_before_it_is_needed(dataset, tmp_path):
    assert not list((tmp_path / "cache").glob("*.tar"))
    dataset.image(0)
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 1


@pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied"])
def test_a_damaged_cache_is_detected_and_downloaded_again(store, dataset, tmp_path, damage):
    before = [dataset.image(i) for i in range(18)]
    for path in (tmp_path / "cache").glob("*.tar"):
        data = bytearray(path.read_bytes())
        data[700] ^= 0xFF
        path.write_bytes({"flipped": bytes(data), "truncated": bytes(data[:-600]), "emptied": b""}[damage])
    again = ShardDataset(store, store.uri("data"), "train", tmp_path / "cache")
    assert all(np.array_equal(again.image(i), before[i]) for i in range(18))


def test_a_damaged_shard_in_the_store_is_an_error_and_stays_out_of_the_cache(store, dataset, tmp_path):
    uri = f"{store.uri('data')}/{shards_of(dataset)[0].name}"
    data = bytearray(store.get_bytes(uri))
    data[600] ^= 1
    store.put_bytes(uri, bytes(data))
    with pytest.raises(IntegrityError, match=r"train-00000-000-[0-9a-f]{16}\.tar: damaged"):
        dataset.image(0)
    assert not list((tmp_path / "cache").glob("*.tar"))


def test_a_damaged_index_is_an_error(store, dataset):
    (reference,) = Manifest.read(store, store.uri("data")).parts
    index = read_part(store, store.uri("data"), reference).index.name
    for name in (index, reference.name):
        store.put_bytes(store.uri(f"data/{name}"), b"something else")
        with pytest.raises(IntegrityError, match=f"{name}: damaged"):
            ShardDataset(store, store.uri("data"), "train").image(0)


def test_missing_data_and_splits_are_errors(store, dataset):
    with pytest.raises(NotFound, match="no prepared data"):
        ShardDataset(store, store.uri("elsewhere"), "train")
    with pytest.raises(UserError, match="no split 'val'; the data has train"):
        ShardDataset(store, store.uri("data"), "val")


def test_a_manifest_of_another_kind_is_an_error(store):
    store.put_json(store.uri("data/manifest.json"), {"format": "esvit-features/1"})
    with pytest.raises(UserError, match="not a manifest of prepared data"):
        Manifest.read(store, store.uri("data"))


def test_a_cache_that_is_not_writable_is_an_error(store, prepared, folder, tmp_path):
    prepared(folder)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="ESVIT_CACHE_DIR"):
        ShardDataset(store, store.uri("data"), "train", tmp_path / "file" / "cache").image(0)


def _read_all(dataset: ShardDataset, barrier, results) -> None:
    barrier.wait()
    results.put([int(dataset.image(i).sum()) for i in range(len(dataset))])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_share_a_cache(store, dataset, tmp_path, method):
    """Two concurrent processes with an empty cache, forked while it is in use or started afresh."""
    if method == "fork":
        dataset.image(0)
    context = multiprocessing.get_context(method)
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_read_all, args=(dataset, barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    sums = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sums[0] == sums[1] == [int(dataset.image(i).sum()) for i in range(18)]
    left = {path.suffix for path in (tmp_path / "cache").iterdir()}
    assert left == {".tar", ".lock"} and len(list((tmp_path / "cache").glob("*.tar"))) == len(dataset.shard_sizes)


def test_a_cached_shard_is_not_downloaded_again(store, dataset, tmp_path, monkeypatch):
    expected = [dataset.image(i) for i in range(18)]
    other = ShardDataset(store, store.uri("data"), "train", tmp_path / "cache")
    monkeypatch.setattr(ObjectStore, "get_file", _never)
    assert all(np.array_equal(other.image(i), expected[i]) for i in range(18))


def _never(*arguments: object) -> None:
    raise AssertionError("not to be called")


def test_threads_and_few_open_files(dataset, monkeypatch):
    monkeypatch.setattr("esvit_core.data.shards.cache._OPEN_FILES", 2)
    expected = [int(dataset.image(i).sum()) for i in range(18)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: int(dataset.image(i % 18).sum()), range(180)))
    assert found == expected * 10


def test_a_pickled_dataset_reads(dataset):
    dataset.image(0)
    copy = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(copy.image(5), dataset.image(5))


def test_a_shard_truncated_while_read_is_an_error_about_the_cache(dataset, tmp_path):
    dataset.encoded(0)
    for path in (tmp_path / "cache").glob("*.tar"):
        with path.open("r+b") as file:
            file.truncate(600)
    with pytest.raises(IntegrityError, match=r"cache/[0-9a-f]{64}\.tar: was truncated .*ESVIT_CACHE_DIR"):
        dataset.encoded(dataset.shard_sizes[0] - 1)
