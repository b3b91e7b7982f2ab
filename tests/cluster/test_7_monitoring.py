"""Prometheus finds the trainings, and each alert fires when its cause is there."""

from __future__ import annotations

import json
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_settings import Settings
from evidence import Saw
from kube import Kube, wait_for
from runs import TRAIN_STEP, Cli, Runs

from conftest import ENDLESS, start_training
from esvit_core.monitoring.alerts import Durations, alert_rules, prometheus_rule

# Ten minutes become twenty seconds, so that a cause is felt within a minute.
FACTOR = 1 / 30


class Prometheus:
    """The server's API."""

    def __init__(self, address: str) -> None:
        self.address = address

    def ask(self, path: str, **arguments: str) -> Any:
        query = urllib.parse.urlencode(arguments)
        with urllib.request.urlopen(f"{self.address}/api/v1/{path}?{query}", timeout=20) as answer:
            return json.load(answer)["data"]

    def firing(self) -> dict[str, str]:
        """Summary of each alert that fires, by its name and, where it has one, its sign."""
        return {
            "/".join(filter(None, (a["labels"]["alertname"], a["labels"].get("sign")))): a["annotations"]["summary"]
            for a in self.ask("alerts")["alerts"]
            if a["state"] == "firing"
        }

    def targets(self) -> dict[str, str]:
        """Health of each target by its pod, or by its address."""
        found = self.ask("targets", state="active")["activeTargets"]
        return {t["labels"].get("pod", t["scrapeUrl"]): t["health"] for t in found}


@pytest.fixture(scope="module")
def prometheus(settings: Settings, kube: Kube) -> Iterator[Prometheus]:
    """The cluster's Prometheus with the rules of this project, and the same rules with short durations beside them."""
    if not settings.prometheus:
        pytest.skip("ESVIT_TEST_PROMETHEUS is not set")
    if not kube.has("prometheusrules.monitoring.coreos.com"):
        pytest.skip("the Prometheus operator is not installed: the cluster has no prometheusrules")
    rules = kube.list("prometheusrules.monitoring.coreos.com")
    labels = next((rule["metadata"].get("labels", {}) for rule in rules if rule["metadata"]["name"] == "esvit"), None)
    assert labels is not None, "the PrometheusRule esvit is missing: apply manifests/monitoring"
    short = prometheus_rule(alert_rules(Durations().scaled(FACTOR)))
    short["metadata"] |= {"name": "esvit-short", "labels": labels}
    short["spec"]["groups"][0] |= {"name": "esvit-short", "interval": "1s"}
    kube.apply(short)
    yield Prometheus(settings.prometheus)
    kube.run("delete", "prometheusrule", "esvit-short", "--ignore-not-found")


def in_pod(kube: Kube, pod: dict, signal: str, module: str = "esvit_core.training") -> None:
    """Send a signal to the training processes of a pod."""
    code = (
        "import os, psutil, signal;"
        f"[p.send_signal(signal.{signal}) for p in psutil.process_iter()"
        f" if {module!r} in p.cmdline() and p.pid != os.getpid()]"
    )
    kube.run("exec", pod["metadata"]["name"], "-c", "main", "--", "python", "-c", code)


def resumed(kube: Kube, pod: dict) -> int:
    """How often the training in a pod has resumed."""
    return kube.logs(pod["metadata"]["name"]).count("resuming from step")


def fires(prometheus: Prometheus, name: str, saw: Saw, seconds: float = 180) -> None:
    """Wait until an alert fires."""
    began = time.monotonic()
    summary = wait_for(f"{name} to fire", lambda: prometheus.firing().get(name), seconds)
    saw(f"{name} fires after {time.monotonic() - began:.0f} s: {summary}")


def test_targets(prometheus: Prometheus, endless: str, runs: Runs, saw: Saw) -> None:
    """A training in a step's own pod and the store are targets, and they are up."""
    name = runs.pod(endless, TRAIN_STEP)["metadata"]["name"]
    wait_for(f"target {name} to be up", lambda: prometheus.targets().get(name) == "up" or None, 120)
    stores = {pod: health for pod, health in prometheus.targets().items() if "esvit-object-store" in pod}
    saw(f"up: {name}; the store: {stores}")
    assert "up" in stores.values()


def test_alerts_of_one_training(prometheus: Prometheus, endless: str, kube: Kube, runs: Runs, saw: Saw) -> None:
    """Stalled, slow, restarting, store errors, checkpoint too old, gone: one training is disturbed in turn."""
    pod = runs.pod(endless, TRAIN_STEP)
    in_pod(kube, pod, "SIGSTOP")
    fires(prometheus, "EsvitTrainStalled", saw)
    in_pod(kube, pod, "SIGCONT")
    time.sleep(40)  # a past to compare with
    end = time.monotonic() + 150
    while "EsvitTrainSlow" not in prometheus.firing() and time.monotonic() < end:
        in_pod(kube, pod, "SIGSTOP")
        time.sleep(2)
        in_pod(kube, pod, "SIGCONT")
    fires(prometheus, "EsvitTrainSlow", saw, 5)
    kube.run("scale", "statefulset/esvit-object-store", "--replicas=0")
    try:
        fires(prometheus, "EsvitStoreErrors", saw)
        fires(prometheus, "EsvitCheckpointTooOld", saw, 240)
    finally:
        kube.run("scale", "statefulset/esvit-object-store", "--replicas=1")
        kube.run("rollout", "status", "statefulset/esvit-object-store", "--timeout=180s", seconds=200)
    for _ in range(3):
        before = resumed(kube, pod)
        in_pod(kube, pod, "SIGKILL", module="esvit_core.launch.agent")
        while resumed(kube, pod) == before:
            time.sleep(3)
    fires(prometheus, "EsvitTrainRestarting", saw)
    runs.terminate(endless)
    fires(prometheus, "EsvitTrainGone", saw)


#: Settings that bring about what an alert is about.
CAUSES = {
    "EsvitLossNotFinite": ("optimizer.lr=1e30", "training.on_nonfinite=skip", "training.nonfinite_limit=1000000"),
    "EsvitTeacherCollapse/uniform": (
        "objective.teacher_temp=10000", "objective.warmup_teacher_temp=10000", "training.collapse_patience=1000000",
    ),
    "EsvitTrainDataStarved": ("model.depths=[1]", "model.num_heads=[2]", "augment.local_crops.number=0"),
}  # fmt: skip


@pytest.fixture(scope="module")
def causes(cli: Cli, runs: Runs, unlabelled: str, stamp: str) -> Iterator[None]:
    """A training for each cause, beside each other."""
    started = [
        start_training(cli, unlabelled, stamp, name.lower().replace("/", "-"), *changes, epochs=ENDLESS)
        for name, changes in CAUSES.items()
    ]
    yield
    runs.terminate(*started)


@pytest.mark.parametrize("name", CAUSES)
def test_alert_and_its_cause(name: str, prometheus: Prometheus, causes: None, saw: Saw) -> None:
    """An alert fires when its cause is there."""
    fires(prometheus, name, saw, 400)


def test_every_alert_is_tried(saw: Saw) -> None:
    """No alert is left out of these tests."""
    text = Path(__file__).read_text(encoding="utf-8")
    names = {rule["alert"] for group in alert_rules()["groups"] for rule in group["rules"]}
    missing = sorted(name for name in names if name not in text)
    saw(f"{len(names)} alerts, not tried: {', '.join(missing) or 'none'}")
    assert not missing
