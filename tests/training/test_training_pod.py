"""Settings for GPUs, fast networks and topology reach the pods of every job, and are refused where they have no effect."""

from __future__ import annotations

from typing import Any

import kubernetes_validate
import pytest

from esvit_core.config import Config
from esvit_core.errors import UserError
from esvit_core.launch.kubernetes.train_job import train_job
from esvit_core.launch.kubernetes.volcano import volcano_job

RUN = "s3://esvit/runs/factory-2f3a9c"
GPUS = ["cluster.train.accelerators=8", "launch.nodes=2"]
FAST_NETWORK = [
    *GPUS,
    "launch.resources={rdma/hca_shared_devices_a: 1}",
    "launch.annotations={k8s.v1.cni.cncf.io/networks: rdma-net}",
    "launch.ipc_lock=true",
    "launch.one_pod_per_node=true",
    "launch.nccl={IB_HCA: mlx5, DEBUG: INFO}",
    "launch.allocator=expandable_segments:True",
]
SCHEDULERS = ("volcano", "trainjob")


def pods(scheduler: str, settings: list[str]) -> list[dict[str, Any]]:
    config = Config.load("imagenet_swin_tiny_w7", [f"launch.scheduler={scheduler}", *settings])
    if scheduler == "volcano":
        return [task["template"] for task in volcano_job(RUN, config)["spec"]["tasks"]]
    (replicated,) = train_job(RUN, config)[0]["spec"]["template"]["spec"]["replicatedJobs"]
    return [replicated["template"]["spec"]["template"]]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_pod_gets_the_fast_network(scheduler: str) -> None:
    for pod in pods(scheduler, FAST_NETWORK):
        kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", **pod}, "1.35", strict=True)
        spec, annotations = pod["spec"], pod["metadata"]["annotations"]
        (container,) = spec["containers"]
        assert annotations["k8s.v1.cni.cncf.io/networks"] == "rdma-net"
        assert annotations["sidecar.istio.io/inject"] == "false"
        for kind in ("requests", "limits"):
            assert container["resources"][kind]["rdma/hca_shared_devices_a"] == "1"
            assert container["resources"][kind]["nvidia.com/gpu"] == "8"
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
        environment = {item["name"]: item.get("value") for item in container["env"]}
        assert (environment["NCCL_IB_HCA"], environment["NCCL_DEBUG"]) == ("mlx5", "INFO")
        assert environment["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_pods_of_a_job_are_kept_apart(scheduler: str) -> None:
    for pod in pods(scheduler, FAST_NETWORK):
        (term,) = pod["spec"]["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert term["topologyKey"] == "kubernetes.io/hostname"
        assert term["labelSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert not any("affinity" in pod["spec"] for pod in pods(scheduler, GPUS))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["launch.resources={rdma/a: 1}"], "launch.resources: no effect with launch.scheduler local"),
        (["launch.ipc_lock=true"], "launch.ipc_lock: no effect with launch.scheduler local"),
        (["launch.scheduler=volcano", "launch.one_pod_per_node=true"], "one_pod_per_node: no effect with one node"),
        (["launch.scheduler=volcano", "launch.nccl={IB_HCA: a}"], "launch.nccl: no effect without accelerators"),
        (
            ["launch.scheduler=trainjob", "launch.allocator=expandable_segments:True"],
            "launch.allocator: no effect without accelerators; set cluster.train.accelerators",
        ),
        (["launch.scheduler=volcano", "launch.nccl={NCCL_DEBUG: INFO}"], "NCCL_DEBUG: leave out the prefix NCCL_"),
        (
            ["launch.scheduler=volcano", *GPUS, "launch.nccl={DEBUG: INFO}", "launch.env={NCCL_DEBUG: WARN}"],
            "NCCL_DEBUG: given in nccl and in env",
        ),
        (["launch.scheduler=volcano", "launch.resources={memory: 1}"], "memory: set by cluster.train.memory"),
        (
            ["launch.scheduler=volcano", *GPUS, "launch.resources={nvidia.com/gpu: 8}"],
            "launch.resources nvidia.com/gpu: set by cluster.train.accelerators",
        ),
        (["launch.scheduler=volcano", *GPUS, "launch.allocator=fast"], "launch.allocator"),
    ],
)
def test_settings_without_effect_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Config.load("demo", settings)


def test_none_of_them_is_part_of_the_identity_of_a_run() -> None:
    base = ["launch.scheduler=volcano"]
    digests = {Config.load("imagenet_swin_tiny_w7", [*base, *more]).digest() for more in ([], FAST_NETWORK)}
    assert len(digests) == 1
