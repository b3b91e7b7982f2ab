"""The Volcano job: its contents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from esvit_core.config import Config
from esvit_core.config.kubernetes_names import quantity_bytes
from esvit_core.errors import UserError
from esvit_core.launch.kubernetes.client import State
from esvit_core.launch.kubernetes.training_pod import job_name
from esvit_core.launch.kubernetes.volcano import Volcano, volcano_job

GOLDEN = Path(__file__).parent / "recorded" / "volcano_job.yaml"
RUN = "s3://esvit/runs/factory-2f3a9c"
SETTINGS = [
    "cluster.image=registry.example/esvit/trainer@sha256:" + "5" * 64,
    "training.batch_size=256",
    "launch.scheduler=volcano",
    "launch.nodes=2",
    "launch.min_nodes=1",
    "cluster.train.accelerators=8",
    "cluster.train.cpu=64",
    "cluster.train.cpu_limit=64",
    "cluster.train.memory=512Gi",
    "cluster.train.shared_memory=16Gi",
    "launch.priority_class=esvit-training",
    "launch.interface=eth0",
    "cluster.train.node_selector={nvidia.com/gpu.product: H100}",
    "cluster.train.tolerations=[{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]",
    "launch.env={NCCL_IB_HCA: mlx5}",
    "cluster.image_pull_secrets=[registry]",
    "cluster.ca_config_map=store-ca",
]
OWNER = {"apiVersion": "v1", "kind": "Pod", "name": "pretrain-step", "uid": "00000000-0000-0000-0000-000000000001"}
KEYS = {
    "ESVIT_S3_ENDPOINT": "minio.esvit.svc:9000",
    "ESVIT_S3_ACCESS_KEY": "the-access-key",
    "ESVIT_S3_SECRET_KEY": "the-secret-key",
}


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    """Made where the credentials are in the environment, as they are in the step."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        return volcano_job(RUN, Config.load("imagenet_swin_tiny_w7", SETTINGS), OWNER)


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    return [task["template"] for task in job["spec"]["tasks"]]


def test_the_golden_job_is_current(job: dict[str, Any]) -> None:
    text = yaml.safe_dump(job, sort_keys=False)
    assert GOLDEN.read_text(encoding="utf-8") == text, (
        f"the job has changed; if that is meant, write it to {GOLDEN}:\n{text}"
    )


def test_no_credential_is_in_the_job(job: dict[str, Any]) -> None:
    text = json.dumps(job)
    assert not [value for value in KEYS.values() if value in text]
    for pod in pods(job):
        (container,) = pod["spec"]["containers"]
        stores = [item for item in container["env"] if item["name"].startswith("ESVIT_S3_")]
        assert {item["name"] for item in stores} >= set(KEYS)
        for item in stores:
            assert "value" not in item and item["valueFrom"]["secretKeyRef"]["name"] == "esvit-object-store-train"


def test_with_web_identity_pods_have_a_token_for_the_store_and_no_secret() -> None:
    web = ["cluster.identity=web-identity", "cluster.token_audience=esvit-store"]
    made = volcano_job(RUN, Config.load("imagenet_swin_tiny_w7", [*SETTINGS, *web]), OWNER)
    assert "secretKeyRef" not in json.dumps(made)
    for pod in pods(made):
        kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", **pod}, "1.35", strict=True)
        spec = pod["spec"]
        (container,) = spec["containers"]
        (volume,) = [volume for volume in spec["volumes"] if "projected" in volume]
        (token,) = [source["serviceAccountToken"] for source in volume["projected"]["sources"]]
        assert (
            token["audience"] == "esvit-store" and token["expirationSeconds"] >= 600
        )  # the least that Kubernetes takes
        (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == volume["name"]]
        environment = {item["name"]: item for item in container["env"]}
        file = environment["ESVIT_S3_WEB_IDENTITY_TOKEN_FILE"]["value"]
        assert file == f"{mount['mountPath']}/{token['path']}" and mount["readOnly"]
        assert environment["ESVIT_S3_ENDPOINT"]["valueFrom"]["configMapKeyRef"]["name"] == "esvit-object-store"
        assert spec["serviceAccountName"] == "esvit-trainer" and not spec["automountServiceAccountToken"]


def test_without_an_audience_the_platform_puts_the_token_into_the_pods() -> None:
    made = volcano_job(RUN, Config.load("imagenet_swin_tiny_w7", [*SETTINGS, "cluster.identity=web-identity"]), OWNER)
    text = json.dumps(made)
    assert "secretKeyRef" not in text and "TOKEN_FILE" not in text and "projected" not in text


@pytest.mark.parametrize("name", ["ESVIT_S3_SECRET_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"])
def test_a_credential_among_the_settings_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}: looks like a credential.*cluster.train.secret"):
        Config.load("demo", ["launch.scheduler=volcano", f"launch.env={{{name}: x}}"])


