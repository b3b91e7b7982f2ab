"""The report as Markdown and JSON, and the model card."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from esvit_core.reporting.markdown import escape, table
from esvit_core.storage import join_uri


@pytest.fixture
def read(finished_html: str, finished_run: Any, shared_store: Any) -> Callable[[str], str]:
    """A function that reads an object of the finished run's report."""
    return lambda name: shared_store.get_bytes(join_uri(finished_run.uri, "report", name)).decode()


def test_the_card_has_the_figures_in_its_header_and_says_what_the_backbone_is_for(read: Callable[[str], str]) -> None:
    card = read("model-card.md")
    _, header, text = card.split("---\n", 2)
    values = yaml.safe_load(header)
    assert values["pipeline_tag"] == "image-feature-extraction" and "esvit" in values["tags"]
    results = {each["metrics"][0]["name"]: each for each in values["model-index"][0]["results"]}
    assert results["20-NN"]["metrics"][0] == {"type": "accuracy", "name": "20-NN", "value": 34.9375}
    assert results["transfer to digits"]["dataset"]["name"] == "digits"
    for heading in ("## Intended use", "## Evaluation", "## Limits", "## Lineage"):
        assert heading in text
    assert "| 20-NN | 34.9 | 30.7 | +4.2 |" in text


def test_the_report_in_json_has_every_figure_with_its_difference_or_the_reason(read: Callable[[str], str]) -> None:
    values = json.loads(read("report.json"))
    rows = {row["figure"]: row for row in values["results"]}
    assert rows["knn/20"]["trained"] == 34.9375 and rows["knn/20"]["difference"]["images"] > 0
    assert rows["transfer/shapes"]["reason"]
    assert values["verdict"]["sentence"].startswith("Pre-training helped") and values["lineage"]


def test_the_report_in_markdown_begins_with_the_verdict_and_escapes_names(read: Callable[[str], str]) -> None:
    text = read("report.md")
    assert text.startswith("# Pre-training helped")
    assert "## Results" in text and "<script>" not in text and "\xa0" not in text


def test_markup_in_text_is_escaped() -> None:
    assert escape("<b>|[x](y)*`\n") == "&lt;b&gt;\\|\\[x](y)\\*\\`"
    assert table(["a|b", "c"], [["<i>", "1"]]) == ["| a\\|b | c |", "| --- | ---: |", "| &lt;i&gt; | 1 |"]
