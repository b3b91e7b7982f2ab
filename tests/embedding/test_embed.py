"""Features of new images equal those of the evaluation, and the file is written atomically."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from esvit_core.config import Config
from esvit_core.embedding import embed as embedding
from esvit_core.embedding import feature_files
from esvit_core.embedding.embed import EmbedSettings, embed
from esvit_core.errors import UserError
from esvit_core.models import create_backbone
from esvit_core.weights.backbone import describe_backbone

CONFIG = Config.from_mapping(
    {
        "data": {"store_short_side": 30, "val_fraction": 0},
        "model": {
            "arch": "swin",
            "patch_size": 4,
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [1, 2],
            "window_size": 4,
        },
        "augment": {"global_crops": {"size": 32, "number": 2, "scale": [0.4, 1.0]}},
        "evaluation": {"resize": 36, "crop": 32, "batch_size": 4},
    }
)


@pytest.fixture(scope="module")
def backbone() -> torch.nn.Module:
    torch.manual_seed(0)
    made = create_backbone(CONFIG.model, img_size=32, drop_path=0.0).eval()
    made.backbone_config = describe_backbone(made, CONFIG)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, images: Any) -> Path:
    """Eleven images in two classes; one is a gray JPEG, one is rotated by its EXIF entry."""
    made: Path = images.folder(tmp_path_factory.mktemp("new") / "images", ["a", "b"], 5)
    turned = Image.open(made / "a" / "0-000.png").resize((50, 40))
    turned.save(
        made / "a" / "turned.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    )
    Image.open(made / "b" / "1-000.png").convert("L").save(made / "b" / "1-000.jpg")
    (made / "b" / "1-001.png").unlink()
    return made


def test_features_match_those_of_the_evaluation(backbone: Any, folder: Path, tmp_path: Path, store: Any) -> None:
    from esvit_core.data.ingest.prepare import prepare
    from esvit_core.data.shards.reader import ShardDataset
    from esvit_core.evaluation.features import features_of

    done = embed(backbone, str(folder), tmp_path / "f.parquet", EmbedSettings(batch_size=4))
    assert (done.images, done.width, done.region_map, done.bad) == (11, 16, None, [])
    table = pq.read_table(done.path)
    found = dict(zip(table["name"].to_pylist(), np.stack(table["view"].to_numpy()), strict=True))
    prepare(str(folder), store, store.uri("data"), CONFIG.data)
    dataset = ShardDataset(store, store.uri("data"), "train", tmp_path / "cache")
    measured = features_of(backbone, dataset, CONFIG, label="features").view
    assert len(dataset) == 11
    for i in range(len(dataset)):
        np.testing.assert_allclose(found[dataset.name(i)], measured[i], atol=2e-6)
    labels = dict(zip(table["name"].to_pylist(), table["label"].to_pylist(), strict=True))
    assert labels == {dataset.name(i): dataset.classes[dataset.label(i)] for i in range(len(dataset))}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_regions_are_maps_in_both_formats(backbone: Any, folder: Path, tmp_path: Path, dtype: Any) -> None:
    settings = EmbedSettings(regions=True, dtype=dtype, batch_size=3)
    done = embed(backbone, str(folder), tmp_path / "f.parquet", settings)
    embed(backbone, str(folder), tmp_path / "f.npz", settings)
    assert done.region_map == (4, 4, 16)
    table, arrays = pq.read_table(tmp_path / "f.parquet"), np.load(tmp_path / "f.npz")
    regions = table["regions"].combine_chunks()
    assert isinstance(regions.type, pa.FixedShapeTensorType) and regions.type.value_type == pa.type_for_alias(dtype)
    maps = regions.to_numpy_ndarray()  # (N, H, W, D)
    assert maps.shape == (11, 4, 4, 16) and maps.dtype == dtype
    assert np.array_equal(maps, arrays["regions"]) and arrays["regions"].dtype == dtype
    assert (
        arrays["name"].tolist() == table["name"].to_pylist() and arrays["label"].tolist() == table["label"].to_pylist()
    )
    view = np.stack(table["view"].to_numpy())
    assert np.array_equal(view, arrays["view"]) and view.dtype == np.float32
    np.testing.assert_allclose(maps.astype(np.float32).mean((1, 2)), view, atol=2e-3)
    facts = json.loads(str(arrays["esvit"]))
    assert facts == json.loads(table_facts(tmp_path / "f.parquet")) and facts["backbone"]["arch"] == "swin"
    assert "float32" in facts["precision"]


def table_facts(path: Path) -> bytes:
    return pq.ParquetFile(path).metadata.metadata[b"esvit"]


def test_memory_does_not_grow_with_the_number_of_images(
    backbone: Any, folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """A row group is written as soon as it is full, here after every second batch."""
    monkeypatch.setattr(feature_files, "_GROUP_BYTES", 2 * 2 * 16 * 4)
    embed(backbone, str(folder), tmp_path / "f.parquet", EmbedSettings(batch_size=2))
    groups = pq.ParquetFile(tmp_path / "f.parquet").metadata
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [4, 4, 3]


def test_images_without_classes_and_in_other_sources(backbone: Any, folder: Path, tmp_path: Path, store: Any) -> None:
    with tarfile.open(tmp_path / "new.tar", "w") as archive:
        for file in sorted((folder / "a").iterdir()):
            archive.add(file, file.name)
            store.put_file(store.uri(f"new/test/{file.name}"), file)
    embed(backbone, str(tmp_path / "new.tar"), tmp_path / "tar.npz")
    embed(backbone, store.uri("new"), tmp_path / "s3.npz", store=store)
    tar, s3 = np.load(tmp_path / "tar.npz"), np.load(tmp_path / "s3.npz")
    assert tar["label"].tolist() == [""] * 6 and s3["label"].tolist() == [""] * 6
    assert [f"test/{name}" for name in tar["name"].tolist()] == s3["name"].tolist()
    assert np.array_equal(tar["view"], s3["view"])


def test_bad_images_are_counted_and_listed(backbone: Any, images: Any, tmp_path: Path) -> None:
    made = images.folder(tmp_path / "images", [""], 6)
    (made / "0-002.png").write_bytes((made / "0-002.png").read_bytes()[:200])
    (made / "note.txt").write_text("no image")
    (made / ".DS_Store").write_bytes(b"ignored")
    settings = EmbedSettings(max_bad_fraction=0.5, batch_size=2)
    done = embed(backbone, str(made), tmp_path / "f.npz", settings)
    assert done.images == 5 and "1 bad file left out" in done.describe()
    listed = [json.loads(line) for line in done.bad_list.read_text().splitlines()]
    assert [entry["name"] for entry in listed] == ["0-002.png"] and listed[0]["reason"].startswith("truncated")
    assert "0-002.png" not in np.load(done.path)["name"]
    with pytest.raises(
        UserError, match=r"1 of 6 files are bad so far, more than the allowed 5 %: .*--max-bad-fraction"
    ):
        embed(backbone, str(made), tmp_path / "other.npz")
    assert not list(tmp_path.glob("other*")) and not list(tmp_path.glob(".esvit-*"))


def test_the_limits_on_size_and_shape_can_be_raised(backbone: Any, images: Any, tmp_path: Path) -> None:
    made = images.folder(tmp_path / "images", [""], 2)
    Image.new("RGB", (1010, 10)).save(made / "long.png")
    done = embed(backbone, str(made), tmp_path / "a.npz", EmbedSettings(max_bad_fraction=1, max_megapixels=0.01))
    assert done.bad == [("long.png", "too large (0.0101 megapixels, more than max_megapixels 0.01)")]
    done = embed(backbone, str(made), tmp_path / "b.npz", EmbedSettings(max_bad_fraction=1))
    assert done.bad == [("long.png", "too long (1,010 x 10 pixels, more than max_aspect_ratio 100)")]
    assert embed(backbone, str(made), tmp_path / "c.npz", EmbedSettings(max_aspect_ratio=101)).images == 3


def test_mistakes_are_user_errors(backbone: Any, folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "there.npz").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.txt").write_text("x")
    for source, out, settings, message in [
        (folder, "f.csv", {}, r"ends in \.parquet or \.npz"),
        (folder, "there.npz", {}, "already exists"),
        (tmp_path / "nowhere", "f.npz", {}, "does not exist"),
        (tmp_path / "empty", "f.npz", {}, "no images in it"),
        (tmp_path / "none", "f.npz", {"max_bad_fraction": 1.0}, r"no images in it \(ignored: 1 \.txt\)"),
    ]:
        with pytest.raises(UserError, match=message):
            embed(backbone, str(source), tmp_path / out, EmbedSettings(**settings))
        assert out == "there.npz" or not (tmp_path / out).exists()
    monkeypatch.setattr(feature_files, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pyarrow is not installed; pip install 'esvit\[export\]'"):
        embed(backbone, str(folder), tmp_path / "f.parquet")


def test_features_that_are_not_finite_are_refused(
    backbone: Any, folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    huge = (np.ones((1, 16), np.float32), np.full((1, 4, 4, 16), 1e5, np.float32))
    with pytest.raises(UserError, match="not finite"):
        embedding._rows(["a"], [None], huge, "float16")
    assert embedding._rows(["a"], [None], huge, "float32").regions is not None


def test_bfloat16_features_are_close(backbone: Any, folder: Path, tmp_path: Path) -> None:
    for precision in ("float32", "bfloat16"):
        embed(backbone, str(folder), tmp_path / f"{precision}.npz", EmbedSettings(precision=precision))  # type: ignore[arg-type]
    exact, near = (np.load(tmp_path / f"{name}.npz")["view"] for name in ("float32", "bfloat16"))
    assert not np.array_equal(exact, near)
    np.testing.assert_allclose(near, exact, atol=0.1)
