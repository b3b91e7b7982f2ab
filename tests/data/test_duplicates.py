"""Statistics of the data: duplicates, overlap of the splits, sizes and colors; and duplicates that are dropped."""

from __future__ import annotations

import io
import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from esvit_core.config import DataConfig
from esvit_core.data.ingest import prepare as module
from esvit_core.data.ingest.incremental import read_listing
from esvit_core.data.ingest.near_duplicates import DISTANCE, find_superfluous, group_alike
from esvit_core.data.ingest.prepare import prepare
from esvit_core.data.shards.manifest import Manifest
from esvit_core.data.shards.reader import ShardDataset
from esvit_core.errors import UserError


def photograph(make, seed: int, width: int = 160, height: int = 120) -> Image.Image:
    return Image.fromarray(make.pixels(seed, width, height))


def encoded(image: Image.Image, quality: int = 90) -> bytes:
    content = io.BytesIO()
    image.save(content, "JPEG", quality=quality)
    return content.getvalue()


@pytest.fixture
def split_folder(tmp_path, make):
    """Ten training and five held-out images; held out are a copy, a smaller version and three others."""
    files = {f"train/{c}/{i}.jpg": encoded(photograph(make, 10 * n + i)) for n, c in enumerate("ab") for i in range(5)}
    files["val/a/copy.jpg"] = files["train/a/0.jpg"]
    files["val/b/small.jpg"] = encoded(photograph(make, 12).resize((120, 90), Image.Resampling.LANCZOS), 75)
    files |= {f"val/{c}/{i}.jpg": encoded(photograph(make, 70 + i)) for i, c in enumerate("aab")}
    files["train/b/again.jpg"] = files["train/b/1.jpg"]
    return make.folder(tmp_path / "source", files)


def statistics_of(store, at: str = "data") -> dict:
    manifest = Manifest.read(store, store.uri(at))
    return json.loads(store.get_bytes(store.uri(f"{at}/{manifest.statistics}")))


def stored_names(store, at: str = "data") -> set[str]:
    found = set()
    for split in Manifest.read(store, store.uri(at)).splits:
        data = ShardDataset(store, store.uri(at), split)
        found |= {data.name(i) for i in range(len(data))}
    return found


def test_duplicates_and_overlap_are_counted_and_named(store, prepared, split_folder):
    pytest.importorskip("imagehash")
    manifest = prepared(split_folder)
    found = statistics_of(store)
    assert found["images"] == 16
    assert (found["duplicates"]["groups"], found["duplicates"]["images"]) == (2, 4)
    assert (found["near_duplicates"]["groups"], found["near_duplicates"]["images"]) == (1, 2)
    assert (found["overlap"]["identical"], found["overlap"]["alike"]) == (1, 1)
    pairs = [{each["name"] for each in pair} for pair in found["overlap"]["examples"]]
    assert pairs == [{"val/a/copy.jpg", "train/a/0.jpg"}, {"val/b/small.jpg", "train/b/2.jpg"}]
    for each in found["overlap"]["examples"][0]:
        assert ShardDataset(store, store.uri("data"), each["split"]).name(each["number"]) == each["name"]
    lines = "\n".join(manifest.reading)
    assert "odd: 4 images in 2 groups are identical" in lines and "2 images in 1 group are alike" in lines
    assert "odd: 2 held-out images equal a training image or look like one (val/a/copy.jpg and train/a/0.jpg)" in lines


def test_sizes_formats_colors_and_class_balance(store, prepared, tmp_path, make):
    red = np.zeros((20, 40, 3), np.uint8)
    red[..., 0] = 200
    files = {"a/1.png": make.file(red), "a/2.png": make.file(red[:, :30]), "b/3.jpg": make.file(red[:10], "JPEG")}
    files["b/4.tif"] = make.file(np.full((20, 40), 51400, np.uint16), "TIFF")
    prepared(make.folder(tmp_path / "x", files), val_fraction=0, intensity="0..65535")
    found = statistics_of(store)
    assert found["width"] == {"min": 30, "median": 40, "max": 40} and found["height"]["min"] == 10
    assert found["aspect"] == {"min": 1.5, "median": 2.0, "max": 4.0}
    assert found["modes"] == {"PNG RGB": 2, "JPEG RGB": 1, "TIFF 16-bit": 1}
    assert np.abs(np.array(found["color"]) - [200, 50, 50]).max() < 2
    assert found["per_class"] == {"min": 2, "median": 2, "max": 2}


def test_images_of_one_color_do_not_look_alike(store, prepared, tmp_path, make):
    pytest.importorskip("imagehash")
    files = {f"{i}.png": make.file(np.full((40, 40, 3), 20 * i, np.uint8)) for i in range(8)}
    prepared(make.folder(tmp_path / "x", files), val_fraction=0)
    assert statistics_of(store)["near_duplicates"]["groups"] == 0


