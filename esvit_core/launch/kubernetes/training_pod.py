"""The pod of a training node, for every scheduler.

Everything here is a plain dictionary, as it is sent to the API. It contains no credentials: the pod takes the object
store's address and keys from a secret, or has a token instead of keys, and knows only the address of the run.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from typing import Any

from esvit_core.config import Config
from esvit_core.config.cluster_settings import CA_FOLDER, TOKEN_FOLDER, ClusterConfig, PodConfig
from esvit_core.launch.agent import AGENT_MODULE
from esvit_core.launch.kubernetes.presence import UNFOLLOWED_VARIABLE
from esvit_core.launch.pod_metadata import (
    METRICS_PORT,
    METRICS_PORT_VARIABLE,
    SCRATCH,
    TEMPORARY,
    TEMPORARY_SIZE,
    container_security,
    pod_annotations,
    pod_labels,
    pod_security,
    scratch_variables,
)
from esvit_core.launch.signals import POD_SECONDS
from esvit_core.planning.pod_sizes import resolve_pod
from esvit_core.runs.environment import allocator_variables
from esvit_core.runs.run import name_of_run
from esvit_core.storage.address import pod_variables
from esvit_core.storage.web_identity import TOKEN_FILE

MODULE = "esvit_core.training"
RENDEZVOUS_PORT = 29500
TOKEN_SECONDS = 3600  # the kubelet renews it when a fifth is left
HOST_LABEL = "kubernetes.io/hostname"
RUN_LABEL = "esvit.dev/run"
RUN_ANNOTATION = "esvit.dev/run-uri"
TERMINATION_FILE = "/dev/termination-log"


def job_name(run_uri: str) -> str:
    """Return the name of the job that trains the run at ``run_uri``; it is deterministic, so a repeated step finds it.

    It has at most 46 characters, because pod names, which are host names too, add up to 15.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", name_of_run(run_uri).lower()).strip("-")[:31].strip("-")
    return f"esvit-{slug}-{hashlib.sha256(run_uri.encode()).hexdigest()[:8]}"


def labels(run_uri: str) -> dict[str, str]:
    """Return the labels of the pods of a training job."""
    value = re.sub(r"[^A-Za-z0-9_.-]+", "-", name_of_run(run_uri))[:63].strip("-_.")
    return pod_labels("trainer", **{RUN_LABEL: value})


def training_app(run_uri: str, config: Config) -> Any:
    """Return the torchx description of the training (``dist.ddp``), for any scheduler."""
    from torchx.components.dist import ddp

    launch = config.launch
    return ddp(
        "--run-uri",
        run_uri,
        m=MODULE,
        name=f"esvit/{job_name(run_uri)}",
        image=config.cluster.train.image or config.cluster.image,
        j=f"{launch.fewest_nodes}:{launch.nodes}x{config.node_processes}",
        tee=0,
    )


def torchrun(run_uri: str, config: Config) -> str:
    """Return the command of torchx's description, ``torchrun ... -m esvit_core.training ...``, for a shell."""
    (role,) = training_app(run_uri, config).roles
    return str(role.args[-1])


def agent_command(
    torchrun: str, *, endpoint: str, address: str, job: str, restarts: int, join_seconds: int | None = None
) -> list[str]:
    """Return the command of a pod: our agent with the arguments that torchx passes to torchrun.

    torchx lets a shell read the first node from a variable and falls back to ``localhost``, so that a node without the
    variable would train alone. Here the endpoint is explicit, because the names of the pods are known.

    Args:
        torchrun: ``torchrun --rdzv_endpoint ... -m esvit_core.training ...``, for a shell.
        endpoint: host name of the first node.
        address: host name of this node. The node whose address is the endpoint hosts the rendezvous store. Ranks follow
            the order of the addresses, so the first node has rank 0.
        job: id of the rendezvous.
        restarts: number of times that the agent restarts its processes after a failure.
        join_seconds: time to wait for the other nodes; None: ten minutes, torchrun's default.
    """
    arguments = shlex.split(torchrun)[1:]
    for option, value in (("--rdzv_endpoint", f"{endpoint}:{RENDEZVOUS_PORT}"), ("--rdzv_id", job)):
        arguments[arguments.index(option) + 1] = value
    own = ["--local_addr", address, "--max_restarts", str(restarts)]
    if join_seconds is not None:
        own += ["--rdzv_conf", f"join_timeout={join_seconds}"]
    return ["python", "-m", AGENT_MODULE, *own, *arguments]


