"""Prometheus finds the trainings, and each alert fires when its cause is there."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cluster_settings import Settings
from evidence import Saw
from kube import KUBECTL, Kube, wait_for
from PIL import Image
from runs import TRAIN_STEP, Cli, Runs

from conftest import ENDLESS, start_training, upload
from esvit_core.monitoring.alerts import Durations, alert_rules, prometheus_rule
from esvit_core.storage import ObjectStore

# Ten minutes become twenty seconds, so that a cause is felt within a minute. Their rates need a scrape every second.
FACTOR = 1 / 30
#: The pauses between the attempts of a step double, so that its third restart is some four minutes after the first.
LONGER = {"EsvitTrainRestarting": 1 / 6}
MONITORS = (
    ("podmonitor", "esvit-step", "podMetricsEndpoints"),
    ("podmonitor", "esvit-trainer", "podMetricsEndpoints"),
    ("servicemonitor", "esvit-object-store", "endpoints"),
)


class Prometheus:
    """The server's API."""

    def __init__(self, address: str) -> None:
        self.address = address

    def ask(self, path: str, **arguments: str) -> Any:
        query = urllib.parse.urlencode(arguments)
        with urllib.request.urlopen(f"{self.address}/api/v1/{path}?{query}", timeout=20) as answer:
            return json.load(answer)["data"]

    def firing(self, **labels: str) -> dict[str, str]:
        """Summary of each alert that fires with labels that begin so, by the alert's name and, if any, its sign."""
        return {
            "/".join(filter(None, (a["labels"]["alertname"], a["labels"].get("sign")))): a["annotations"]["summary"]
            for a in self.ask("alerts")["alerts"]
            if a["state"] == "firing" and all(a["labels"].get(k, "").startswith(v) for k, v in labels.items())
        }

    def targets(self) -> dict[str, str]:
        """Health of each target by its pod, or by its address."""
        return {t["labels"].get("pod", t["scrapeUrl"]): t["health"] for t in self._targets()}

    def intervals(self, namespace: str) -> set[str]:
        """Intervals at which the pods of this project are scraped in a namespace."""
        return {t["scrapeInterval"] for t in self._targets() if f"/{namespace}/esvit-" in t["scrapePool"]}

    def _targets(self) -> list[dict[str, Any]]:
        return list(self.ask("targets", state="active")["activeTargets"])


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
    short = prometheus_rule(short_rules())
    short["metadata"] |= {"name": "esvit-short", "labels": labels}
    short["spec"]["groups"][0] |= {"name": "esvit-short", "interval": "1s"}
    kube.apply(short)
    prometheus = Prometheus(settings.prometheus)
    with scraped_every_second(kube):
        wait_for("a scrape every second", lambda: prometheus.intervals(kube.namespace) == {"1s"}, 180)
        yield prometheus
    kube.run("delete", "prometheusrule", "esvit-short", "--ignore-not-found")


def short_rules() -> dict[str, Any]:
    """The rules with durations that are a part of the real ones."""
    rules = alert_rules(Durations().scaled(FACTOR))
    for name, factor in LONGER.items():
        (longer,) = (
            r for g in alert_rules(Durations().scaled(factor))["groups"] for r in g["rules"] if r["alert"] == name
        )
        for group in rules["groups"]:
            group["rules"] = [longer if rule["alert"] == name else rule for rule in group["rules"]]
    return rules


@contextlib.contextmanager
def scraped_every_second(kube: Kube) -> Iterator[None]:
    """Let Prometheus scrape the pods of this project every second, and at the end as often as before."""
    before: list[tuple[str, str, dict[str, Any]]] = []
    try:
        for kind, name, field in MONITORS:
            found = kube.get(kind, name)
            assert found is not None, f"the {kind} {name} is missing: apply manifests/monitoring"
            endpoints = found["spec"][field]
            before.append((kind, name, {field: endpoints}))
            often = [{**endpoint, "interval": "1s", "scrapeTimeout": "1s"} for endpoint in endpoints]
            kube.run("patch", kind, name, "--type=merge", "-p", json.dumps({"spec": {field: often}}))
        yield
    finally:
        for kind, name, spec in before:
            kube.run("patch", kind, name, "--type=merge", "-p", json.dumps({"spec": spec}))


