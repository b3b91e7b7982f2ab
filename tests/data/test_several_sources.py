"""Several sources as one data set, and how often training takes the images of each."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest

from esvit_core.config import DataConfig
from esvit_core.data.ingest.inspect_source import inspect_source
from esvit_core.data.ingest.prepare import prepare
from esvit_core.data.ingest.source_lists import join_sources, split_sources
from esvit_core.data.ingest.sources import check_source, is_listed, source_fingerprint
from esvit_core.data.loading.sampler import epoch_order, rank_batches, weighted_length
from esvit_core.data.shards.reader import ShardDataset
from esvit_core.errors import UserError


@pytest.fixture
def photos(tmp_path, make) -> str:
    """Images without labels."""
    return str(make.folder(tmp_path / "photos", {f"{i}.png": make.file(300 + i) for i in range(8)}))


def both(*sources: object) -> str:
    return join_sources([str(source) for source in sources])


def names(store, at: str, split: str) -> dict[str, int]:
    data = ShardDataset(store, store.uri(at), split)
    return {data.name(i): data.label(i) for i in range(len(data))}


def test_a_list_of_sources_is_written_with_bars():
    assert split_sources(both("a b", "s3://b/c,d")) == ["a b", "s3://b/c,d"] and split_sources("a|b") == ["a|b"]
    with pytest.raises(UserError, match="cannot contain"):
        join_sources(["a", "b | c"])


def test_each_source_is_understood_by_itself(store, prepared, folder, photos, tmp_path, make):
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        for name, data in {
            "class1/a.png": make.file(71),
            "new/b.png": make.file(72),
            "new/c.png": make.file(73),
        }.items():
            archive.writestr(name, data)
    manifest = prepared(both(folder, photos, tmp_path / "more.zip"), val_fraction=0.3)
    assert manifest.classes == ["class0", "class1", "class2", "new"] and manifest.samples == 29
    train, val = names(store, "data", "train"), names(store, "data", "val")
    assert train["2/0.png"] == -1 and sum(name.startswith("2/") for name in train) == 8
    assert not any(name.startswith("2/") for name in val), "images without labels are not held out beside labelled ones"
    assert (train | val)["3/class1/a.png"] == 1 and (train | val)["3/new/b.png"] == 3
    assert manifest.splits["val"].labeled and any(line.startswith("source 2: ") for line in manifest.reading)


def test_splits_of_several_sources(tmp_path, photos, make):
    one = make.folder(tmp_path / "one", {f"{s}/a/{i}.png": make.file(i) for s in ("train", "val") for i in range(2)})
    two = make.folder(tmp_path / "two", {f"{s}/b/{i}.png": make.file(i) for s in ("train", "test") for i in range(2)})
    found = inspect_source(both(one, two, photos), DataConfig())
    assert found.summary()["splits"] == {"train": 4, "val": 2, "test": 2} and found.summary()["images"] == 16
    assert "there are no validation images" not in "\n".join(found.lines)
    assert "there are no validation images: the test" in "\n".join(
        inspect_source(both(two, photos), DataConfig()).lines
    )


def test_sources_without_images_to_train_on_are_refused(prepared, tmp_path, make):
    held_out = make.folder(tmp_path / "x", {f"{split}/1.png": make.file(1) for split in ("val", "test")})
    with pytest.raises(UserError, match="no images to train on; expected them in one of the sources"):
        prepared(both(held_out, held_out))


def test_the_fingerprint_follows_the_content_and_the_order(tmp_path, folder, photos, make):
    copy = make.folder(tmp_path / "elsewhere", {f"{i}.png": make.file(300 + i) for i in range(8)})
    first = source_fingerprint(both(folder, photos))
    assert first == source_fingerprint(both(folder, copy)) and is_listed(both(folder, photos))
    assert len({first, source_fingerprint(both(photos, folder)), source_fingerprint(photos)}) == 3


def test_an_error_names_the_source_that_has_it(folder, tmp_path):
    with pytest.raises(UserError, match="nowhere: does not exist"):
        check_source(both(folder, tmp_path / "nowhere"))


def test_several_sources_grow_incrementally(store, folder, photos, make):
    config = DataConfig(val_fraction=0.3)
    source = both(folder, photos)
    before = prepare(source, store, store.uri("one"), config)
    make.folder(folder, {"class0/new.png": make.file(999)})
    after = prepare(source, store, store.uri("two"), config, base=store.uri("one"))
    assert after.samples == before.samples + 1
    assert names(store, "one", "val").items() <= names(store, "two", "val").items()


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0]])
def test_the_number_of_weights_is_that_of_the_sources(prepared, folder, photos, weights):
    with pytest.raises(UserError, match=r"data\.weights has \d weights, and there are 2 sources"):
        prepared(both(folder, photos), weights=weights)


def test_weights_say_how_often_an_epoch_takes_the_images_of_a_source(store, prepared, folder, photos):
    manifest = prepared(both(folder, photos), weights=[2.0, 0.5], val_fraction=0.3, shard_mib=0.01)
    train = ShardDataset(store, store.uri("data"), "train")
    from_photos = np.array([train.name(i).startswith("2/") for i in range(len(train))])
    assert (
        train.weights is not None
        and set(train.weights[from_photos]) == {0.5}
        and set(train.weights[~from_photos]) == {2}
    )
    assert manifest.splits["train"].epoch_samples == 2 * (~from_photos).sum() + from_photos.sum() // 2
    assert ShardDataset(store, store.uri("data"), "val").weights is None
    counts = np.zeros(len(train), dtype=int)
    for epoch in range(10):
        order = epoch_order(3, epoch, train.shard_sizes, weights=train.weights)
        assert len(order) == manifest.splits["train"].epoch_samples
        counts += np.bincount(order % len(train), minlength=len(train))
    assert abs(counts[from_photos] - 5).max() <= 2 and abs(counts[~from_photos] - 20).max() <= 2


def test_weights_are_part_of_the_identity_and_their_absence_is_not():
    assert "weights" not in DataConfig().identity_values()
    assert DataConfig(weights=(2.0, 1.0)).identity_values()["weights"] == [2.0, 1.0]


def test_occurrences_of_one_image_in_an_epoch_have_different_numbers():
    weights = np.array([3, 1, 1], dtype=np.float32)
    order = epoch_order(0, 0, [3], weights=weights)
    assert sorted(order.tolist()) == [0, 1, 2, 3, 6] and weighted_length(weights) == 5


@pytest.mark.parametrize("world", [1, 2, 3])
def test_weighted_batches_do_not_depend_on_the_number_of_ranks(world):
    weights = np.array([0.3, 1.7, 2.0, 1.0] * 5, dtype=np.float32)
    order = epoch_order(1, 4, [7, 13], weights=weights)
    alone = rank_batches(order, 6, 0, 1)
    ranks = [rank_batches(order, 6, rank, world) for rank in range(world)]
    assert all(np.array_equal(a, np.concatenate(each)) for a, each in zip(alone, zip(*ranks, strict=True), strict=True))