@pytest.mark.parametrize("version", ["1.35", "1.36", "1.37"])
def test_every_pod_passes_the_schemas_of_kubernetes(job: dict[str, Any], version: str) -> None:
    for pod in pods(job):
        named = {"apiVersion": "v1", "kind": "Pod", **pod}
        kubernetes_validate.validate(named, version, strict=True)


def test_every_pod_meets_the_restricted_standard(job: dict[str, Any]) -> None:
    for pod in pods(job):
        spec = pod["spec"]
        (container,) = spec["containers"]
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False and context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]} and "privileged" not in context
        assert not spec["automountServiceAccountToken"]
        assert all(set(volume) < {"name", "emptyDir", "configMap"} for volume in spec["volumes"])
        assert "hostNetwork" not in spec
        assert container["resources"]["requests"] == container["resources"]["limits"]


def test_temporary_files_lie_in_the_volume_that_is_sized_for_checkpoints(job: dict[str, Any]) -> None:
    for pod in pods(job):
        (container,) = pod["spec"]["containers"]
        environment = {item["name"]: item.get("value") for item in container["env"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume["emptyDir"] for volume in pod["spec"]["volumes"] if "emptyDir" in volume}
        size = quantity_bytes(volumes[mounts[environment["TMPDIR"]]]["sizeLimit"])
        assert size - 2**30 * float(environment["ESVIT_CACHE_GIB"]) >= 25 * 2**30


def test_nodes_meet_at_the_first_which_has_rank_0(job: dict[str, Any]) -> None:
    commands = [pod["spec"]["containers"][0]["command"] for pod in pods(job)]
    assert all(command[:3] == ["python", "-m", "esvit_core.launch.agent"] for command in commands)
    endpoints = {command[command.index("--rdzv_endpoint") + 1] for command in commands}
    addresses = [command[command.index("--local_addr") + 1] for command in commands]
    name = job["metadata"]["name"]
    assert endpoints == {f"{name}-training-0-0.{name}:29500"}
    assert addresses == [f"{name}-training-{n}-0.{name}" for n in (0, 1)]
    many = [f"{name}-training-{n}-0.{name}" for n in range(30)]
    assert min(many) == many[0]  # torch numbers nodes in the order of their addresses


def test_elastic_nodes_are_optional(job: dict[str, Any]) -> None:
    assert job["spec"]["minAvailable"] == 1
    assert [task["minAvailable"] for task in job["spec"]["tasks"]] == [1, 0]
    fixed = volcano_job(RUN, Config.load("demo", ["launch.scheduler=volcano", "launch.nodes=3"]))
    assert fixed["spec"]["minAvailable"] == 3
    assert [task["minAvailable"] for task in fixed["spec"]["tasks"]] == [1, 1, 1]


def test_a_run_has_one_name_and_other_runs_have_others() -> None:
    long = f"s3://esvit/runs/{'Long_Name.' * 12}"
    assert job_name(RUN) == job_name(RUN)
    assert job_name(RUN) != job_name(RUN.replace("esvit/", "other/"))
    for uri in (RUN, long, "s3://b/runs/-x-"):
        pod = f"{job_name(uri)}-training-999-0"
        assert len(pod) <= 63 and pod.replace("-", "").isalnum() and pod == pod.lower()


@pytest.mark.parametrize(
    "phase, state",
    [
        ("Pending", State.WAITING),
        ("Running", State.RUNNING),
        ("Restarting", State.RESTARTING),
        ("Aborting", State.ENDING),
        ("Completing", State.ENDING),
        ("Terminating", State.ENDING),
        ("Completed", State.SUCCEEDED),
        ("Failed", State.FAILED),
        ("Terminated", State.FAILED),
        ("Aborted", State.CANCELLED),
        ("Unheard", State.WAITING),
    ],
)
def test_states_of_volcano(phase: str, state: State) -> None:
    assert Volcano().state({"status": {"state": {"phase": phase}}}, []) is state


def test_a_job_without_a_phase_is_waiting() -> None:
    assert Volcano().state({"metadata": {}}, []) is State.WAITING


@pytest.mark.parametrize(
    "settings, words",
    [
        (
            ["launch.scheduler=volcano", "launch.nodes=2", "launch.min_nodes=3"],
            "min_nodes 3: expected at most nodes, which is 2",
        ),
        (
            ["launch.scheduler=volcano", "cluster.train.accelerators=2", "launch.processes_per_node=4"],
            "processes_per_node 4: expected at most cluster.train.accelerators, which is 2",
        ),
        (
            ["cluster.train.shared_memory=16Gi", "cluster.train.memory=16Gi"],
            "expected less than the pod's memory, which is 16Gi",
        ),
        (["cluster.train.cpu=4", "cluster.train.cpu_limit=2"], "cpu_limit 2: expected at least cpu, which is 4"),
        (["cluster.train.memory=4Gi", "cluster.train.memory_limit=2G"], "memory_limit 2G: expected at least memory"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Config.load("demo", settings)