def in_pod(kube: Kube, pod: dict, signal: str, module: str = "esvit_core.training", *, children: bool = False) -> None:
    """Send a signal to the training processes of a pod, or to their children, which load the data."""
    code = f"""
import psutil, signal
for process in psutil.process_iter():
    line = process.cmdline()
    if "-m" in line and line[line.index("-m") + 1 :][:1] == [{module!r}]:
        for one in {"process.children()" if children else "[process]"}:
            one.send_signal(signal.{signal})
"""
    kube.run("exec", pod["metadata"]["name"], "-c", "main", "--", "python", "-c", code)


@contextlib.contextmanager
def slowed(kube: Kube, pod: dict) -> Iterator[None]:
    """Stop the training for most of each second, from within its pod: it still answers most scrapes."""
    code = """
import psutil, time
found = [p for p in psutil.process_iter() if "-m" in p.cmdline() and "esvit_core.training" in p.cmdline()]
try:
    for _ in range(200):
        [p.suspend() for p in found]
        time.sleep(0.8)
        [p.resume() for p in found]
        time.sleep(0.2)
finally:
    [p.resume() for p in found]
"""
    command = [KUBECTL, "-n", kube.namespace, "exec", pod["metadata"]["name"], "-c", "main", "--", "python", "-c", code]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()  # the program in the pod goes on
        process.wait()
        end = (
            "import os, psutil;"
            "[p.kill() for p in psutil.process_iter() if 'p.suspend()' in str(p.cmdline()) and p.pid != os.getpid()]"
        )
        kube.run("exec", pod["metadata"]["name"], "-c", "main", "--", "python", "-c", end)
        in_pod(kube, pod, "SIGCONT")


def resumed(kube: Kube, pod: dict) -> int:
    """How often the training in a pod has resumed."""
    return kube.logs(pod["metadata"]["name"]).count("resuming from step")


def fires(prometheus: Prometheus, name: str, saw: Saw, seconds: float = 180, **labels: str) -> str:
    """Wait until an alert fires with labels that begin so."""
    began = time.monotonic()
    summary = wait_for(f"{name} to fire", lambda: prometheus.firing(**labels).get(name), seconds)
    saw(f"{name} fires after {time.monotonic() - began:.0f} s: {summary}")
    return summary


def test_targets(prometheus: Prometheus, endless: str, runs: Runs, saw: Saw) -> None:
    """A training in a step's own pod and the store are targets, and they are up."""
    name = runs.pod(endless, TRAIN_STEP)["metadata"]["name"]
    wait_for(f"target {name} to be up", lambda: prometheus.targets().get(name) == "up" or None, 120)
    stores = {pod: health for pod, health in prometheus.targets().items() if "esvit-object-store" in pod}
    saw(f"up: {name}; the store: {stores}")
    assert "up" in stores.values()


def test_alerts_of_one_training(
    prometheus: Prometheus, endless: str, kube: Kube, runs: Runs, stamp: str, saw: Saw
) -> None:
    """Slow, stalled, restarting, store errors, checkpoint too old, gone: one training is disturbed in turn."""
    pod, run = runs.pod(endless, TRAIN_STEP), f"disturbed-{stamp}"
    time.sleep(40)  # a past to compare with, which the longer disturbances after this one would raise
    with slowed(kube, pod):
        fires(prometheus, "EsvitTrainSlow", saw, run=run)
    in_pod(kube, pod, "SIGSTOP", children=True)
    fires(prometheus, "EsvitTrainStalled", saw, run=run)
    in_pod(kube, pod, "SIGCONT", children=True)
    kube.run("scale", "statefulset/esvit-object-store", "--replicas=0")
    try:
        fires(prometheus, "EsvitStoreErrors", saw, run=run)
        fires(prometheus, "EsvitCheckpointTooOld", saw, 240, run=run)
    finally:
        kube.run("scale", "statefulset/esvit-object-store", "--replicas=1")
        kube.run("rollout", "status", "statefulset/esvit-object-store", "--timeout=180s", seconds=200)
    for _ in range(3):
        before = resumed(kube, pod)
        in_pod(kube, pod, "SIGKILL", module="esvit_core.launch.agent")
        while resumed(kube, pod) == before:
            time.sleep(3)
    fires(prometheus, "EsvitTrainRestarting", saw, run=run)
    runs.terminate(endless)
    fires(prometheus, "EsvitTrainGone", saw, run=run)


