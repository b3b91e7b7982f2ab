"""The charts of the choices on validation images."""

from __future__ import annotations

from typing import Any

from esvit_core.evaluation.results import left_out, measured
from esvit_core.reporting.choice_charts import choice_charts

RATES = {"1e-05": 20.0, "0.001": 40.0, "0.1": 35.0}
LINEAR: dict[str, Any] = {"name": "linear"} | measured(
    "linear",
    {"trained": {"linear": 40.0}, "baseline": {"linear": 30.0}},
    ["a", "b"],
    chosen={model: {"feature": "last block", "lr": 0.001} for model in ("trained", "baseline")},
    validation={model: {"last block": RATES, "last blocks": {"0.1": 1.0}} for model in ("trained", "baseline")},
)
TRANSFER: dict[str, Any] = {"name": "transfer-digits"} | measured(
    "transfer/digits",
    {"trained": {"transfer/digits": 80.0}},
    ["0", "1"],
    validation={"trained": {"1": 80.0, "1e-06": 60.0, "1e+06": 10.0}},
)


def test_the_values_that_were_tried_are_drawn_by_their_power_of_ten() -> None:
    rate, strength = choice_charts([LINEAR, TRANSFER])
    assert (
        rate.keys == ["trained", "baseline"] and "20 at power \N{MINUS SIGN}5, 35 at power \N{MINUS SIGN}1" in rate.svg
    )
    assert strength.title == "Lambda of transfer to digits"
    assert "60 at power \N{MINUS SIGN}6, 10 at power 6" in strength.svg


def test_results_without_a_choice_have_no_chart() -> None:
    assert (
        choice_charts([{"name": "knn"} | measured("knn/20", {}, []), {"name": "linear"} | left_out("linear", "x")])
        == []
    )
