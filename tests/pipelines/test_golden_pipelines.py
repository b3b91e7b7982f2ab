"""The golden files of the compiled pipelines are current, and KFP can read them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from kfp import components
from kfp.kubernetes import kubernetes_executor_config_pb2

from esvit_core.config import Config
from esvit_core.config.kubernetes_names import quantity_bytes
from esvit_core.errors import UserError
from esvit_core.launch.pod_metadata import (
    METRICS_LABEL,
    METRICS_PORT,
    METRICS_PORT_VARIABLE,
    pod_annotations,
    pod_labels,
)
from esvit_core.repetition import RETRIES_VARIABLE, WAIT_VARIABLE
from esvit_core.training.checkpoint_interval import LOST_SECONDS_VARIABLE
from esvit_pipelines.cluster.compile import PIPELINES, build, pipeline_text
from esvit_pipelines.steps import step_names

GOLDEN = Path(__file__).parent / "golden"
RECIPE = GOLDEN / "recipe.yaml"
FOLDERS = {path.parent.name for path in (GOLDEN.parents[2] / "pipelines").glob("*/pipeline.py")}


def golden(name: str) -> str:
    return (GOLDEN / f"{name}.yaml").read_text(encoding="utf-8")


def documents(text: str) -> Iterator[Any]:
    """Read YAML with libyaml's parser, which is ten times as fast as the other."""
    return yaml.load_all(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def changes(before: str, after: str) -> list[str]:
    """Return the lines that differ, with their sign and without indentation."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    return [line[0] + line[1:].strip() for line in lines if not line.startswith(("---", "+++", "@@"))]


@pytest.fixture(params=sorted(PIPELINES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def executors(name: str) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Return the executor and the pod settings of each step."""
    pipeline, platform = documents(golden(name))
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    containers = pipeline["deploymentSpec"]["executors"]
    assert pods.keys() == containers.keys()
    return {key: (containers[key]["container"], pods[key]) for key in containers}


def test_every_pipeline_has_a_golden_file() -> None:
    assert set(PIPELINES) == FOLDERS == {path.stem for path in GOLDEN.glob("*.yaml")} - {"recipe"}


def test_the_golden_file_is_current(name: str) -> None:
    message = "\n".join(changes(golden(name), pipeline_text(name, Config.load(RECIPE)))[:40])
    assert not message, f"what is compiled now differs from {name}.yaml; if that is meant: make golden\n{message}"


def test_kfp_reads_both_documents(name: str) -> None:
    assert step_names(components.load_component_from_text(golden(name)))
    for _, pod in executors(name).values():  # a key that the message lacks is an error
        json_format.ParseDict(pod, kubernetes_executor_config_pb2.KubernetesExecutorConfig())


def test_every_parameter_is_described(name: str) -> None:
    pipeline = next(documents(golden(name)))
    parameters = pipeline["root"]["inputDefinitions"]["parameters"]
    assert all(len(p["description"]) > 40 for p in parameters.values())
    assert {key for key, p in parameters.items() if not p.get("isOptional")} <= {"data"}
    assert pipeline["pipelineInfo"]["displayName"] and pipeline["pipelineInfo"]["description"]


def test_every_step_has_retries_limits_and_writable_volumes(name: str) -> None:
    pipeline = next(documents(golden(name)))
    components = pipeline["components"]
    dags = [pipeline["root"]["dag"], *(component["dag"] for component in components.values() if "dag" in component)]
    tasks = [task for dag in dags for task in dag["tasks"].values()]
    for task in (task for task in tasks if "dag" not in components[task["componentRef"]["name"]]):
        retry = task["retryPolicy"]
        assert retry["maxRetryCount"] >= 3 and retry["backoffFactor"] == 2 and retry["backoffDuration"] == "30s"
        assert retry["backoffMaxDuration"] == "2592000s"  # covers a training of a month
    for container, pod in executors(name).values():
        environment = {item["name"]: item["value"] for item in container["env"]}
        assert int(environment[RETRIES_VARIABLE]) >= 3 and environment[WAIT_VARIABLE] == "30"
        resources = container["resources"]
        bounds = {f"resource{kind}{bound}" for kind in ("Cpu", "Memory") for bound in ("Request", "Limit")}
        assert bounds <= resources.keys()  # without a memory limit the namespace's default would apply
        volumes = {mount["mountPath"]: mount["sizeLimit"] for mount in pod["emptyDirMounts"]}
        assert volumes["/tmp"] == "1Gi" and environment["TMPDIR"] == "/work"
        assert quantity_bytes(volumes["/work"]) == 2 * float(environment["ESVIT_CACHE_GIB"]) * 2**30
        assert pod["securityContext"] == {"runAsUser": "10001", "runAsGroup": "10001", "runAsNonRoot": True}
        assert pod_labels("step").items() <= pod["podMetadata"]["labels"].items()
        assert pod["podMetadata"]["annotations"] == pod_annotations()
        assert container["image"].partition("@sha256:")[2] and pod["imagePullSecret"][0]["secretName"] == "registry"


def test_training_gets_its_node_and_its_shared_memory() -> None:
    container, pod = executors("pretrain")["exec-pretrain"]
    assert container["resources"]["accelerator"]["resourceType"] == "nvidia.com/gpu"
    assert container["resources"]["accelerator"]["resourceCount"] == "4"
    assert pod["nodeSelector"]["labels"] == {"esvit.dev/pool": "gpu"}
    assert pod["tolerations"] == [{"effect": "NoSchedule", "key": "nvidia.com/gpu", "operator": "Exists"}]
    shared = {"medium": "Memory", "mountPath": "/dev/shm", "sizeLimit": "16Gi", "volumeName": "shared-memory"}
    assert shared in pod["emptyDirMounts"]
    assert "accelerator" not in executors("pretrain")["exec-knn"][0]["resources"], "it would not use it"


def test_only_the_training_step_is_scraped_by_prometheus(name: str) -> None:
    for key, (container, pod) in executors(name).items():
        environment = {item["name"]: item["value"] for item in container.get("env", [])}
        trains = key == "exec-pretrain"
        assert (METRICS_LABEL in pod["podMetadata"]["labels"]) is trains
        assert environment.get(METRICS_PORT_VARIABLE) == (str(METRICS_PORT) if trains else None)
        assert environment.get(LOST_SECONDS_VARIABLE) == ("60" if trains else None)  # its pod has no time to save


def test_a_training_step_that_launches_a_job_is_not_scraped() -> None:
    _, launching = documents(pipeline_text("pretrain", Config.load(RECIPE, ["launch.scheduler=volcano"])))
    pod = launching["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-pretrain"]
    assert METRICS_LABEL not in pod["podMetadata"]["labels"]


def test_without_new_images_only_the_first_step_runs() -> None:
    pipeline = next(documents(golden("retrain")))
    look, rest = sorted(pipeline["root"]["dag"]["tasks"].items(), key=lambda item: "triggerPolicy" in item[1])
    assert look[0] == "find-new-data" and "triggerPolicy" not in look[1]
    assert rest[1]["triggerPolicy"]["condition"].split() == [
        "inputs.parameter_values['pipelinechannel--find-new-data-nothing']",
        *("==", "false"),
    ]
    assert rest[1]["dependentTasks"] == ["find-new-data"]
    # A retry of the same KFP run has the same owner.
    assert look[1]["inputs"]["parameters"]["owner"]["runtimeValue"]["constant"] == "{{$.pipeline_job_uuid}}"


def test_the_order_is_compare_report_promote() -> None:
    names = step_names(components.load_component_from_text(golden("retrain")))
    assert names[0] == "find new data"
    assert names[-3:] == ["compare with the champion", "report", "promote"]


def test_each_kind_of_step_has_the_keys_of_its_own_role() -> None:
    for _, pod in executors("pretrain").values():
        role = pod["podMetadata"]["labels"]["esvit.dev/role"]
        assert {secret["secretName"] for secret in pod["secretAsEnv"]} == {f"esvit-object-store-{role}"}


def test_a_change_shows_in_the_diff() -> None:
    before = golden("pretrain")
    more = changes(before, pipeline_text("pretrain", Config.load(RECIPE, ["cluster.train.accelerators=8"])))
    # The pod of one step, and the first step's parameter with the sections cluster and launch.
    gone, new = (sorted(line[1:] for line in more if line[0] == sign) for sign in "-+")
    assert gone[:2] == ["count: '4'", "resourceCount: '4'"] or "count: '4'" in gone
    assert {"count: '8'", "resourceCount: '8'"} < set(new) and len(new) == len(gone) == 3
    longer = changes(before, pipeline_text("pretrain", Config.load(RECIPE, ["training.epochs=200"])))
    assert [line.replace("200", "100")[1:] for line in longer] == [longer[0][1:]] * 2  # the default of the recipe


def test_the_pipeline_contains_no_credentials(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {
        "ESVIT_S3_ENDPOINT": "store.example:9000",
        "ESVIT_S3_ACCESS_KEY": "AKSEEN",
        "ESVIT_S3_SECRET_KEY": "SKSEEN",
        "KF_PIPELINES_ENDPOINT": "https://kubeflow.example",
    }
    for key, value in keys.items():
        monkeypatch.setenv(key, value)
    text = pipeline_text(name, Config.load(RECIPE))
    assert not [value for value in keys.values() if value in text]
    # The names of the keys occur only where the environment is set from a secret.
    lines = {
        line.strip().removeprefix("- ") for line in text.splitlines() if "ACCESS_KEY" in line or "SECRET_KEY" in line
    }
    assert {line.partition(":")[0] for line in lines} == {"envVar", "secretKey"}


def test_a_pod_without_accelerators_limits_or_user_is_left_to_the_cluster() -> None:
    changed = ["cluster.run_as=null", "cluster.image_pull_secrets=[]", "cluster.ca_config_map=null"]
    changed += ["cluster.train.cpu_limit=null", "cluster.train.timeout_minutes=null", "cluster.train.accelerators=0"]
    pipeline, platform = documents(pipeline_text("pretrain", Config.load(RECIPE, changed)))
    pod = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-pretrain"]
    assert not {"securityContext", "imagePullSecret", "configMapAsVolume", "activeDeadlineSeconds"} & pod.keys()
    resources = pipeline["deploymentSpec"]["executors"]["exec-pretrain"]["container"]["resources"]
    assert not {"accelerator", "resourceCpuLimit"} & resources.keys()


def test_an_unknown_pipeline_suggests_the_nearest_name() -> None:
    with pytest.raises(UserError, match="pipeline pretain: it does not exist, did you mean 'pretrain'"):
        build("pretain", Config())


def test_the_step_that_starts_a_job_is_small_and_avoids_the_training_nodes() -> None:
    settings = ["launch.scheduler=volcano", "cluster.train.image=registry.example/esvit/trainer:cuda"]
    pipeline, platform = documents(pipeline_text("pretrain", Config.load(RECIPE, settings)))
    container = pipeline["deploymentSpec"]["executors"]["exec-pretrain"]["container"]
    pod = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-pretrain"]
    assert (container["resources"]["resourceCpuRequest"], container["resources"]["resourceMemoryLimit"]) == (
        "100m",
        "2Gi",
    )
    assert "accelerator" not in container["resources"] and not {"nodeSelector", "tolerations"} & pod.keys()
    assert container["image"] == Config.load(RECIPE).cluster.image


def test_each_kind_of_step_may_have_an_image_of_its_own() -> None:
    settings = ["cluster.train.image=registry.example/esvit/trainer:cuda"]
    (pipeline, _) = documents(pipeline_text("pretrain", Config.load(RECIPE, settings)))
    images = {k: e["container"]["image"] for k, e in pipeline["deploymentSpec"]["executors"].items()}
    assert images.pop("exec-pretrain") == "registry.example/esvit/trainer:cuda"
    assert set(images.values()) == {Config.load(RECIPE).cluster.image}


def test_kueue_finds_its_labels() -> None:
    for _, pod in executors("pretrain").values():
        labels = pod["podMetadata"]["labels"]
        assert labels["kueue.x-k8s.io/queue-name"] == "vision"
        assert labels["kueue.x-k8s.io/priority-class"] == "research"
