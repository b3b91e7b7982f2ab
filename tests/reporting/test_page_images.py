"""The report shows held-out images with their nearest training images, and what the worst classes are taken for."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from esvit_core.config import DataConfig
from esvit_core.data.ingest.prepare import prepare
from esvit_core.data.shards.manifest import Manifest
from esvit_core.data.shards.reader import ShardDataset
from esvit_core.errors import UserError
from esvit_core.evaluation.outcomes import pack_outcomes
from esvit_core.evaluation.plots import CLASS_COLORS
from esvit_core.reporting import feature_map, neighbors
from esvit_core.reporting.feature_map import draw_feature_map, principal_components
from esvit_core.reporting.neighbors import choose_queries, draw_neighbors, draw_worst_classes
from esvit_core.storage import ObjectStore

CLASSES = ("blue", "green", "red")


@pytest.fixture
def run(store: ObjectStore, tmp_path: Path) -> str:
    """A run with 12 training and 4 held-out images of each color."""
    for number, name in enumerate(CLASSES):
        for i in range(16):
            folder = tmp_path / "images" / ("train" if i < 12 else "val") / name
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.full((20, 20, 3), 5 * i, np.uint8)
            pixels[..., number] = 200
            Image.fromarray(pixels).save(folder / f"{i:02}.png")
    uri = store.uri("runs/a")
    prepare(str(tmp_path / "images"), store, f"{uri}/data", DataConfig())
    return uri


def write_features(store: ObjectStore, run: str, folder: Path, wrong: tuple[int, ...] = ()) -> None:
    """One-hot features of the class, except that held-out images in ``wrong`` look like the next class; noise as baseline."""
    rng = np.random.default_rng(0)
    files = {}
    for split in ("train", "val"):
        labels = ShardDataset(store, f"{run}/data", split).labels
        seen = (labels + np.isin(np.arange(len(labels)), wrong if split == "val" else ())) % 3
        for model in ("trained", "baseline"):
            view = np.eye(3, dtype=np.float32)[seen] if model == "trained" else rng.normal(size=(len(labels), 3))
            files[f"{model}-{split}.safetensors"] = folder / f"{model}-{split}.safetensors"
            arrays = {"view": view.astype(np.float32), "labels": labels}
            save_file(arrays, files[f"{model}-{split}.safetensors"])
    store.publish(f"{run}/features", files, "features")


def test_right_and_wrong_queries_are_shown_with_neighbors_of_both_backbones(
    store: ObjectStore, run: str, tmp_path: Path
) -> None:
    write_features(store, run, tmp_path, wrong=(0, 5))
    drawn = draw_neighbors(store, run)
    assert not isinstance(drawn, str)
    assert drawn.searched == 36
    held_out = ShardDataset(store, f"{run}/data", "val")
    names = {held_out.name(i): i for i in range(len(held_out))}
    right = [query for query in drawn.queries if query.neighbors["trained"][0].right]
    wrong = [query for query in drawn.queries if not query.neighbors["trained"][0].right]
    assert len(right) == 3 and {query.image.label for query in right} == set(CLASSES)
    assert sorted(names[query.image.name] for query in wrong) == [0, 5]
    for query in drawn.queries:
        assert [len(of_model) for of_model in query.neighbors.values()] == [5, 5]
        for each in query.neighbors["trained"] + query.neighbors["baseline"]:
            assert each.right is (each.label == query.image.label) and each.uri.startswith("data:image/png;base64,")


def test_images_without_labels_have_neighbors_that_are_neither_right_nor_wrong(
    store: ObjectStore, tmp_path: Path
) -> None:
    (tmp_path / "flat").mkdir()
    for i in range(16):
        Image.fromarray(np.full((20, 20, 3), 9 * i, np.uint8)).save(tmp_path / "flat" / f"{i}.png")
    uri = store.uri("runs/b")
    prepare(str(tmp_path / "flat"), store, f"{uri}/data", DataConfig(val_fraction=0.25))
    write_features(store, uri, tmp_path)
    drawn = draw_neighbors(store, uri)
    assert not isinstance(drawn, str)
    shown = [each for query in drawn.queries for each in query.neighbors["trained"]]
    assert len(drawn.queries) == min(6, len(ShardDataset(store, f"{uri}/data", "val"))) > 0
    assert {each.right for each in shown} == {None} and {each.label for each in shown} == {""}


def test_without_features_or_with_too_large_ones_the_reason_is_said(
    store: ObjectStore, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="not extracted yet"):
        draw_neighbors(store, run)
    write_features(store, run, tmp_path)
    monkeypatch.setattr(neighbors, "MOST_BYTES", 100)
    with pytest.raises(UserError, match=r"trained-train.safetensors has 0\.0 GB, more than is read here"):
        draw_neighbors(store, run)


def test_queries_are_spread_over_the_classes() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2, 2])
    nearest = np.array([0, 0, 1, 1, 1, 2, 0])
    assert choose_queries(labels, nearest) == [0, 3, 5, 2, 6]
    assert choose_queries(np.full(9, -1), np.full(9, -1)) == [0, 1, 2, 3, 4, 5]


def test_the_worst_classes_come_first_with_their_mistakes(store: ObjectStore, run: str) -> None:
    manifest, labels = Manifest.read(store, f"{run}/data"), ShardDataset(store, f"{run}/data", "val").labels
    correct = np.ones(len(labels), bool)
    correct[np.flatnonzero(labels == 2)[:3]] = False
    correct[np.flatnonzero(labels == 0)[:1]] = False
    linear = {"name": "linear", "outcomes": pack_outcomes("x", {"trained": {"linear": correct}})}
    worst = draw_worst_classes(store, run, manifest, [linear])
    assert [(each.name, each.correct, each.images, len(each.mistakes)) for each in worst] == [
        ("red", 25.0, 4, 3),
        ("blue", 75.0, 4, 1),
    ]
    assert all(image.label == "red" and "red/" in image.name for image in worst[0].mistakes)
    assert draw_worst_classes(store, run, manifest, [{"name": "linear"}]) == []
    fewer = {"name": "linear", "outcomes": pack_outcomes("x", {"trained": {"linear": correct[:-1]}})}
    assert draw_worst_classes(store, run, manifest, [fewer]) == [], "the outcomes are of other images"


def test_principal_components_are_those_of_the_normalized_features() -> None:
    x = np.random.default_rng(3).normal(size=(40, 6)) * [5, 3, 1, 1, 1, 1]
    points, share = principal_components(x)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    u, values, _ = np.linalg.svd(unit - unit.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(points), np.abs(u[:, :2] * values[:2]), atol=1e-9)
    assert share == pytest.approx((values[:2] ** 2).sum() / (values**2).sum())
    assert principal_components(np.ones((5, 4)))[1] == pytest.approx(0, abs=1e-6)


def test_the_feature_map_shows_both_backbones_and_the_largest_classes(
    store: ObjectStore, run: str, tmp_path: Path
) -> None:
    write_features(store, run, tmp_path)
    drawn = draw_feature_map(store, run, ["$blue", "<b>green</b>", "\x00red"])
    assert drawn is not None
    png, caption = drawn
    with Image.open(io.BytesIO(png)) as image:
        assert image.size[0] > image.size[1] > 300
        colors = {f"#{r:02x}{g:02x}{b:02x}" for r, g, b in np.asarray(image.convert("RGB")).reshape(-1, 3)[::3]}
    assert colors >= set(CLASS_COLORS[:3]) and not colors & set(CLASS_COLORS[3:])
    assert "12 held-out images" in caption and "baseline" in caption and "trained 100 %" in caption


def test_the_feature_map_is_that_of_umap_where_it_is_installed(
    store: ObjectStore, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict] = []

    class Umap:
        def __init__(self, **settings: object) -> None:
            asked.append(settings)

        def fit_transform(self, features: np.ndarray) -> np.ndarray:
            assert features.shape == (12, 3)
            return features[:, :2]

    write_features(store, run, tmp_path)
    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Umap))
    too_few = draw_feature_map(store, run, list(CLASSES))
    assert too_few is not None and "principal components" in too_few[1] and not asked
    monkeypatch.setattr(feature_map, "_NEIGHBORS", 5)
    drawn = draw_feature_map(store, run, list(CLASSES))
    assert drawn is not None and drawn[1].startswith(
        "UMAP (cosine distance) of the view features of 12 held-out images"
    )
    assert len(asked) == 2 and asked[0]["metric"] == "cosine" and asked[0]["random_state"] == 0