MAX_VOLUME_GIB = 64


def run_of(alert: str) -> str:
    """What the names of an alert's runs begin with."""
    return alert.lower().replace("/", "-")


def large_images() -> Iterator[tuple[str, bytes]]:
    """Images whose decoding takes longer than a step of the tests' network."""
    for number in range(16):
        pixels = np.random.default_rng(number).integers(0, 256, (3000, 3000, 3), np.uint8)
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "JPEG", quality=50)
        yield f"{number}.jpg", content.getvalue()


#: Settings that bring about what an alert is about.
CAUSES = {
    "EsvitLossNotFinite": ("optimizer.lr=1e30", "training.on_nonfinite=skip", "training.nonfinite_limit=1000000"),
    "EsvitTeacherCollapse/uniform": (
        "objective.teacher_temp=10000", "objective.warmup_teacher_temp=10000", "training.collapse_patience=1000000",
    ),
    "EsvitTrainDataStarved": (),  # its images are large
}  # fmt: skip


@pytest.fixture(scope="module")
def causes(cli: Cli, runs: Runs, store: ObjectStore, unlabelled: str, stamp: str) -> Iterator[None]:
    """A training for each cause, beside each other."""
    large = upload(store, f"test/{stamp}/large", large_images(), labelled=False)
    started = [
        start_training(
            cli, large if name == "EsvitTrainDataStarved" else unlabelled, stamp, run_of(name), *changes, epochs=ENDLESS
        )
        for name, changes in CAUSES.items()
    ]
    yield
    runs.terminate(*started)


@pytest.mark.parametrize("name", CAUSES)
def test_alert_and_its_cause(name: str, prometheus: Prometheus, causes: None, stamp: str, saw: Saw) -> None:
    """An alert fires when its cause is there."""
    fires(prometheus, name, saw, 600, run=f"{run_of(name)}-{stamp}")


def test_store_fills_up(prometheus: Prometheus, kube: Kube, saw: Saw) -> None:
    """The store's volume fills up, first slowly and then nearly to its end."""

    def in_store(command: str) -> str:
        return kube.run("exec", "esvit-object-store-0", "--", "sh", "-c", command)

    # The server rejects writes when less than 5 GiB are free; here 1 GiB more stays free.
    total, available = (int(word) << 10 for word in in_store("df -Pk /data").split("\n")[1].split()[1:4:2])
    if total > MAX_VOLUME_GIB << 30:
        pytest.skip(f"the store's volume has {total >> 30} GiB; only one of at most {MAX_VOLUME_GIB} GiB is filled")
    address = kube.get("pod", "esvit-object-store-0")["status"]["podIP"] + ":"
    assert "EsvitStoreLowSpace" not in prometheus.firing(instance=address)
    try:
        end = time.monotonic() + 400
        while "EsvitStoreFillingUp" not in prometheus.firing(instance=address) and time.monotonic() < end:
            in_store("fallocate -o $(stat -c %s /data/filler 2> /dev/null || echo 0) -l 16777216 /data/filler")
            time.sleep(5)
        fires(prometheus, "EsvitStoreFillingUp", saw, 5, instance=address)
        in_store(f"fallocate -l {available - (6 << 30)} /data/filler")
        summary = fires(prometheus, "EsvitStoreLowSpace", saw, instance=address)
        assert abs(float(re.search(r"([-\d.]+)%", summary)[1]) - 100 * 2**30 / total) < 1
    finally:
        in_store("rm -f /data/filler")
    wait_for("EsvitStoreLowSpace to end", lambda: "EsvitStoreLowSpace" not in prometheus.firing(instance=address), 120)


def test_every_alert_is_tried(saw: Saw) -> None:
    """No alert is left out of these tests."""
    text = Path(__file__).read_text(encoding="utf-8")
    names = {rule["alert"] for group in alert_rules()["groups"] for rule in group["rules"]}
    missing = sorted(name for name in names if name not in text)
    saw(f"{len(names)} alerts, not tried: {', '.join(missing) or 'none'}")
    assert not missing
