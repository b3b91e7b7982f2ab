"""What the pod of a step gets on a cluster: resources, nodes, writable folders, keys, another try.

KFP cannot say everything of a pod: a read-only root file system and the seccomp profile are the cluster's to set. The
folders that the steps write to are volumes here, so that they may be.
"""

from typing import Any

from kfp import dsl

from esvit_core.config import Config
from esvit_core.config.cluster_settings import CA_FOLDER, ClusterConfig, PodConfig, Role
from esvit_core.config.kubernetes_names import bytes_quantity, quantity_bytes
from esvit_core.errors import UserError
from esvit_core.launch.pod_metadata import (
    METRICS_LABEL,
    METRICS_PORT,
    METRICS_PORT_VARIABLE,
    pod_annotations,
    pod_labels,
    pod_security,
    queue_labels,
)
from esvit_core.planning.pod_sizes import sized
from esvit_core.repetition import variables
from esvit_core.training.checkpoint_interval import LOST_SECONDS_VARIABLE, POD_LOST_SECONDS

RETRY_WINDOW_SECONDS = 30 * 24 * 3600
# KFP has no projected volumes: what a step can show is the token that the account mounts into every pod of a run.
ACCOUNT_TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount/token"


def place(task: dsl.PipelineTask, config: Config, role: Role, accelerated: bool, trains: bool = False) -> None:
    """Give the step's pod what the configuration says for its kind of step.

    Args:
        accelerated: with the accelerators, too.
        trains: it is the pre-training step. Where it trains in its own pod, Prometheus finds it at the port of all
            trainings; where it starts a job, its pod is small, and the job's pods get what cluster.train says.

    Raises:
        UserError: the cluster extra is not installed, or the recipe has no such network.
    """
    kubernetes = _kubernetes()
    cluster = config.cluster
    launches = trains and config.launch.scheduler != "local"
    serves_metrics = trains and not launches
    pod = cluster.launching_pod() if launches else sized(config, role)
    if pod.image is not None:
        task.set_container_image(pod.image)
    _resources(task, pod)
    if accelerated and pod.accelerators:
        task.set_accelerator_type(pod.accelerator)
        task.set_accelerator_limit(pod.accelerators)
    if cluster.retry_lost_pods:
        task.set_retry(pod.retries, f"{pod.retry_seconds}s", 2.0)  # for how long: lengthen_retries
    for name, value in variables(pod.retries, pod.retry_seconds).items():
        task.set_env_variable(name, value)
    kubernetes.set_image_pull_policy(task, cluster.image_pull_policy)
    if cluster.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(cluster.image_pull_secrets))
    if cluster.run_as is not None:  # KFP can say these three of the security context, and no more
        security = pod_security(cluster.run_as)
        kubernetes.set_security_context(
            task,
            run_as_user=security["runAsUser"],
            run_as_group=security["runAsGroup"],
            run_as_non_root=security["runAsNonRoot"],
        )
    if pod.timeout_minutes is not None:
        kubernetes.set_timeout(task, 60 * pod.timeout_minutes)
    for key, value in pod.node_selector.items():
        kubernetes.add_node_selector(task, key, value)
    for toleration in pod.tolerations:
        kubernetes.add_toleration(task, **toleration.model_dump())
    more = {"esvit.dev/role": role, **queue_labels(cluster.queue, cluster.priority)}
    if serves_metrics:
        more[METRICS_LABEL] = "true"
    for label, value in pod_labels("step", **more).items():
        kubernetes.add_pod_label(task, label, value)
    for annotation, value in pod_annotations().items():
        kubernetes.add_pod_annotation(task, annotation, value)
    if serves_metrics:
        task.set_env_variable(METRICS_PORT_VARIABLE, str(METRICS_PORT))
        task.set_env_variable(LOST_SECONDS_VARIABLE, f"{POD_LOST_SECONDS:g}")  # its pod gets no time to save
    task.set_env_variable("ESVIT_CACHE_GIB", pod.cache_gib)
    for folder in ("tmp", "work"):
        kubernetes.empty_dir_mount(task, folder, f"/{folder}", size_limit=pod.scratch)
    if pod.shared_memory is not None:
        kubernetes.empty_dir_mount(task, "shared-memory", "/dev/shm", medium="Memory", size_limit=pod.shared_memory)
    if cluster.ca_config_map is not None:
        kubernetes.use_config_map_as_volume(task, cluster.ca_config_map, CA_FOLDER)
    _store(kubernetes, task, cluster, role)


def lengthen_retries(spec: Any) -> None:
    """Let the retries of every task count from its first start for a month, whatever it takes.

    ``backoff_max_duration`` is one window for all attempts: a pod that is lost after it is not started again. KFP's SDK
    bounds it at an hour; its server does not.

    Args:
        spec: a ``PipelineSpec``; changed in place.
    """
    for dag in (spec.root.dag, *(component.dag for component in spec.components.values())):
        for task in dag.tasks.values():
            if task.HasField("retry_policy"):
                task.retry_policy.backoff_max_duration.seconds = RETRY_WINDOW_SECONDS


def _kubernetes() -> Any:
    try:
        from kfp import kubernetes
    except ImportError:
        raise UserError(
            "a pipeline for a cluster: kfp-kubernetes is not installed; pip install 'esvit[cluster]'"
        ) from None
    return kubernetes


def _resources(task: dsl.PipelineTask, pod: PodConfig) -> None:
    """Requests and limits. A memory limit is always there: without one the namespace's default would hold."""
    task.set_cpu_request(pod.cpu)
    task.set_memory_request(_memory(pod.memory))
    if pod.cpu_limit is not None:
        task.set_cpu_limit(pod.cpu_limit)
    task.set_memory_limit(_memory(pod.memory_limit))


def _memory(quantity: str) -> str:
    """KFP takes no fractions, and of the units of 1000 not the smallest."""
    return bytes_quantity(quantity_bytes(quantity))


def _store(kubernetes: Any, task: dsl.PipelineTask, cluster: ClusterConfig, role: Role) -> None:
    """The object store as environment, from a Kubernetes secret or a config map: no key is in the pipeline."""
    keys = cluster.identity == "keys"
    # Not above: it brings the client of the store, which the local runner does not need.
    from esvit_core.storage.address import pod_variables
    from esvit_core.storage.web_identity import TOKEN_FILE

    required, optional = pod_variables(keys)
    use, name = kubernetes.use_secret_as_env, cluster.secret_of(role)
    if not keys:
        use, name = kubernetes.use_config_map_as_env, cluster.store_config_map
        if cluster.token_audience:
            task.set_env_variable(TOKEN_FILE, ACCOUNT_TOKEN)
    use(task, name, {key: key for key in required})
    # One that lacks some of these is no error: they have defaults.
    use(task, name, {key: key for key in optional}, optional=True)