@pytest.mark.parametrize(
    ("setting", "dropped"),
    [
        ("none", set()),
        ("exact", {"val/a/copy.jpg", "train/b/again.jpg"}),
        ("near", {"val/a/copy.jpg", "train/b/again.jpg", "val/b/small.jpg"}),
    ],
)
def test_duplicates_are_dropped_only_if_that_is_set(store, prepared, split_folder, setting, dropped):
    if setting == "near":
        pytest.importorskip("imagehash")
    everything = {str(path.relative_to(split_folder)) for path in split_folder.rglob("*.jpg")}
    manifest = prepared(split_folder, drop_duplicates=setting)
    missing = everything - stored_names(store)
    # Which of two training images comes first depends on the order of storage.
    renamed = {"train/b/again.jpg" if name == "train/b/1.jpg" else name for name in missing}
    assert renamed == dropped and manifest.dropped == len(dropped) and manifest.bad.count == 0
    listing = read_listing(store, store.uri("data"), manifest)
    assert all(listing[name].status == "duplicate" and "duplicate of" in listing[name].reason for name in missing)
    assert (f"{len(dropped)} duplicates dropped" in manifest.describe()) == bool(dropped)


def test_dropping_needs_the_package_only_for_images_that_look_alike(prepared, folder, monkeypatch):
    monkeypatch.setattr(module, "can_compare_looks", lambda: False)
    with pytest.raises(UserError, match=r"needs imagehash; install the extra esvit\[duplicates\]"):
        prepared(folder, drop_duplicates="near")
    assert prepared(folder, drop_duplicates="exact").samples == 18


def test_without_the_package_the_statistics_say_so(store, prepared, folder, monkeypatch):
    for place in ("image_facts", "statistics"):
        monkeypatch.setattr(f"esvit_core.data.ingest.{place}.can_compare_looks", lambda: False)
    prepared(folder)
    assert "esvit[duplicates]" in statistics_of(store)["near_duplicates"]["left_out"]
    assert statistics_of(store)["duplicates"]["groups"] == 0


def test_a_new_duplicate_of_an_earlier_image_is_dropped(store, split_folder, make):
    config = DataConfig(drop_duplicates="exact")
    before = prepare(str(split_folder), store, store.uri("one"), config)
    make.folder(
        split_folder,
        {"train/a/new copy.jpg": encoded(photograph(make, 3)), "train/a/new.jpg": encoded(photograph(make, 99))},
    )
    after = prepare(str(split_folder), store, store.uri("two"), config, base=store.uri("one"))
    assert after.samples == before.samples + 1 and "train/a/new.jpg" in stored_names(store, "two")
    assert "train/a/new copy.jpg" not in stored_names(store, "two")


def test_dropped_duplicates_are_part_of_the_identity():
    assert "drop_duplicates" not in DataConfig().identity_values()
    assert DataConfig(drop_duplicates="exact").identity_values()["drop_duplicates"] == "exact"


def flipped(value: int, bits: list[int]) -> int:
    for bit in bits:
        value ^= 1 << bit
    return value


def test_hashes_are_grouped_exactly_by_their_distance():
    random.seed(0)
    looks, wanted = [], []
    for _ in range(300):
        value = random.getrandbits(64)
        close = flipped(value, random.sample(range(64), DISTANCE))
        far = flipped(value, random.sample(range(64), DISTANCE + 8))
        wanted.append([len(looks), len(looks) + 1])
        looks += [value, close, far]
    hashes = np.array(looks, dtype=np.uint64)
    assert group_alike(hashes) == wanted
    found = find_superfluous(np.arange(900, dtype=np.uint64), hashes, np.zeros(900), "near", apart=False)
    assert [found[first : first + 3].tolist() for first in range(0, 900, 3)] == [[-1, i, -1] for i in range(0, 900, 3)]


def test_images_alike_through_others_are_one_group_and_those_without_a_hash_are_in_none():
    first = 0x0123456789ABCDEF
    second = flipped(first, [0, 1, 2])
    third = flipped(second, [20, 30, 40])
    hashes = np.array([0, first, second, 0, third], dtype=np.uint64)
    assert group_alike(hashes) == [[1, 2, 4]]
    # The last one looks like the second only, which is left out, so it is kept.
    found = find_superfluous(np.arange(5, dtype=np.uint64), hashes, np.zeros(5), "near", apart=False)
    assert found.tolist() == [-1, -1, 1, -1, -1]


digests_and_splits = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1)), max_size=20)


@given(digests_and_splits, st.sampled_from(["none", "exact"]), st.booleans())
def test_a_copy_is_left_out_if_that_is_set_or_if_the_splits_would_share_it(images, drop, apart):
    digests, splits = (np.array([image[i] for image in images], dtype=np.uint64) for i in (0, 1))
    found = find_superfluous(digests, np.zeros(len(images), np.uint64), splits, drop, apart)
    for number, original in enumerate(found.tolist()):
        first = next(i for i in range(number + 1) if digests[i] == digests[number])
        superfluous = first < number and (drop == "exact" or (apart and splits[first] != splits[number]))
        assert original == (first if superfluous else -1)
