"""Configure the pod of a step on a cluster: resources, node selection, writable folders, keys, retries.

KFP cannot set a read-only root file system or the seccomp profile; the cluster can. All folders that the steps write to
are volumes, so that a read-only root file system works.
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
    SCRATCH,
    TEMPORARY,
    TEMPORARY_SIZE,
    pod_annotations,
    pod_labels,
    pod_security,
    queue_labels,
    scratch_variables,
)
from esvit_core.planning.pod_sizes import resolve_pod
from esvit_core.repetition import variables
from esvit_core.training.checkpoint_interval import LOST_SECONDS_VARIABLE, POD_LOST_SECONDS

RETRY_WINDOW_SECONDS = 30 * 24 * 3600
# KFP has no projected volumes, so a step uses the token that Kubernetes mounts into every pod of the account.
ACCOUNT_TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount/token"


def configure_pod(task: dsl.PipelineTask, config: Config, role: Role, accelerated: bool, trains: bool = False) -> None:
    """Configure the pod of a step as the configuration sets for its role.

    Args:
        accelerated: request the role's accelerators.
        trains: it is the pre-training step. If it trains in its own pod, Prometheus scrapes that pod at the port of all
            trainings. If it starts a job, its own pod is small, and ``cluster.train`` configures the job's pods.

    Raises:
        UserError: the cluster extra is not installed, or the recipe's architecture does not exist.
    """
    kubernetes = _kubernetes()
    cluster = config.cluster
    launches = trains and config.launch.scheduler != "local"
    serves_metrics = trains and not launches
    pod = cluster.launcher_pod() if launches else resolve_pod(config, role)
    if pod.image is not None:
        task.set_container_image(pod.image)
    _resources(task, pod)
    if accelerated and pod.accelerators:
        task.set_accelerator_type(pod.accelerator)
        task.set_accelerator_limit(pod.accelerators)
    if cluster.retry_lost_pods:
        task.set_retry(pod.retries, f"{pod.retry_seconds}s", 2.0)  # lengthen_retries sets the window
    for name, value in variables(pod.retries, pod.retry_seconds).items():
        task.set_env_variable(name, value)
    kubernetes.set_image_pull_policy(task, cluster.image_pull_policy)
    if cluster.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(cluster.image_pull_secrets))
    if cluster.run_as is not None:  # KFP supports only these three fields of the security context
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
    labels = {"esvit.dev/role": role, **queue_labels(cluster.queue, cluster.priority)}
    if serves_metrics:
        labels[METRICS_LABEL] = "true"
    for label, value in pod_labels("step", **labels).items():
        kubernetes.add_pod_label(task, label, value)
    for annotation, value in pod_annotations().items():
        kubernetes.add_pod_annotation(task, annotation, value)
    if serves_metrics:
        task.set_env_variable(METRICS_PORT_VARIABLE, str(METRICS_PORT))
        task.set_env_variable(
            LOST_SECONDS_VARIABLE, f"{POD_LOST_SECONDS:g}"
        )  # Kubernetes gives the pod no time to save
    for name, value in scratch_variables(pod.cache_gib).items():
        task.set_env_variable(name, value)
    for folder, size in ((TEMPORARY, TEMPORARY_SIZE), (SCRATCH, pod.scratch)):
        kubernetes.empty_dir_mount(task, folder.strip("/"), folder, size_limit=size)
    if pod.shared_memory is not None:
        kubernetes.empty_dir_mount(task, "shared-memory", "/dev/shm", medium="Memory", size_limit=pod.shared_memory)
    if cluster.ca_config_map is not None:
        kubernetes.use_config_map_as_volume(task, cluster.ca_config_map, CA_FOLDER)
    _store(kubernetes, task, cluster, role)


def lengthen_retries(spec: Any) -> None:
    """Set the retry window of every task to a month from its first start.

    ``backoff_max_duration`` is one window for all attempts: a pod that is lost after it is not restarted. KFP's SDK
    limits it to an hour; its server does not.

    Args:
        spec: a ``PipelineSpec``, which is modified in place.
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
            "a pipeline for a cluster needs kfp-kubernetes, which is not installed; pip install 'esvit[cluster]'"
        ) from None
    return kubernetes


def _resources(task: dsl.PipelineTask, pod: PodConfig) -> None:
    """Set requests and limits. The memory limit is always set: without one the namespace's default would apply."""
    task.set_cpu_request(pod.cpu)
    task.set_memory_request(_memory(pod.memory))
    if pod.cpu_limit is not None:
        task.set_cpu_limit(pod.cpu_limit)
    task.set_memory_limit(_memory(pod.memory_limit))


def _memory(quantity: str) -> str:
    """Convert a quantity for KFP, which accepts neither fractions nor the unit k."""
    return bytes_quantity(quantity_bytes(quantity))


def _store(kubernetes: Any, task: dsl.PipelineTask, cluster: ClusterConfig, role: Role) -> None:
    """Set the object store's variables from a Kubernetes secret or a config map; the pipeline contains no keys."""
    keys = cluster.identity == "keys"
    # Imported here: it imports the store client, which the local runner does not need.
    from esvit_core.storage.address import pod_variables
    from esvit_core.storage.web_identity import TOKEN_FILE

    required, optional = pod_variables(keys)
    use, name = kubernetes.use_secret_as_env, cluster.secret_of(role)
    if not keys:
        use, name = kubernetes.use_config_map_as_env, cluster.store_config_map
        if cluster.token_audience:
            task.set_env_variable(TOKEN_FILE, ACCOUNT_TOKEN)
    use(task, name, {key: key for key in required})
    # Optional variables have defaults.
    use(task, name, {key: key for key in optional}, optional=True)
