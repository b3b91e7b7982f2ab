"""Charts that stand in a page: themed, with names of their own, sound for any figures and any names."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from esvit_core.config import Config
from esvit_core.reporting.charts import Line, confusion, curve
from esvit_core.reporting.classes import class_table
from esvit_core.reporting.training_charts import in_groups, training_charts


def lines_of(svg: str) -> list[ET.Element]:
    return [path for path in ET.fromstring(svg).iter("path") if "var(--series" in path.get("style", "")]


def test_colours_are_the_pages(log, config):
    for chart in training_charts(log(100), config, resumes=[50]):
        for svg in (chart.svg, chart.wide or chart.svg):
            colours = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg))
            assert all(c == "none" or c.startswith(("var(--", "url(#")) for c in colours), colours
            assert "<style" not in svg and "font-family" not in svg and "DejaVu" not in svg


def test_ids_are_unique_in_the_page_and_references_meet_them(log, config):
    charts = training_charts(log(100), config, resumes=[])
    ids: list[str] = []
    for chart in charts:
        for svg in filter(None, (chart.svg, chart.wide)):
            own = re.findall(r'\bid="([^"]+)"', svg)
            ids += own
            assert set(re.findall(r"#([\w.-]+)", svg)) <= set(own)
    assert len(ids) == len(set(ids))


def test_only_what_was_logged_is_drawn(log):
    view_only = Config.from_mapping({"objective": {"region": False}})
    charts = {chart.title: chart for chart in training_charts(log(100, region=False), view_only, resumes=[])}
    assert len(lines_of(charts["Loss"].svg)) == 1  # the total is the view loss
    assert charts["Prototypes in use"].keys == [] and "Mutual matches" not in charts
    assert training_charts([], view_only, resumes=[]) == []
    assert [c.title for c in training_charts([{"step": 1, "loss": 2.0}], view_only, resumes=[])] == ["Loss"]


def test_charts_stand_in_groups_and_an_older_log_has_those_it_can(log, config):
    def titles(lines):
        return {group: [c.title for c in charts] for group, charts in in_groups(training_charts(lines, config, []))}

    of_all = titles(log(100))
    assert list(of_all) == ["Objective", "Student and teacher", "Schedules and speed"]
    assert len(of_all["Student and teacher"]) == 8
    then = ("step", "loss", "entropy_view", "entropy_region", "kl_view", "kl_region", "feature_std")
    older = titles([{key: line[key] for key in then} for line in log(100)])
    assert older["Student and teacher"] == [
        "Entropy of the mean distribution",
        "Divergence from the mean distribution",
        "Spread of the features",
    ]


def test_values_that_are_no_numbers_are_left_out():
    log = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 1.5}, {"step": 3}, {"step": 4, "loss": float("inf")}]
    line = Line.of("total", log, "loss")
    assert line is not None and line.steps.tolist() == [2] and line.values.tolist() == [1.5]
    assert Line.of("total", log[:1], "loss") is None


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [1e-12, 1e9], [-5.0, -5.0, -5.0]])
def test_odd_series_can_be_drawn(values):
    line = Line("x", np.arange(len(values), dtype=float), np.array(values))
    chart = curve("Odd", "", [line], name="odd", from_zero=False)
    assert chart is not None and lines_of(chart.svg)


def test_long_logs_are_thinned_but_keep_their_ends():
    steps = np.arange(50_000, dtype=float)
    chart = curve("Long", "", [Line("x", steps, np.sin(steps / 5000))], name="long")
    assert chart is not None and len(chart.svg) < 40_000
    assert "at step 49,999" in chart.svg


@pytest.mark.parametrize("count", [2, 30, 100])
def test_confusions_of_any_size(count):
    names = [f"$class_{{{i}}}$ <&> \x01 \N{SNOWMAN} 猫" for i in range(count)]
    svg = confusion(np.eye(count, dtype=int) * 3 + 1, names)
    root = ET.fromstring(svg)
    shown = [element.text for element in root.iter("text")]
    assert (any("$class_{0}$ <&>" in (text or "") for text in shown)) == (count <= 40)
    assert len(svg) < 120_000


def test_classes_are_sorted_by_how_well_they_were_recognised():
    counts = [[5, 0, 5], [0, 9, 1], [0, 0, 0]]
    table = class_table([{"name": "linear", "status": "measured", "classes": ["a", "b", "c"], "confusion": counts}])
    assert not isinstance(table, str)
    assert [(r.name, r.correct, r.confused_with, r.confusions) for r in table.rows] == [
        ("b", 90, "c", 1),
        ("a", 50, "c", 5),
    ]


def test_too_many_classes_are_said_to_be_too_many():
    assert "500 classes" in str(class_table([{"name": "linear", "status": "measured", "classes": ["x"] * 500}]))
