"""The pipeline as YAML for a cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from esvit_core.config import Config
from esvit_core.runs import changed
from esvit_pipelines.compile import compile_pipeline
from esvit_pipelines.pretrain.pipeline import build_pretrain_pipeline
from esvit_pipelines.steps import pipeline_nulls, pipeline_values, step_names

SETS = "evaluation.transfer=[{name: digits, source: s3://b/digits}, {name: flags, source: s3://b/flags}]"
CONFIG = Config.load("demo", [SETS, "cluster.image=registry.example/esvit:1", "cluster.secret=keys"])
STEPS = {
    "prepare data",
    "prepare digits",
    "prepare flags",
    "pretrain",
    "extract features",
    "k-NN",
    "linear probe",
    "transfer digits",
    "transfer flags",
    "pictures",
    "report",
    "promote",
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Text, pipeline and platform part of the compiled pipeline."""
    path = tmp_path_factory.mktemp("compiled") / "pipeline.yaml"
    assert set(compile_pipeline("pretrain", CONFIG, path)) == STEPS
    text = path.read_text(encoding="utf-8")
    pipeline, platform = yaml.safe_load_all(text)
    return text, pipeline, platform


def test_the_cluster_and_the_machine_have_the_same_steps(compiled: Any) -> None:
    tasks = compiled[1]["root"]["dag"]["tasks"].values()
    assert {task["taskInfo"]["name"] for task in tasks} == STEPS
    local = step_names(build_pretrain_pipeline(CONFIG))
    assert set(local) == STEPS and local[0] == "prepare data" and local[-2:] == ["report", "promote"]


def test_all_data_are_prepared_before_the_long_step(compiled: Any) -> None:
    tasks = compiled[1]["root"]["dag"]["tasks"]
    assert {"prepare-data", "prepare-transfer", "prepare-transfer-2"} <= set(tasks["pretrain"]["dependentTasks"])


def test_the_report_waits_for_every_figure_and_the_promotion_for_the_report(compiled: Any) -> None:
    tasks = compiled[1]["root"]["dag"]["tasks"]
    measured = {"knn", "linear-probe", "transfer", "transfer-2", "pictures"}
    assert measured <= set(tasks["report"]["dependentTasks"])
    assert "report" in tasks["promote"]["dependentTasks"]


def test_measured_steps_do_not_wait_for_each_other_on_a_cluster(compiled: Any) -> None:
    tasks = compiled[1]["root"]["dag"]["tasks"]
    for name in ("transfer", "transfer-2", "pictures"):
        assert not {"knn", "linear-probe", "extract-features"} & set(tasks[name]["dependentTasks"])


def test_only_steps_that_their_arguments_determine_are_cached(compiled: Any) -> None:
    tasks = compiled[1]["root"]["dag"]["tasks"]
    cached = {name for name, task in tasks.items() if task["cachingOptions"].get("enableCache")}
    assert cached == {"extract-features", "knn", "linear-probe", "transfer", "transfer-2", "pictures"}


def test_parameters_have_types_descriptions_and_defaults(compiled: Any) -> None:
    parameters = compiled[1]["root"]["inputDefinitions"]["parameters"]
    assert {name: p["parameterType"] for name, p in parameters.items()} == {
        "data": "STRING",
        "settings": "STRING",
        "configuration": "STRUCT",
        "run_uri": "STRING",
    }
    assert all(len(p["description"]) > 40 for p in parameters.values())
    # KFP knows no integers inside of a structure: 20 epochs are 20.0 here, and 20 again when a step reads them.
    assert Config.from_mapping(parameters["configuration"]["defaultValue"]) == CONFIG


def test_what_is_null_is_said_in_the_settings() -> None:
    """KFP has no null: a setting whose default is a value cannot be put out in the configuration alone."""
    nulls = ["promotion.max_loss=null", "cluster.train.cpu_limit=null", "init.source=null"]
    config = Config.load("demo", nulls)
    assert pipeline_nulls(config).split() == nulls[:2]
    assert changed(pipeline_values(config), pipeline_nulls(config)) == config
    assert pipeline_nulls(Config.load("demo")) == ""


def test_every_step_runs_in_the_configured_image_and_installs_nothing(compiled: Any) -> None:
    executors = compiled[1]["deploymentSpec"]["executors"]
    assert {e["container"]["image"] for e in executors.values()} == {"registry.example/esvit:1"}
    assert "pip install" not in compiled[0]


def test_every_step_gets_the_keys_from_the_named_secret(compiled: Any) -> None:
    executors = compiled[2]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert executors.keys() == compiled[1]["deploymentSpec"]["executors"].keys()
    for executor in executors.values():
        required, optional = executor["secretAsEnv"]
        assert required["secretName"] == "keys" and not required["optional"] and optional["optional"]
        assert [k["envVar"] for k in required["keyToEnv"]] == [
            "ESVIT_S3_ENDPOINT",
            "ESVIT_S3_ACCESS_KEY",
            "ESVIT_S3_SECRET_KEY",
        ]


def test_no_key_of_the_environment_gets_into_it(tmp_path: Path) -> None:
    keys = {"ESVIT_S3_ENDPOINT": "store.example:9000", "ESVIT_S3_ACCESS_KEY": "AKSEEN", "ESVIT_S3_SECRET_KEY": "SKSEEN"}
    path = tmp_path / "pipeline.yaml"
    done = subprocess.run(
        [sys.executable, "-m", "esvit_pipelines", "compile", "-o", path, "--recipe", "demo"],
        env={**os.environ, **keys},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    for key in keys.values():
        assert key not in path.read_text() + done.stdout + done.stderr
    assert f"{path}: 8 steps" in done.stdout and "pretrain" in done.stdout


def test_compiling_twice_gives_the_same_bytes(compiled: Any, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from esvit_core.config import Config;"
        "from esvit_pipelines.compile import compile_pipeline;"
        "compile_pipeline('pretrain', Config.from_yaml(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))"
    )
    config, path = tmp_path / "config.yaml", tmp_path / "pipeline.yaml"
    config.write_text(CONFIG.to_yaml())
    subprocess.run([sys.executable, "-c", code, config, path], check=True, timeout=240)
    assert path.read_text(encoding="utf-8") == compiled[0]
