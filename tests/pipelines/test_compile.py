"""The pretrain pipeline compiled to YAML for a cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from esvit_core.config import Config
from esvit_core.config.parameters import resolve
from esvit_core.errors import UserError
from esvit_pipelines.cluster.compile import compile_pipeline
from esvit_pipelines.pretrain.pipeline import build_pretrain_pipeline
from esvit_pipelines.steps import step_names

SETS = "evaluation.transfer=[{name: digits, source: s3://b/digits}, {name: flags, source: s3://b/flags}]"
CHANGES = ["promotion.max_loss=null", "launch.profile_steps=5"]
PLACE = ["cluster.image=registry.example/esvit:1", "cluster.secret=keys"]
# Sizes of pods are computed where the configuration leaves them open, which takes seconds: tests/test_planning.py.
POD = "{cpu: '1', cpu_limit: '4', memory: 4Gi, memory_limit: 8Gi, scratch: 64Gi, shared_memory: 1Gi}"
PODS = [f"cluster.{role}={POD}" for role in ("prepare", "train", "evaluate", "publish")]
PODS_OPTIONS = [word for pod in PODS for word in ("--set", pod)]
CONFIG = Config.load("demo", [SETS, *CHANGES, *PLACE, *PODS])
STEPS = {
    "prepare data",
    "prepare transfer sets",
    "pretrain",
    "extract features",
    "k-NN",
    "linear probe",
    "transfer",
    "visualize",
    "report",
    "promote",
}


def documents(text: str) -> Iterator[Any]:
    """Read YAML with libyaml's parser, which is ten times as fast as the other."""
    return yaml.load_all(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Text, pipeline and platform part of the compiled pipeline."""
    path = tmp_path_factory.mktemp("compiled") / "pipeline.yaml"
    assert set(compile_pipeline("pretrain", CONFIG, path)) == STEPS
    text = path.read_text(encoding="utf-8")
    pipeline, platform = documents(text)
    return text, pipeline, platform


def test_the_local_and_the_compiled_pipeline_have_the_same_steps(compiled: Any) -> None:
    tasks = compiled[1]["root"]["dag"]["tasks"].values()
    assert {task["taskInfo"]["name"] for task in tasks} == STEPS
    local = step_names(build_pretrain_pipeline(CONFIG))
    assert set(local) == STEPS and local[0] == "prepare data" and local[-2:] == ["report", "promote"]


def test_all_data_are_prepared_before_pretraining(compiled: Any) -> None:
    tasks = compiled[1]["root"]["dag"]["tasks"]
    assert {"prepare-data", "prepare-transfer"} <= set(tasks["pretrain"]["dependentTasks"])


def test_the_report_depends_on_all_evaluations_and_the_promotion_on_the_report(compiled: Any) -> None:
    tasks = compiled[1]["root"]["dag"]["tasks"]
    measured = {"knn", "linear-probe", "transfer", "visualize"}
    assert measured <= set(tasks["report"]["dependentTasks"])
    assert "report" in tasks["promote"]["dependentTasks"]


def test_evaluation_steps_run_in_parallel_on_a_cluster(compiled: Any) -> None:
    tasks = compiled[1]["root"]["dag"]["tasks"]
    for name in ("transfer", "visualize"):
        assert not {"knn", "linear-probe", "extract-features"} & set(tasks[name]["dependentTasks"])


@pytest.mark.parametrize(("pipeline", "step"), [("pretrain", "prepare-data"), ("retrain", "prepare-new-data")])
def test_images_are_prepared_by_several_pods_and_put_together_by_one(tmp_path: Path, pipeline: str, step: str) -> None:
    path = tmp_path / "pipeline.yaml"
    compile_pipeline(pipeline, Config.load("demo", [*PODS, "cluster.prepare.parallelism=3"]), path)
    spec = next(documents(path.read_text(encoding="utf-8")))
    dags = [spec["root"]["dag"], *(each["dag"] for each in spec["components"].values() if "dag" in each)]
    tasks = next(dag["tasks"] for dag in dags if step in dag["tasks"])
    prepared = {name: task for name, task in tasks.items() if task["componentRef"]["name"].startswith(f"comp-{step}")}
    shares = {
        name: task["inputs"]["parameters"]["share"]["runtimeValue"]["constant"]
        for name, task in prepared.items()
        if "share" in task["inputs"]["parameters"]
    }
    assert sorted(shares.values()) == ["1/3", "2/3", "3/3"]
    (last,) = prepared.keys() - shares.keys()
    assert shares.keys() <= {*tasks[last]["dependentTasks"]}
    assert not any(shares.keys() & {*tasks[name].get("dependentTasks", [])} for name in shares)  # at the same time
    assert last in tasks["pretrain"]["dependentTasks"] and not shares.keys() & {*tasks["pretrain"]["dependentTasks"]}


def test_caching_is_off_for_every_step(compiled: Any) -> None:
    tasks = compiled[1]["root"]["dag"]["tasks"]
    assert not [name for name, task in tasks.items() if task["cachingOptions"].get("enableCache")]


def test_parameters_have_types_descriptions_and_defaults(compiled: Any) -> None:
    parameters = compiled[1]["root"]["inputDefinitions"]["parameters"]
    assert {name: p["parameterType"] for name, p in parameters.items()} == {
        "data": "STRING",
        "recipe": "STRING",
        "settings": "STRING",
        "transfer": "STRING",
        "run_uri": "STRING",
    }
    assert all(len(p["description"]) > 40 for p in parameters.values())
    assert {name: p["defaultValue"] for name, p in parameters.items() if name != "data"} == {
        "recipe": "demo",
        "settings": "promotion.max_loss=null",
        "transfer": "digits=s3://b/digits, flags=s3://b/flags",
        "run_uri": "",
    }


def test_only_the_first_step_gets_the_configuration(compiled: Any) -> None:
    pipeline = compiled[1]
    tasks, components = pipeline["root"]["dag"]["tasks"], pipeline["components"]
    given = tasks["prepare-data"]["inputs"]["parameters"]
    defaults = {n: p.get("defaultValue") for n, p in pipeline["root"]["inputDefinitions"]["parameters"].items()}
    text = given["cluster"]["runtimeValue"]["constant"]
    assert resolve(defaults["recipe"], defaults["settings"], defaults["transfer"], text) == CONFIG
    for name in tasks.keys() - {"prepare-data"}:
        inputs = components[tasks[name]["componentRef"]["name"]]["inputDefinitions"]["parameters"]
        assert inputs.keys() <= {"run_uri", "results"}


def test_another_recipe_changes_only_the_parameter_defaults(compiled: Any, tmp_path: Path) -> None:
    other = Config.load("imagenet_swin_tiny_w7_view", ["training.epochs=3", "launch.profile_steps=5"])
    compile_pipeline("pretrain", other.model_copy(update={"cluster": CONFIG.cluster}), tmp_path / "other.yaml")
    pipeline, platform = documents((tmp_path / "other.yaml").read_text(encoding="utf-8"))
    pipeline["root"].pop("inputDefinitions")
    assert pipeline == {**compiled[1], "root": {"dag": compiled[1]["root"]["dag"]}} and platform == compiled[2]


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


@pytest.mark.parametrize("audience", [None, "https://kubernetes.default.svc"])
def test_with_web_identity_every_step_uses_the_config_map_and_no_secret(audience: str | None, tmp_path: Path) -> None:
    """With an audience the step uses the token of its account, otherwise the one that the platform mounts."""
    settings = ["cluster.image=registry.example/esvit:1", "cluster.identity=web-identity", *PODS]
    settings += [f"cluster.token_audience={audience}"] * (audience is not None)
    compile_pipeline("pretrain", Config.load("demo", settings), tmp_path / "pipeline.yaml")
    text = (tmp_path / "pipeline.yaml").read_text(encoding="utf-8")
    pipeline, platform = documents(text)
    assert "secretAsEnv" not in text and "ESVIT_S3_SECRET_KEY" not in text
    steps = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert steps.keys() == pipeline["deploymentSpec"]["executors"].keys()
    for name, step in steps.items():
        required, optional = step["configMapAsEnv"]
        assert required["configMapName"] == optional["configMapName"] == "esvit-object-store"
        assert [k["envVar"] for k in required["keyToEnv"]] == ["ESVIT_S3_ENDPOINT"] and optional["optional"]
        assert "ESVIT_S3_ROLE_ARN" in [k["envVar"] for k in optional["keyToEnv"]]
        literals = {e["name"]: e["value"] for e in pipeline["deploymentSpec"]["executors"][name]["container"]["env"]}
        file = "/var/run/secrets/kubernetes.io/serviceaccount/token" if audience else None
        assert literals.get("ESVIT_S3_WEB_IDENTITY_TOKEN_FILE") == file


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["cluster.token_audience=sts"], "token_audience has no effect with identity: keys"),
        (["cluster.identity=web-identity", "cluster.secret=keys"], "secret: no effect with identity: web-identity"),
        (["cluster.identity=web-identity", "cluster.train.secret=keys"], "train.secret: no effect with identity"),
    ],
)
def test_a_setting_without_effect_on_the_identity_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Config.load("demo", settings)


def test_no_key_of_the_environment_is_compiled_in(tmp_path: Path) -> None:
    keys = {"ESVIT_S3_ENDPOINT": "store.example:9000", "ESVIT_S3_ACCESS_KEY": "AKSEEN", "ESVIT_S3_SECRET_KEY": "SKSEEN"}
    path = tmp_path / "pipeline.yaml"
    done = subprocess.run(
        [sys.executable, "-m", "esvit_pipelines", "compile", "-o", path, "--recipe", "demo", *PODS_OPTIONS],
        env={**os.environ, **keys},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    for key in keys.values():
        assert key not in path.read_text() + done.stdout + done.stderr
    assert f"{path}: 10 steps" in done.stdout and "pretrain" in done.stdout


def test_compiling_twice_gives_the_same_bytes(compiled: Any, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from esvit_core.config import Config;"
        "from esvit_pipelines.cluster.compile import compile_pipeline;"
        "compile_pipeline('pretrain', Config.from_yaml(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))"
    )
    config, path = tmp_path / "config.yaml", tmp_path / "pipeline.yaml"
    config.write_text(CONFIG.to_yaml())
    subprocess.run([sys.executable, "-c", code, config, path], check=True, timeout=240)
    assert path.read_text(encoding="utf-8") == compiled[0]


@pytest.mark.parametrize(
    ("pipeline", "options", "expected"),
    [
        ("pretrain", [], ("auto", "")),
        ("pretrain", ["--recipe", "auto:hours=8", "--set", "seed=3"], ("auto:hours=8", "seed=3")),
        ("pretrain", ["--recipe", "demo"], ("demo", "")),
        ("evaluate", [], ("demo", "")),
    ],
)
def test_auto_is_the_default_of_the_form_of_pretrain_only(
    tmp_path: Path, pipeline: str, options: list[str], expected: tuple[str, str]
) -> None:
    from typer.testing import CliRunner

    from esvit_pipelines.cli.main import app

    path = tmp_path / "pipeline.yaml"
    done = CliRunner().invoke(app, ["compile", pipeline, "-o", str(path), *options, *PODS_OPTIONS])
    assert done.exit_code == 0, done.output
    spec, _ = documents(path.read_text(encoding="utf-8"))
    form = spec["root"]["inputDefinitions"]["parameters"]
    assert (form["recipe"]["defaultValue"], form["settings"]["defaultValue"]) == expected
