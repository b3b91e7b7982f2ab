"""Check before a run is submitted whether the pods of a pipeline fit into the cluster.

The check asks the Kubernetes API of the user's kubeconfig, if there is one. That may be another cluster than Kubeflow's,
and an autoscaler may add larger nodes, so the results are warnings and nothing here raises.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from esvit_core.config import Config
from esvit_core.config.cluster_settings import PodConfig, Role
from esvit_core.config.kubernetes_names import quantity_bytes, quantity_cores
from esvit_core.planning.pod_sizes import resolve_pod

_SECONDS = (2, 5)  # to connect, to answer
Amounts = dict[str, float]


def pods_of(config: Config) -> dict[str, PodConfig]:
    """Return the pods of a run with resolved sizes, by their name in messages.

    Raises:
        UserError: the recipe's architecture does not exist.
    """
    pods = {f"cluster.{role}": resolve_pod(config, role) for role in get_args(Role)}
    if config.launch.scheduler != "local":
        pods["the step that starts the job"] = config.cluster.launcher_pod()
    return pods


def size_lines(config: Config) -> list[str]:
    """Return a line per kind of pod with its requests and limits."""
    return [
        f"  {name.removeprefix('cluster.'):10} cpu {pod.cpu} to {pod.cpu_limit or 'any'}, "
        f"memory {pod.memory} to {pod.memory_limit}, disk {pod.scratch}"
        + (f", {pod.accelerators} {pod.accelerator}" if pod.accelerators else "")
        for name, pod in pods_of(config).items()
    ]


def capacity_problems(config: Config, namespace: str) -> list[str]:
    """Return a line for each pod that does not fit; none if the Kubernetes API cannot be asked."""
    problems: list[str] = []
    with contextlib.suppress(Exception):  # without kubeconfig, permissions or an answer, nothing is known
        api, cluster = _api()
        pods = pods_of(config)
        for check in (_check_nodes, _check_limit_ranges, _check_quotas):
            with contextlib.suppress(Exception):
                problems += [f"{line} (cluster {cluster})" for line in check(api, namespace, pods)]
    return problems


def _api() -> tuple[Any, str]:
    from kubernetes import client, config

    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it warns of every attempt
    # The library reads the variable only when it is imported.
    settings, file = client.Configuration(), os.environ.get("KUBECONFIG") or None
    config.load_kube_config(file, client_configuration=settings)
    settings.retries = False
    _, active = config.list_kube_config_contexts(file)
    return client.CoreV1Api(client.ApiClient(settings)), active["context"]["cluster"]


def _requests(pod: PodConfig) -> Amounts:
    accelerators = {pod.accelerator: float(pod.accelerators)} if pod.accelerators else {}
    return {"cpu": quantity_cores(pod.cpu), "memory": float(quantity_bytes(pod.memory)), **accelerators}


def _limits_of(pod: PodConfig) -> Amounts:
    cpu = {} if pod.cpu_limit is None else {"cpu": quantity_cores(pod.cpu_limit)}
    return {**cpu, "memory": float(quantity_bytes(pod.memory_limit))}


def _check_nodes(api: Any, namespace: str, pods: Mapping[str, PodConfig]) -> Iterator[str]:
    nodes = [n for n in api.list_node(_request_timeout=_SECONDS).items if not n.spec.unschedulable]
    for name, pod in pods.items():
        chosen = [n for n in nodes if pod.node_selector.items() <= (n.metadata.labels or {}).items()]
        if not chosen:
            yield f"{name}: no node has the labels {pod.node_selector}"
            continue
        requests = _requests(pod)
        offers = [
            {resource: _amount(resource, n.status.allocatable.get(resource, "0")) for resource in requests}
            for n in chosen
        ]
        if not any(all(offer[resource] >= amount for resource, amount in requests.items()) for offer in offers):
            largest = {resource: max(offer[resource] for offer in offers) for resource in requests}
            yield f"{name}: one pod requests {_format(requests)}; the largest nodes have {_format(largest)}"


def _check_limit_ranges(api: Any, namespace: str, pods: Mapping[str, PodConfig]) -> Iterator[str]:
    for limits in api.list_namespaced_limit_range(namespace, _request_timeout=_SECONDS).items:
        for item in limits.spec.limits:
            if item.type in ("Container", "Pod") and item.max:
                yield from _over(pods, _limits_of, item.max, f"LimitRange {namespace}/{limits.metadata.name}")


def _check_quotas(api: Any, namespace: str, pods: Mapping[str, PodConfig]) -> Iterator[str]:
    for quota in api.list_namespaced_resource_quota(namespace, _request_timeout=_SECONDS).items:
        hard, name = quota.spec.hard or {}, f"ResourceQuota {namespace}/{quota.metadata.name}"
        for prefix, amounts in (("requests.", _requests), ("limits.", _limits_of)):
            bound = {
                resource.removeprefix(prefix): text for resource, text in hard.items() if resource.startswith(prefix)
            }
            yield from _over(pods, amounts, bound, name)


def _over(pods: Mapping[str, PodConfig], amounts: Any, bound: Mapping[str, str], source: str) -> Iterator[str]:
    for name, pod in pods.items():
        wanted = amounts(pod)
        over = {
            resource: wanted[resource]
            for resource, text in bound.items()
            if wanted.get(resource, 0) > _amount(resource, text)
        }
        if over:
            admitted = {resource: _amount(resource, bound[resource]) for resource in over}
            yield f"{name}: one pod needs {_format(over)}; {source} allows {_format(admitted)}"


def _amount(resource: str, text: str) -> float:
    if resource == "memory":
        return float(quantity_bytes(text))
    return float(text) if text == "0" else quantity_cores(text)


def _format(amounts: Amounts) -> str:
    def format_amount(resource: str, amount: float) -> str:
        return f"{amount / 2**30:.1f} GiB of memory" if resource == "memory" else f"{amount:g} {resource}"

    return ", ".join(format_amount(resource, amount) for resource, amount in amounts.items())
