"""Who may talk to whom, worked out from the rendered policies as Kubernetes defines them."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

Object = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    """A pod with its namespace and labels; or, with an address, something outside the cluster."""

    namespace: str
    labels: Mapping[str, str] = field(default_factory=dict)
    address: str = ""


def ours(namespace: str, component: str, **labels: str) -> Pod:
    return Pod(
        namespace, {"app.kubernetes.io/name": "esvit", "app.kubernetes.io/component": component, **dict(labels.items())}
    )


class Cluster:
    """Policies, by the namespace that they are in."""

    def __init__(self, objects: list[Object]) -> None:
        self.policies = [thing for thing in objects if thing["kind"] == "NetworkPolicy"]
        (self.namespace,) = {policy["metadata"]["namespace"] for policy in self.policies}
        self.step = Pod(
            self.namespace,
            {
                "app.kubernetes.io/name": "esvit",
                "app.kubernetes.io/component": "step",
                "workflows.argoproj.io/workflow": "esvit-pretrain-x",
            },
        )
        self.trainer, self.prune = ours(self.namespace, "trainer"), ours(self.namespace, "prune")
        self.store = Pod(self.namespace, {"app.kubernetes.io/name": "esvit-object-store"})
        self.stranger = Pod("default", {"app.kubernetes.io/name": "esvit"})
        self.prometheus = Pod("monitoring", {"app.kubernetes.io/name": "prometheus"})
        self.dns = Pod("kube-system", {"k8s-app": "kube-dns"})
        self.metadata = Pod("kubeflow", {"app": "metadata-grpc-server", "component": "metadata-grpc-server"})
        self.pipelines = Pod("kubeflow", {"app": "ml-pipeline"})

    def reach(self, source: Pod, target: Pod, port: int, protocol: str = "TCP") -> bool:
        """Whether a connection is possible: the one may go out, the other lets in."""
        return self._allowed("Egress", source, target, port, protocol) and self._allowed(
            "Ingress", target, source, port, protocol
        )

    def _allowed(self, direction: str, subject: Pod, other: Pod, port: int, protocol: str) -> bool:
        about = [
            p["spec"] for p in self.policies if self._is_about(p, subject) and direction in p["spec"]["policyTypes"]
        ]
        if not about:
            return True
        peers = {"Egress": "to", "Ingress": "from"}[direction]
        return any(
            self._is_peer(rule.get(peers), other) and _is_port(rule.get("ports"), port, protocol)
            for spec in about
            for rule in spec.get(direction.lower(), [])
        )

    def _is_about(self, policy: Object, pod: Pod) -> bool:
        return (
            pod.namespace == self.namespace and not pod.address and _selects(policy["spec"]["podSelector"], pod.labels)
        )

    def _is_peer(self, peers: list[Object] | None, pod: Pod) -> bool:
        if peers is None:
            return True
        return any(self._is_one(peer, pod) for peer in peers)

    def _is_one(self, peer: Object, pod: Pod) -> bool:
        if "ipBlock" in peer:
            block = ipaddress.ip_network(peer["ipBlock"]["cidr"])
            return bool(pod.address) and ipaddress.ip_address(pod.address) in block
        if pod.address or not _selects(peer.get("podSelector", {}), pod.labels):
            return False
        if "namespaceSelector" not in peer:
            return pod.namespace == self.namespace
        return _selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": pod.namespace})


def _selects(selector: Object, labels: Mapping[str, str]) -> bool:
    tests = {
        "Exists": lambda e: e["key"] in labels,
        "In": lambda e: labels.get(e["key"]) in e["values"],
    }
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        tests[expression["operator"]](expression) for expression in selector.get("matchExpressions", [])
    )


def _is_port(ports: list[Object] | None, port: int, protocol: str) -> bool:
    return ports is None or any(p["port"] == port and p["protocol"] == protocol for p in ports)


@pytest.fixture
def cluster(objects: list[Object]) -> Cluster:
    return Cluster(objects)


def api(cluster: Cluster) -> tuple[list[Pod], int]:
    """The servers of the Kubernetes API, and their port."""
    (policy,) = [p for p in cluster.policies if p["metadata"]["name"] == "esvit-kubernetes-api"]
    (rule,) = policy["spec"]["egress"]
    networks = [ipaddress.ip_network(peer["ipBlock"]["cidr"]) for peer in rule["to"]]
    return [Pod("", address=str(network[0])) for network in networks], rule["ports"][0]["port"]


def test_pods_of_a_training_reach_each_other_on_every_port(cluster: Cluster) -> None:
    for port in (29400, 29500, 41234):
        assert cluster.reach(cluster.trainer, cluster.trainer, port)
        assert not cluster.reach(cluster.stranger, cluster.trainer, port)
        assert not cluster.reach(cluster.prune, cluster.trainer, port)


def test_only_ours_reach_the_store_and_only_at_s3(rendered: dict[str, list[Object]]) -> None:
    for overlay in ("kind", "onprem"):
        cluster = Cluster(rendered[overlay])
        for pod in (cluster.step, cluster.trainer, cluster.prune):
            assert cluster.reach(pod, cluster.store, 8333)
            for port in (18333, 8888, 18888, 9333, 19333, 8080, 18080, 9327):
                assert not cluster.reach(pod, cluster.store, port), port
        assert not cluster.reach(cluster.stranger, cluster.store, 8333)
        assert not cluster.reach(Pod(cluster.namespace, {"app": "notebook"}), cluster.store, 8333)
        assert not cluster.reach(cluster.store, cluster.trainer, 29500)
        assert not cluster.reach(cluster.store, Pod("", address="203.0.113.1"), 443)


def test_prometheus_sees_the_figures_and_nothing_else_does(cluster: Cluster) -> None:
    for pod in (cluster.trainer, cluster.step):
        assert cluster.reach(cluster.prometheus, pod, 9400)
        assert not cluster.reach(cluster.prometheus, pod, 22)
        assert not cluster.reach(cluster.stranger, pod, 9400)
    if any(p["metadata"]["name"] == "esvit-object-store" for p in cluster.policies):
        assert cluster.reach(cluster.prometheus, cluster.store, 9327)
        assert not cluster.reach(cluster.prometheus, cluster.store, 8333)


def test_steps_reach_kubeflow_and_the_kubernetes_api_and_trainers_do_not(cluster: Cluster) -> None:
    servers, port = api(cluster)
    assert cluster.reach(cluster.step, cluster.metadata, 8080)
    assert cluster.reach(cluster.step, cluster.pipelines, 8887)
    assert all(cluster.reach(cluster.step, server, port) for server in servers)
    for pod in (cluster.trainer, cluster.prune):
        assert not any(cluster.reach(pod, server, port) for server in servers)
        assert not cluster.reach(pod, cluster.metadata, 8080)


def test_all_of_ours_resolve_names_and_none_reaches_the_internet(cluster: Cluster) -> None:
    for pod in (cluster.step, cluster.trainer, cluster.prune):
        for resolver in (cluster.dns, Pod("", address="169.254.20.10")):  # the latter: NodeLocal DNSCache
            assert cluster.reach(pod, resolver, 53, "UDP") and cluster.reach(pod, resolver, 53)
            assert not cluster.reach(pod, resolver, 80)
        assert not cluster.reach(pod, Pod("", address="169.254.169.254"), 80)  # a cloud's metadata, with its keys
        for port in (80, 443, 8333):
            assert not cluster.reach(pod, Pod("", address="203.0.113.1"), port)


def test_a_profile_denies_every_pod_what_is_not_allowed(rendered: dict[str, list[Object]]) -> None:
    for overlay in ("onprem", "cloud"):
        cluster = Cluster(rendered[overlay])
        anything = Pod(cluster.namespace, {"app": "something"})
        assert not cluster.reach(anything, cluster.trainer, 29500)
        assert not cluster.reach(anything, Pod("", address="203.0.113.1"), 443)
        artifact = Pod(cluster.namespace, {"app": "ml-pipeline-ui-artifact"})
        assert cluster.reach(Pod("kubeflow", {"app": "ml-pipeline-ui"}), artifact, 3000)


def test_policies_leave_the_other_pods_of_a_shared_namespace_alone(rendered: dict[str, list[Object]]) -> None:
    cluster = Cluster(rendered["kind"])
    other = Pod("kubeflow", {"app": "ml-pipeline", "workflows.argoproj.io/workflow": "of-somebody-else"})
    assert cluster.reach(other, Pod("", address="203.0.113.1"), 443)
    assert cluster.reach(Pod("default"), other, 8888)


def test_no_address_block_is_the_whole_world(cluster: Cluster) -> None:
    for policy in cluster.policies:
        for rule in (*policy["spec"].get("egress", []), *policy["spec"].get("ingress", [])):
            for peer in (*rule.get("to", []), *rule.get("from", [])):
                if "ipBlock" in peer:
                    assert ipaddress.ip_network(peer["ipBlock"]["cidr"]).prefixlen >= 12


def test_every_server_of_a_highly_available_api_is_named(rendered: dict[str, list[Object]]) -> None:
    for overlay in ("onprem", "cloud"):
        assert len(api(Cluster(rendered[overlay]))[0]) > 1
