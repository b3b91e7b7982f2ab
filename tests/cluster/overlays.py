"""Overlays for the cluster that is tested, made from the project's as the installation guide asks."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from cluster_settings import ROOT
from kube import Kube
from runs import Cli

SERVER_KEYS = "esvit-object-store-server"
SCHEDULERS = {"volcano": "jobs.batch.volcano.sh", "trainer": "trainjobs.trainer.kubeflow.org"}
RELEASE = "prometheus"  # the label of monitors and rules that the cluster's Prometheus selects


def copy_of_manifests(folder: Path) -> Path:
    """The manifests in a folder of their own, for overlays beside those of the project."""
    copy = folder / "manifests"
    if not copy.exists():
        shutil.copytree(ROOT / "manifests", copy)
    return copy


def overlay(
    kube: Kube,
    folder: Path,
    base: str,
    *,
    image: str,
    components: Sequence[str] = (),
    patches: Sequence[dict[str, Any]] = (),
) -> Path:
    """Write an overlay for the namespace of ``kube``.

    Args:
        kube: where it is to be installed.
        folder: of :func:`copy_of_manifests`.
        base: what it starts from, such as ``overlays/kind``.
        image: of the steps.
        components: of the project.
        patches: more of kustomize's patches.

    Returns:
        Its folder, for ``kubectl apply -k``.
    """
    schedulers = [name for name, kind in SCHEDULERS.items() if kube.has(kind)]
    monitored = kube.has("podmonitors.monitoring.coreos.com")
    name, _, tag = image.rpartition(":")
    release = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {"name": "each", "labels": {"release": RELEASE}},
    }
    mine = folder / "overlays" / f"tested-{kube.namespace}"
    mine.mkdir()
    values = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": kube.namespace,
        "resources": [f"../../{base}"],
        "components": [f"../../components/{one}" for one in (*components, *schedulers)]
        + (["../../monitoring"] if monitored else []),
        "images": [{"name": "esvit/trainer", "newName": name, "newTag": tag}],
        "patches": [
            {"target": {"kind": "NetworkPolicy", "name": "esvit-kubernetes-api"}, "patch": yaml.safe_dump(_to_api())},
            *([{"target": {"group": "monitoring.coreos.com"}, "patch": yaml.safe_dump(release)}] if monitored else []),
            *patches,
        ],
    }
    (mine / "kustomization.yaml").write_text(yaml.safe_dump(values))
    return mine


def make_keys(kube: Kube, cli: Cli) -> bool:
    """Make the keys of the namespace's store, unless they are there with the rights that this version gives them.

    Returns:
        Whether they were made.
    """
    made = cli.run("store", "keys", "--namespace", kube.namespace)
    assert made.returncode == 0, made.stderr
    secrets = {one["metadata"]["name"]: one for one in yaml.safe_load_all(made.stdout)}
    there = kube.get("secret", SERVER_KEYS)
    if there is not None and _rights(there) == _rights(secrets[SERVER_KEYS]):
        return False
    kube.run("apply", "-f", "-", text=made.stdout)
    if kube.get("statefulset", "esvit-object-store"):  # it reads its keys when it starts
        kube.run("rollout", "restart", "statefulset/esvit-object-store")
    return True


def _rights(secret: dict[str, Any]) -> dict[str, list[str]]:
    """What each key of the store's server may do, by the key's name."""
    plain = {name: base64.b64decode(value).decode() for name, value in secret.get("data", {}).items()}
    identities = json.loads((plain | secret.get("stringData", {}))["identities.json"])["identities"]
    return {one["name"]: one["actions"] for one in identities}


def _to_api() -> list[dict[str, Any]]:
    """A patch that opens the way to this cluster's API servers."""
    subsets = (Kube("default").get("endpoints", "kubernetes") or {})["subsets"]
    blocks = [{"ipBlock": {"cidr": f"{one['ip']}/32"}} for subset in subsets for one in subset["addresses"]]
    ports = [{"protocol": "TCP", "port": one["port"]} for subset in subsets for one in subset["ports"]]
    return [{"op": "replace", "path": "/spec/egress/0", "value": {"to": blocks, "ports": ports}}]
