"""Finished runs are compared image by image where they measured the same images, and otherwise with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esvit_core.config import Config
from esvit_core.data.ingest.prepare import prepare
from esvit_core.errors import UserError
from esvit_core.evaluation.outcomes import keep_outcomes, pack_outcomes
from esvit_core.evaluation.results import measured, result_uri
from esvit_core.evaluation.side_by_side import Subject, compare_subjects, read_subject
from esvit_core.reporting.comparison_page import comparison_files, sentence

CONFIG = Config.from_mapping({"recipe": "tiny", "data": {"val_fraction": 0.25}, "promotion": {"metric": "knn/5"}})


def changed(section: str, **values: Any) -> Config:
    settings = CONFIG.model_dump(mode="json")
    settings[section] |= values
    return Config.from_mapping(settings)


@pytest.fixture
def make(store: Any, images: Any, tmp_path: Path) -> Any:
    """Make a run on the same folder of 48 images, 12 of them held out, of which it classifies some correctly."""
    folder = images.folder(tmp_path / "images", ["a", "b"], 24)

    def make_run(name: str, right: int, config: Config = CONFIG, source: Path = folder) -> Subject:
        uri = store.uri(f"runs/{name}")
        prepare(str(source), store, f"{uri}/data", config.data)
        images_held_out = 12
        correct = {"trained": {"knn/5": np.arange(images_held_out) < right}}
        figures = {"trained": {"knn/5": 100 * right / images_held_out}}
        result = {"name": "knn"} | keep_outcomes(
            measured("knn/5", figures, ["a", "b"]), pack_outcomes(f"digest of {name}", correct)
        )
        store.put_bytes(result_uri(uri, "knn"), json.dumps(result).encode())
        return read_subject(store, uri, config, name)

    return make_run


def test_runs_on_the_same_images_are_paired_whatever_the_stored_size(make: Any) -> None:
    first, second = make("first", 12), make("second", 2, changed("data", store_short_side=10))
    (pair,) = compare_subjects([first, second], ["second"]).pairs
    assert pair.difference is not None and pair.decision == "better"
    assert (pair.difference.discordant, pair.difference.images) == (10, 12)
    assert pair.points == pytest.approx(100 * 10 / 12)


def test_runs_on_other_images_are_not_paired_and_the_reason_is_given(make: Any, images: Any, tmp_path: Path) -> None:
    other = make("other", 2, source=images.folder(tmp_path / "more", ["a", "b"], 25))
    split = make("split", 2, changed("data", val_fraction=0.3))
    pairs = compare_subjects([make("first", 12), other, split], ["first"]).pairs
    assert [pair.decision for pair in pairs] == ["not tested"] * 2
    assert {pair.reason for pair in pairs} == {"the two were measured on different held-out images"}


def test_figures_of_different_protocols_are_not_compared(make: Any) -> None:
    second = make("second", 2, changed("evaluation", knn_temperature=0.1))
    (pair,) = compare_subjects([make("first", 12), second], ["first"]).pairs
    assert pair.decision == "not tested" and "evaluation.knn_temperature: 0.1 and 0.07" in pair.reason


def test_the_data_sets_on_which_a_run_is_better_are_counted_against_each_reference(make: Any) -> None:
    comparison = compare_subjects([make("best", 12), make("worst", 2), make("good", 11)], ["worst", "good"])
    assert comparison.combinations() == [("best", "worst"), ("best", "good")]
    assert sentence(comparison, "best", "worst") == "best is better than worst on 1 of 1 data set."
    assert sentence(comparison, "best", "good").endswith("0 of 1 data set; no difference shown on 1.")


def test_names_are_escaped_on_the_page_and_in_markdown(make: Any) -> None:
    subjects = [make("first", 12), make("second", 2)]
    renamed = Subject("<script>|", *[getattr(subjects[1], n) for n in ("run_uri", "config", "results", "images")])
    files = comparison_files(compare_subjects([subjects[0], renamed], ["<script>|"]))
    assert "<script>" not in files["comparison.html"] and "&lt;script&gt;" in files["comparison.html"]
    assert "<script>" not in files["comparison.md"] and "&lt;script&gt;\\|" in files["comparison.md"]
    assert json.loads(files["comparison.json"])["models"][1]["name"] == "<script>|"
    assert "http" not in files["comparison.html"].replace("s3://", "").replace("http-equiv", "")


def test_a_run_without_results_is_one_line(store: Any) -> None:
    with pytest.raises(UserError, match=r"^run none: it has no results yet"):
        read_subject(store, store.uri("runs/none"), CONFIG, "none")
