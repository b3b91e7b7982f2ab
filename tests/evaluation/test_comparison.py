"""The champion on the challenger's own images."""

from __future__ import annotations

import pytest

from esvit_core.evaluation.knn import evaluate_knn
from esvit_core.evaluation.linear_probe import evaluate_linear
from esvit_core.evaluation.results import read_result
from esvit_core.evaluation.stored_features import extract_features
from esvit_core.evaluation.transfer import evaluate_transfer
from esvit_core.registry.comparison import compare_with_champion, comparison_uri, read_comparison
from esvit_core.registry.promotion import promote
from esvit_core.runs.run import RETRAINING

NAMES = ("knn", "linear", "transfer-stripes")


@pytest.fixture(scope="module")
def challenger(run, bucket, config) -> str:
    """A measured run."""
    extract_features(run, bucket, config)
    evaluate_knn(run, bucket, config)
    evaluate_linear(run, bucket, config)
    evaluate_transfer(run, bucket, config, "stripes")
    return run


def figures(bucket, run, model):
    return {name: read_result(bucket, run, name)["results"][model] for name in NAMES}


def outcomes(bucket, run, model):
    return {name: read_result(bucket, run, name)["outcomes"]["correct"][model] for name in NAMES}


def outcomes_of(found):
    return {name: found["results"][name]["outcomes"]["correct"]["champion"] for name in NAMES}


def champion(name: str, backbone: str) -> dict[str, str]:
    return {"run": f"s3://evaluation/runs/{name}", "backbone": backbone}


def test_another_network_is_measured_as_the_run_s_own_is(challenger, bucket, config):
    """The champion is the run's own network under another name: every figure has to come out the same."""
    found = compare_with_champion(challenger, bucket, config, champion("twin", f"{challenger}/backbone"))
    assert found["how"] == "measured on the images of the run"
    assert {name: found["results"][name]["results"]["champion"] for name in NAMES} == figures(
        bucket, challenger, "trained"
    )
    assert outcomes_of(found) == outcomes(bucket, challenger, "trained")


def test_the_network_that_the_run_started_from_has_its_figures_already(challenger, bucket, config, monkeypatch):
    monkeypatch.setattr("esvit_core.weights.backbone.load_backbone", None)
    start = champion("start", f"{challenger}/baseline")
    found = compare_with_champion(challenger, bucket, config, start)
    assert found["how"] == "the run started from it"
    assert {name: found["results"][name]["results"]["champion"] for name in NAMES} == figures(
        bucket, challenger, "baseline"
    )
    assert outcomes_of(found) == outcomes(bucket, challenger, "baseline")
    assert "differences" not in found["results"]["knn"]
    assert read_comparison(challenger, bucket, start) == compare_with_champion(challenger, bucket, config, start)


def test_a_champion_that_is_gone_cannot_be_compared(challenger, bucket, config):
    gone = champion("gone", "s3://evaluation/runs/gone/backbone")
    own = config.model_copy(update={"promotion": config.promotion.model_copy(update={"pointer": "gone"})})
    bucket.remove(f"{challenger}/promotion.json")  # of a test that promoted the same run
    bucket.put_json(f"{challenger}/{RETRAINING}", {})
    bucket.swap_pointer("s3://evaluation/pointers/gone", gone, None)
    try:
        decision = promote(challenger, bucket, own)
    finally:  # other tests use the same run
        for name in (RETRAINING, "promotion.json"):
            bucket.remove(f"{challenger}/{name}")
    assert (
        not decision["promoted"]
        and "its backbone at s3://evaluation/runs/gone/backbone was deleted" in decision["reason"]
    )
    assert bucket.exists(comparison_uri(challenger, gone))