def complete_pod(template: dict[str, Any], run_uri: str, config: Config) -> None:
    """Complete a pod template with one container, in place.

    Args:
        template: ``metadata`` and ``spec`` of the pod. The container's name, command and literal environment are kept.
        run_uri: address of the run to train.
        config: of the run.
    """
    launch, pod, spec = config.launch, resolve_pod(config, "train"), template["spec"]
    metadata = template.setdefault("metadata", {})
    metadata["labels"] = {**metadata.get("labels", {}), **labels(run_uri)}
    metadata["annotations"] = {**metadata.get("annotations", {}), **launch.annotations, **pod_annotations()}
    same_job = {"matchLabels": {RUN_LABEL: labels(run_uri)[RUN_LABEL]}}
    (container,) = spec["containers"]
    container |= {
        "image": pod.image or config.cluster.image,
        "imagePullPolicy": config.cluster.image_pull_policy,
        "env": _environment(container.get("env", []), config),
        "resources": _resources(pod, launch.resources),
        "ports": [
            {"name": "c10d", "containerPort": RENDEZVOUS_PORT},
            {"name": "metrics", "containerPort": METRICS_PORT},
        ],
        "volumeMounts": [
            *([{"name": "shm", "mountPath": "/dev/shm"}] if pod.shared_memory else []),
            {"name": "tmp", "mountPath": TEMPORARY},
            {"name": "work", "mountPath": SCRATCH},
        ],
        "securityContext": container_security(*(["IPC_LOCK"] if launch.ipc_lock else [])),
        "terminationMessagePath": TERMINATION_FILE,
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    spec |= {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "restartPolicy": "Never",
        "securityContext": pod_security(config.cluster.run_as),
        "serviceAccountName": launch.service_account,
        "terminationGracePeriodSeconds": POD_SECONDS,
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": launch.spread_over,
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": same_job,
            }
        ],
        "volumes": [
            *(
                [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": pod.shared_memory}}]
                if pod.shared_memory
                else []
            ),
            {"name": "tmp", "emptyDir": {"sizeLimit": TEMPORARY_SIZE}},
            {"name": "work", "emptyDir": {"sizeLimit": pod.scratch}},
        ],
    }
    apart = [{"topologyKey": HOST_LABEL, "labelSelector": same_job}]
    chosen = {
        "affinity": launch.one_pod_per_node
        and {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": apart}},
        "nodeSelector": pod.node_selector,
        "tolerations": [toleration.model_dump(exclude_none=True) for toleration in pod.tolerations],
        "imagePullSecrets": [{"name": name} for name in config.cluster.image_pull_secrets],
    }
    if certificates := config.cluster.ca_config_map:
        spec["volumes"].append({"name": "ca", "configMap": {"name": certificates}})
        container["volumeMounts"].append({"name": "ca", "mountPath": CA_FOLDER, "readOnly": True})
    if token := _token_volume(config.cluster):
        spec["volumes"].append(token)
        container["volumeMounts"].append({"name": token["name"], "mountPath": TOKEN_FOLDER, "readOnly": True})
    for name, value in chosen.items():
        spec.pop(name, None)
        if value:
            spec[name] = value


def _environment(given: list[dict[str, Any]], config: Config) -> list[dict[str, Any]]:
    """Return literal variables, which are not secret, and references to the store's secret or config map."""
    launch, cluster = config.launch, config.cluster
    literals = {item["name"]: item["value"] for item in given} | literal_environment(config) | launch.env
    if launch.unfollowed_minutes is not None:
        literals.setdefault(UNFOLLOWED_VARIABLE, f"{60 * launch.unfollowed_minutes:g}")
    keys = cluster.identity == "keys"
    required, optional = pod_variables(keys)
    source, name = "secretKeyRef", cluster.secret_of("train")
    if not keys:
        source, name = "configMapKeyRef", cluster.store_config_map
        if cluster.token_audience:
            literals[TOKEN_FILE] = f"{TOKEN_FOLDER}/token"
    references = [
        {"name": key, "valueFrom": {source: {"name": name, "key": key, **more}}}
        for variables, more in ((required, {}), (optional, {"optional": True}))
        for key in variables
    ]
    return [*references, *({"name": name, "value": value} for name, value in literals.items())]


def _token_volume(cluster: ClusterConfig) -> dict[str, Any] | None:
    """Return the volume with the token for the store's STS, which the kubelet renews; the pod has no other token."""
    if cluster.identity == "keys" or not cluster.token_audience:
        return None
    token = {"audience": cluster.token_audience, "expirationSeconds": TOKEN_SECONDS, "path": "token"}
    return {"name": "store-token", "projected": {"sources": [{"serviceAccountToken": token}]}}


def literal_environment(config: Config) -> dict[str, str]:
    """Return the environment of every training node, in a pod or another container."""
    launch = config.launch
    environment = {
        "LOGLEVEL": "ERROR",
        "PYTHONUNBUFFERED": "1",
        "HOME": SCRATCH,
        "ESVIT_CACHE_DIR": f"{SCRATCH}/cache",
        **scratch_variables(resolve_pod(config, "train").cache_gib),
        "ESVIT_PENDING_DIR": f"{SCRATCH}/pending",
        METRICS_PORT_VARIABLE: str(METRICS_PORT),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # deterministic matrix products on GPUs
        # With a shared store, a node that rejoins waits for an address that nobody writes (torch 2.14).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        # The agent writes the reason of a failure here, and Kubernetes copies it into the pod's status.
        "TORCHELASTIC_ERROR_FILE": TERMINATION_FILE,
    }
    if config.cluster.train.accelerators:
        environment["NCCL_DEBUG"] = "WARN"
    environment |= {f"NCCL_{name}": value for name, value in launch.nccl.items()}
    environment |= allocator_variables(launch.allocator)
    if launch.interface:
        environment |= {"NCCL_SOCKET_IFNAME": launch.interface, "GLOO_SOCKET_IFNAME": launch.interface}
    return environment


def _resources(pod: PodConfig, additional: dict[str, int]) -> dict[str, Any]:
    """Return requests and limits, always with a memory limit: otherwise the namespace's default would apply."""
    accelerators = {pod.accelerator: str(pod.accelerators)} if pod.accelerators else {}
    accelerators |= {name: str(number) for name, number in additional.items()}
    cpu_limit = {"cpu": pod.cpu_limit} if pod.cpu_limit is not None else {}
    return {
        "requests": {"cpu": pod.cpu, "memory": pod.memory, **accelerators},
        "limits": {**cpu_limit, "memory": pod.memory_limit, **accelerators},
    }
