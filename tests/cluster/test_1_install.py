"""The overlay is installed, and what it makes stands."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_settings import Settings
from evidence import Evidence, Saw
from kube import KUBECTL, Kube, wait_for
from overlays import copy_of_manifests, make_keys, overlay
from runs import Cli


@pytest.fixture(scope="session")
def tested(settings: Settings, kube: Kube, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The overlay for this cluster."""
    manifests = copy_of_manifests(tmp_path_factory.mktemp("install"))
    return overlay(kube, manifests, f"overlays/{settings.overlay.name}", image=settings.image)


def test_versions(settings: Settings, kube: Kube, evidence: Evidence, saw: Saw) -> None:
    """The versions of the cluster and of Kubeflow Pipelines are known."""
    import kfp

    server = yaml.safe_load(kube.run("version", "-o", "yaml"))["serverVersion"]["gitVersion"]
    with urllib.request.urlopen(f"{settings.kfp}/apis/v2beta1/healthz", timeout=20) as answer:
        health = json.load(answer)
    nodes = kube.list("nodes")
    evidence.fact("Kubernetes", server)
    evidence.fact("Kubeflow Pipelines", health.get("tag_name", "without a tag"))
    evidence.fact("kfp", kfp.__version__)
    evidence.fact("nodes", str(len(nodes)))
    saw(f"Kubernetes {server}, Kubeflow Pipelines {health}, SDK {kfp.__version__}, {len(nodes)} nodes")
    assert server.startswith("v1.")


def test_keys(kube: Kube, cli: Cli, saw: Saw) -> None:
    """The keys of the store are made unless they are there, with the rights of this version."""
    saw("keys were made" if make_keys(kube, cli) else "the keys were there")
    secrets = [s["metadata"]["name"] for s in kube.list("secrets") if s["metadata"]["name"].startswith("esvit-")]
    saw(f"secrets: {', '.join(sorted(secrets))}")
    assert {"esvit-object-store-prepare", "esvit-object-store-train", "esvit-object-store-server"} <= set(secrets)


def test_overlay(kube: Kube, tested: Path, saw: Saw) -> None:
    """The overlay applies, its store answers, and its bucket is made."""
    kube.run("delete", "job", "esvit-bucket", "--ignore-not-found")
    applied = kube.run("apply", "-k", str(tested)).splitlines()
    saw(f"kubectl apply -k manifests/overlays/...: {len(applied)} objects")
    kube.run("rollout", "status", "statefulset/esvit-object-store", "--timeout=300s", seconds=330)
    kube.run("wait", "--for=condition=complete", "--timeout=300s", "job/esvit-bucket", seconds=330)
    again = kube.run("apply", "-k", str(tested)).splitlines()
    changed = [line for line in again if not line.endswith("unchanged")]
    saw(f"applied again: {len(again) - len(changed)} unchanged, changed: {', '.join(changed) or 'none'}")


def test_rights(kube: Kube, settings: Settings, saw: Saw) -> None:
    """The steps' account may do what the table of rights says, and nothing else of what was tried."""

    def may(verb: str, resource: str) -> bool:
        account = f"system:serviceaccount:{settings.namespace}:esvit-pipeline"
        done = subprocess.run(
            [KUBECTL, "-n", settings.namespace, "auth", "can-i", verb, resource, "--as", account],
            capture_output=True,
            text=True,
        )
        return done.stdout.strip() == "yes"

    allowed = [("create", "workflowtaskresults.argoproj.io"), ("get", "configmaps/kfp-launcher")]
    if kube.has("jobs.batch.volcano.sh"):
        allowed += [("create", "jobs.batch.volcano.sh"), ("delete", "jobs.batch.volcano.sh"), ("get", "pods/log")]
    forbidden = [
        ("get", "secrets"),
        ("create", "pods"),
        ("delete", "pods"),
        ("list", "secrets"),
        ("create", "pods/exec"),
    ]
    for verb, resource in allowed:
        assert may(verb, resource), f"{verb} {resource} is refused"
    for verb, resource in forbidden:
        assert not may(verb, resource), f"{verb} {resource} is allowed"
    saw(f"allowed: {allowed}")
    saw(f"forbidden: {forbidden}")


def test_restricted_pods(kube: Kube, saw: Saw) -> None:
    """Every pod of the manifests keeps the Pod Security Standard "restricted"."""
    mine = [p for p in kube.list("pods") if p["metadata"]["labels"].get("app.kubernetes.io/part-of") == "esvit"]
    store = kube.list("pods", "app.kubernetes.io/name=esvit-object-store")
    assert store, "the store has no pod"
    restricted = Kube("esvit-restricted")
    restricted.apply(_restricted_namespace())
    wait_for("the account of the namespace", lambda: restricted.get("serviceaccount", "default"), 30)
    for pod in [*mine, *store]:
        manifest = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": f"tried-{pod['metadata']['name']}"[:60], "namespace": "esvit-restricted"},
            "spec": {
                key: pod["spec"][key] for key in ("containers", "securityContext", "volumes") if key in pod["spec"]
            },
        }
        restricted.run("create", "--dry-run=server", "-f", "-", text=yaml.safe_dump(manifest))
        saw(f"{pod['metadata']['name']}: admitted where restricted is enforced")


def _restricted_namespace() -> dict[str, Any]:
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "esvit-restricted", "labels": labels}}
