"""Features from a file: which files are read, how rows are matched with images, and one clear message for each mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from esvit_core.config import Config
from esvit_core.embedding.feature_files import Rows, open_feature_file
from esvit_core.errors import UserError
from esvit_core.evaluation import imported_features
from esvit_core.evaluation.import_backbone import import_backbone
from esvit_core.evaluation.imported_features import NamedFeatures, match_features, read_features_file
from esvit_core.weights.weight_source import WeightsNotFound, find

NAMES = ["a/1.png", "a/2.png", "b/1.png"]
VIEW = np.arange(12, dtype=np.float32).reshape(3, 4) / 7


def parquet(path: Path, /, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def read(path: Path) -> NamedFeatures:
    return read_features_file(path, path.name)


@pytest.mark.parametrize("suffix", [".parquet", ".npz"])
def test_what_embed_writes_is_read_to_the_bit(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"features{suffix}"
    file = open_feature_file(path)
    file.add(Rows(NAMES[:2], ["a", "a"], VIEW[:2], np.zeros((2, 3, 3, 5), np.float16)))
    file.add(Rows(NAMES[2:], ["b"], VIEW[2:], np.zeros((1, 3, 3, 5), np.float16)))
    file.close({"source": "images"})
    found = read(path)
    assert found.names == NAMES and found.view.dtype == np.float32
    np.testing.assert_array_equal(found.view, VIEW)


def test_other_tables_are_read(tmp_path: Path) -> None:
    lists = parquet(tmp_path / "lists.parquet", path=NAMES, features=VIEW.astype(np.float64).tolist(), size=[1, 2, 3])
    columns = {f"f{i}": VIEW[:, i] for i in range(4)}
    numbered = parquet(tmp_path / "numbered.parquet", name=NAMES, **columns)
    np.savez(tmp_path / "numbered.npz", name=np.array(NAMES), **columns)
    np.save(tmp_path / "array.npy", VIEW)
    (tmp_path / "array.txt").write_text("\n".join(NAMES) + "\n", encoding="utf-8")
    for path in (lists, numbered, tmp_path / "numbered.npz", tmp_path / "array.npy"):
        found = read(path)
        assert found.names == NAMES, path
        np.testing.assert_array_equal(found.view, VIEW)


NAN = [[0.0, float("nan")], [1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"file": NAMES, "features": VIEW.tolist()}, "expected a column name or path, and view, features or f0, f1"),
        ({"name": NAMES, "label": NAMES}, "it has name, label"),
        ({"name": NAMES, "f0": [1.0, 2, 3], "f2": [1.0, 2, 3]}, "column f1 is missing; expected f0 to f1"),
        ({"name": ["a", "b", "a"], "features": VIEW.tolist()}, "1 of 2 names occur more than once, such as a;"),
        ({"name": ["a", None, "b"], "features": VIEW.tolist()}, "1 of 3 rows have no name"),
        ({"name": NAMES, "features": NAN}, "1 of 3 rows have NaN or infinite values, such as a/1.png"),
        ({"name": NAMES, "features": [[1.0, 2], [1.0, 2], [1.0]]}, "1 of 3 rows do not have 2 values as the others, "),
        (
            {"name": NAMES, "features": [[1.0, 2], None, [1.0, 3]]},
            "such as a/2.png with 0; write features of one length",
        ),
        ({"name": NAMES, "view": [[], [], []]}, "expected numbers of shape"),
    ],
)
def test_a_mistake_is_one_line_with_counts_and_examples(columns: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read(parquet(tmp_path / "f.parquet", **columns))
    assert message in str(error.value) and str(error.value).startswith("features f.parquet: ")
    assert "\n" not in str(error.value)


def test_files_that_are_no_tables_are_reported(tmp_path: Path) -> None:
    for name in ("f.parquet", "f.npz", "f.npy"):
        (tmp_path / name).write_bytes(b"PK\3\4 not a table")
        (tmp_path / "f.txt").touch()
        with pytest.raises(UserError, match=rf"^features {name}: it cannot be read \(.*\); write it again$"):
            read(tmp_path / name)
    (tmp_path / "f.txt").unlink()
    with pytest.raises(UserError, match=r"it has no names; expected f.txt beside it"):
        read(tmp_path / "f.npy")


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imported_features, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pyarrow is not installed; pip install 'esvit\[export\]', or give an .npz$"):
        read(tmp_path / "f.parquet")


def test_rows_are_matched_by_name_and_further_rows_are_ignored() -> None:
    features = NamedFeatures("f", [*NAMES, "c/1.png"], np.concatenate([VIEW, VIEW[:1]]))
    np.testing.assert_array_equal(match_features(features, [NAMES[2], NAMES[0]]), VIEW[[2, 0]])


def test_names_may_lie_in_one_more_folder() -> None:
    features = NamedFeatures(
        "f", ["other/a/1.png", *(f"/data/{name}" for name in NAMES)], np.concatenate([VIEW[:1] - 9, VIEW])
    )
    np.testing.assert_array_equal(match_features(features, NAMES), VIEW)


def test_images_without_a_row_are_counted_and_shown() -> None:
    with pytest.raises(UserError) as error:
        match_features(NamedFeatures("f", NAMES, VIEW), [*NAMES, "b/2.png", "b/3.png"])
    assert str(error.value).startswith(
        "features f: 2 of 5 images have no row, such as b/2.png, b/3.png, and the file has names such as "
    )


def test_a_run_of_features_gives_no_weights(store_env: Any, micro_recipe: Path, images: Any, tmp_path: Path) -> None:
    images.folder(tmp_path / "images", ["a", "b"], 2)
    config = Config.load(micro_recipe, [f"bucket={store_env.bucket}"])
    file = parquet(tmp_path / "f.parquet", name=NAMES, features=VIEW.tolist())
    run = import_backbone(str(file), str(tmp_path / "images"), config, setting="--model")
    again = import_backbone(str(file), str(tmp_path / "images"), config, run.uri)
    assert run.uri == again.uri and "/runs/evaluate-features-" in run.uri
    with pytest.raises(WeightsNotFound, match="neither a run with a complete checkpoint nor a published backbone"):
        find(run.uri, "backbone", store_env.bucket, run.store)
    with pytest.raises(UserError, match=r"^--model none.npz: no such file; expected features as"):
        import_backbone("none.npz", str(tmp_path / "images"), config, setting="--model")
