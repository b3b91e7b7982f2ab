"""No step outputs a value that KFP's launcher rejects, whatever the outcome of the step."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kfp_rules
import pytest

from esvit_components.data.find_new_data import find_new_data
from esvit_components.data.prepare_data import prepare_data
from esvit_components.deployment.promote import promote
from esvit_components.evaluation.compare_champion import compare_champion
from esvit_components.evaluation.extract_features import extract_features
from esvit_components.evaluation.knn import knn
from esvit_components.evaluation.linear_probe import linear_probe
from esvit_components.evaluation.transfer import transfer
from esvit_components.evaluation.visualize import visualize as draw
from esvit_components.training.pretrain import pretrain
from esvit_core.artifacts import describe, point_to
from esvit_core.config import Config
from esvit_core.evaluation.results import left_out, measured
from esvit_core.runs.run import CONFIG, RETRAINING, Run

REASON = "the images have no labels"


@pytest.fixture
def run(store_env: Any) -> Run:
    """A run whose results lack labels."""
    sets = [{"name": "marks", "source": "marks.zip"}]
    config = Config.from_mapping({"bucket": store_env.bucket, "evaluation": {"transfer": sets}})
    made = Run(store_env.uri("runs/a"), store_env, config)
    store_env.put_bytes(made.at(CONFIG), config.to_yaml().encode())
    for name, headline in (("knn", "knn/20"), ("linear", "linear"), ("transfer-marks", "transfer/marks")):
        store_env.put_json(made.at(f"evaluation/{name}.json"), {"name": name, **left_out(headline, REASON)})
    return made


def test_the_rules_match_those_of_the_launcher() -> None:
    def output(**metadata: Any) -> str:
        return json.dumps({"artifacts": {"a": {"artifacts": [{"name": "a", "uri": "s3://b/a", "metadata": metadata}]}}})

    assert not kfp_rules.refused(output(text="x", number=1.5, yes=True, many=[1, 2], more={"a": {"b": []}}))
    assert kfp_rules.refused(output(value=None)) == ["a.metadata.value: unknown/unsupported value type NullValue"]
    assert kfp_rules.refused(output(value=[{"a": None}])) and kfp_rules.refused('{"parameterValues": {"a": null}}')
    assert kfp_rules.refused(output(value=math.nan)) == ["NaN is not JSON"]
    assert kfp_rules.refused(output(value=math.inf)) and kfp_rules.refused('{"unknown": 1}')


def test_missing_values_are_omitted_from_metadata_and_other_types_are_errors(tmp_path: Path) -> None:
    from kfp import dsl

    artifact = dsl.Artifact(name="a", uri=str(tmp_path / "a"), metadata={})
    point_to(artifact, "s3://b/x", none=None, nan=math.nan, inside={"a": None, "b": 1, "c": (1, 2)}, zero=0, no=False)
    assert artifact.metadata == {"uri": "s3://b/x", "inside": {"b": 1, "c": [1, 2]}, "zero": 0, "no": False}
    assert json.loads((tmp_path / "a").read_text()) == artifact.metadata
    for wrong in ([None], [math.inf], {1, 2}, object()):
        with pytest.raises(TypeError, match=r"metadata\.value: Kubeflow cannot store"):
            describe(artifact, value=wrong)


@pytest.mark.parametrize("labelled", [True, False])
def test_prepared_data(labelled: bool, store_env: Any, images: Any, tmp_path: Path, components: Any) -> None:
    folder = images.folder(tmp_path / "images", ["a", "b"] if labelled else [""], 6)
    recipe = f"{{bucket: {store_env.bucket}, recipe: tiny}}"
    _, artifacts = components.directly(prepare_data, source=str(folder), recipe=recipe)
    assert artifacts["dataset"].metadata["classes"] == (2 if labelled else 0)


@pytest.mark.parametrize("component", [knn, linear_probe])
def test_an_evaluation_that_was_left_out(component: Any, run: Run, components: Any) -> None:
    (result,), artifacts = components.directly(component, run_uri=run.uri)
    assert run.store.get_json(result)["reason"] == REASON
    assert artifacts["metrics"].metadata == {}


def test_transfer_sets_that_were_left_out_and_measured(run: Run, components: Any) -> None:
    (result,), artifacts = components.directly(transfer, run_uri=run.uri)
    assert result == run.at("evaluation") and artifacts["metrics"].metadata == {}
    figures = {"trained": {"transfer/marks": 61.5}, "baseline": {"transfer/marks": math.nan}}
    result = {"name": "transfer-marks", **measured("transfer/marks", figures, ["a", "b"])}
    run.store.put_json(run.at("evaluation/transfer-marks.json"), result)
    _, artifacts = components.directly(transfer, run_uri=run.uri)
    assert artifacts["metrics"].metadata == {"transfer/marks": 61.5}


@pytest.mark.parametrize(("component", "name"), [(knn, "knn"), (linear_probe, "linear")])
def test_an_evaluation_with_a_figure_that_is_not_a_number(component: Any, name: str, run: Run, components: Any) -> None:
    figures = {"trained": {name: 31.0}, "baseline": {name: math.nan}}
    result = measured(name, figures, ["a", "b"], confusion=[[1, 0], [0, 1]])
    run.store.put_json(run.at(f"evaluation/{name}.json"), {"name": name, **result})
    _, artifacts = components.directly(component, run_uri=run.uri)
    assert artifacts["metrics"].metadata == {name: 31.0}


def test_images_that_were_left_out(run: Run, components: Any) -> None:
    index = {"images": [], "figures": {}, "left_out": [{"what": "attention", "reason": "the network has none"}]}
    run.store.put_json(run.at("visualization/manifest.json"), {})
    run.store.put_json(run.at("visualization/visualization.json"), index)
    _, artifacts = components.directly(draw, run_uri=run.uri)
    assert artifacts["drawings"].metadata == {"uri": run.at("visualization"), "images": 0}


def test_features(run: Run, components: Any) -> None:
    run.store.put_json(run.at("features/manifest.json"), {"samples": {"train": 12, "val": 4}})
    _, artifacts = components.directly(extract_features, run_uri=run.uri)
    assert artifacts["features"].metadata["samples"] == {"train": 12, "val": 4}


def test_a_training_without_a_loss_and_of_an_unknown_precision(run: Run, components: Any) -> None:
    run.store.put_json(run.at("training/summary.json"), {"steps": 4, "final_loss": math.nan, "resumes": [2]})
    _, artifacts = components.directly(pretrain, run_uri=run.uri)
    assert artifacts["metrics"].metadata == {"steps": 4.0}
    assert "precision" not in artifacts["model"].metadata


def test_a_promotion_without_labels_which_has_no_value(run: Run, components: Any) -> None:
    (promoted, reason), artifacts = components.directly(promote, run_uri=run.uri)
    assert not promoted and REASON in reason
    assert artifacts["decision"].metadata.keys() == {"uri", "promoted", "reason", "metric"}


@pytest.fixture
def crown(run: Run) -> Callable[[str], None]:
    """Make another run the champion."""

    def make(name: str) -> None:
        there = run.store.uri(f"runs/{name}")  # type: ignore[attr-defined]
        run.store.put_json(
            run.store.uri("pointers/champion"),  # type: ignore[attr-defined]
            {"run": there, "backbone": f"{there}/backbone"},
        )

    return make


@pytest.mark.parametrize("champion", [None, "b"])
def test_a_comparison_where_nothing_was_measured(
    champion: str | None, run: Run, crown: Callable[[str], None], components: Any
) -> None:
    run.store.put_json(run.at(RETRAINING), {})
    if champion:
        crown(champion)
    (address,), artifacts = components.directly(compare_champion, run_uri=run.uri, results=[])
    assert bool(address) == bool(champion) and artifacts["metrics"].metadata == {}


def test_a_retraining_with_and_without_new_images(store_env: Any, images: Any, tmp_path: Path, components: Any) -> None:
    folder = str(images.folder(tmp_path / "images", ["a"], 6))
    recipe = f"{{bucket: {store_env.bucket}, retrain: {{min_new_images: 3}}}}"
    given = {"source": folder, "recipe": recipe, "owner": "me"}
    (uri, nothing, _), artifacts = components.directly(find_new_data, **given)
    assert not nothing and artifacts["found"].metadata["new"] == 6
    run = Run(uri, store_env, Config.from_yaml(recipe))
    components.directly(prepare_data, source=folder, run_uri=uri)
    store_env.put_json(run.at("promotion.json"), {"promoted": False})
    (again, nothing, _), artifacts = components.directly(find_new_data, **given)
    assert (again, nothing, artifacts["found"].metadata["new"]) == (uri, True, 0)
