"""The table that a run ends with."""

from __future__ import annotations

import io

import numpy as np
from rich.console import Console

from esvit_core.evaluation.outcomes import keep_outcomes, pack_outcomes
from esvit_core.evaluation.results import left_out, measured
from esvit_core.reporting.result_rows import percent, points, read_results, result_rows, typeset
from esvit_core.reporting.result_table import results_table

LINEAR = {"name": "linear"} | measured(
    "linear", {"trained": {"linear": 41.25}, "baseline": {"linear": 36.5}}, ["ant", "bee"]
)
KNN = {"name": "knn"} | measured(
    "knn/20",
    {"trained": {"knn/10": 30.0, "knn/20": 29.0}, "baseline": {"knn/10": 30.02, "knn/20": 31.0}},
    ["ant", "bee"],
)
MISSING = {"name": "transfer-a"} | left_out("transfer/a", "no labels [bold]at all[/bold]")


def printed(results, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(results_table(results))
    return console.file.getvalue()


def test_rows_are_in_the_order_of_the_protocols_with_their_difference():
    rows = result_rows([MISSING, LINEAR, KNN])
    assert [row.label for row in rows] == ["10-NN", "20-NN", "linear probe", "transfer to a"]
    assert [row.headline for row in rows] == [False, True, True, True]
    assert rows[2].difference == 4.75
    assert rows[3].difference is None and rows[3].reason == MISSING["reason"]


def test_the_table_shows_trained_beside_the_baseline():
    text = printed([LINEAR, KNN])
    line = next(line for line in text.splitlines() if "linear probe" in line)
    assert line.split()[2:] == ["41.2", "%", "36.5", "%", "+4.7", "-", "not", "tested"]
    line = next(line for line in text.splitlines() if "20-NN" in line)
    assert line.split()[1:] == ["29.0", "%", "31.0", "%", "-2.0", "-", "not", "tested"]
    assert "0.0" in next(line for line in text.splitlines() if "10-NN" in line)


def test_a_tested_difference_has_its_interval_and_its_verdict():
    correct = {"trained": {"linear": np.arange(400) < 165}, "baseline": {"linear": np.arange(400) < 146}}
    text = printed([keep_outcomes(LINEAR, pack_outcomes("images", correct))])
    line = next(line for line in text.splitlines() if "linear probe" in line)
    assert line.split()[2:] == ["41.2", "%", "36.5", "%", "+4.7", "2.8", "to", "7.0", "better"]


def test_a_verdict_fits_into_one_line_of_80_columns():
    correct = {"trained": {"linear": np.arange(400) < 165}, "baseline": {"linear": np.arange(400)[::-1] < 146}}
    text = printed([keep_outcomes(LINEAR, pack_outcomes("images", correct))], width=80)
    (line,) = [line for line in text.splitlines() if "linear probe" in line]
    assert line.endswith("-3.8 to 13.2   no difference shown ")


def test_a_fit_that_did_not_converge_is_named_beside_its_figure():
    text = printed([LINEAR | {"unconverged": {"linear": ["trained", "baseline"]}}, KNN], width=140)
    line = next(line for line in text.splitlines() if "linear probe" in line)
    assert line.strip().startswith("linear probe (trained and baseline: fit not converged)")
    assert "converged" not in next(line for line in text.splitlines() if "20-NN" in line)


def test_what_was_left_out_is_named_with_its_reason_as_it_is():
    text = printed([KNN, MISSING])
    assert "transfer to a: not measured" in text
    assert "transfer to a: no labels [bold]at all[/bold]" in text


def test_nothing_measured_is_no_error():
    assert "measure" in printed([])


def test_the_results_of_a_run_are_read_with_those_that_are_missing(store, config):
    run = store.uri("runs/a")
    store.put_json(f"{run}/evaluation/linear.json", LINEAR)
    assert [r["name"] for r in read_results(store, run)] == ["linear"]
    found = read_results(store, run, config)
    assert [(r["name"], r["status"]) for r in found] == [
        ("knn", "left_out"),
        ("linear", "measured"),
        ("transfer-digits", "left_out"),
        ("transfer-shapes", "left_out"),
    ]


def test_figures_as_people_write_them():
    assert (percent(12.345), percent(None), percent(float("nan"))) == ("12.3", "-", "-")
    assert (points(0.04), points(-0.04), points(1.26), points(-2.0)) == ("0.0", "0.0", "+1.3", "-2.0")
    assert typeset("-2.0") == "\N{MINUS SIGN}2.0" and typeset("-") == "\N{EN DASH}"
