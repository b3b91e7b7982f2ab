"""Settings of `make test-cluster`, from environment variables.

``KUBECONFIG`` names the cluster; everything else has a default that fits Kubeflow Pipelines by itself on kind. A
capability whose variable is missing is reported as "not run" with the variable that enables it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SWITCH = "ESVIT_TEST_CLUSTER"  # set by `make test-cluster`


def _text(name: str, default: str = "") -> str:
    return os.environ.get(f"ESVIT_TEST_{name}", default)


@dataclass(frozen=True)
class Settings:
    """Addresses, names, and the commands that only the owner of the cluster knows.

    Attributes:
        kfp: address of Kubeflow Pipelines' API.
        ui: address of its user interface.
        namespace: where the runs are.
        overlay: the overlay that is installed.
        image: image of the steps; on the nodes already, or in a registry that they reach.
        prometheus: address of a Prometheus that scrapes the namespace.
        model_registry: address of a Kubeflow Model Registry that pods reach too.
        multiuser: address of a Kubeflow Pipelines in multi-user mode, behind what says who asks.
        profile: namespace there that is a profile of the one who asks.
        stop_kubelet, start_kubelet: commands, ``{node}`` stands for the node.
        restart_api: command that restarts the Kubernetes API server.
        chromium: browser to use instead of Playwright's own.
        settings: more settings of every run, such as smaller requests.
        report: folder of the report.
    """

    kfp: str = field(default_factory=lambda: _text("KFP", "http://localhost:8888"))
    ui: str = field(default_factory=lambda: _text("UI"))
    namespace: str = field(default_factory=lambda: _text("NAMESPACE", "kubeflow"))
    overlay: Path = field(default_factory=lambda: ROOT / _text("OVERLAY", "manifests/overlays/kind"))
    image: str = field(default_factory=lambda: _text("IMAGE", "esvit/trainer:0.1.0"))
    prometheus: str = field(default_factory=lambda: _text("PROMETHEUS"))
    model_registry: str = field(default_factory=lambda: _text("MODEL_REGISTRY"))
    multiuser: str = field(default_factory=lambda: _text("MULTIUSER"))
    profile: str = field(default_factory=lambda: _text("PROFILE"))
    stop_kubelet: str = field(default_factory=lambda: _text("STOP_KUBELET"))
    start_kubelet: str = field(default_factory=lambda: _text("START_KUBELET"))
    restart_api: str = field(default_factory=lambda: _text("RESTART_API"))
    chromium: str = field(default_factory=lambda: _text("CHROMIUM"))
    settings: tuple[str, ...] = field(default_factory=lambda: tuple(_text("SET").split()))
    report: Path = field(default_factory=lambda: ROOT / _text("REPORT", "cluster-report"))
