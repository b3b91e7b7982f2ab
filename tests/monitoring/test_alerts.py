"""The alert rules: the manifests are current, Prometheus accepts them, and they fire when they should."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest

from esvit_core.monitoring.alerts import Durations, alert_rules, rule_file
from esvit_core.monitoring.metrics import TrainingMetrics

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "manifests" / "monitoring"


def rules(durations: Durations | None = None) -> list[dict[str, Any]]:
    return alert_rules(durations)["groups"][0]["rules"]


def promtool(programs: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [programs / "promtool", *map(str, arguments)], cwd=MANIFESTS, capture_output=True, text=True, timeout=120
    )


def test_the_rules_in_the_manifests_are_those_made_here() -> None:
    assert yaml.safe_load((MANIFESTS / "alerts.yaml").read_text()) == alert_rules(), (
        "run `python -m esvit_core.monitoring.alerts > manifests/monitoring/alerts.yaml`"
    )


def test_prometheus_takes_the_configuration_and_the_rules(prometheus_programs: Path) -> None:
    done = promtool(prometheus_programs, "check", "config", "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(rules())} rules found" in done.stdout


def test_every_alert_fires_when_it_should_and_no_other_does(prometheus_programs: Path) -> None:
    done = promtool(prometheus_programs, "test", "rules", "alerts.test.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    tested = set(re.findall(r'alertname="(\w+)"', (MANIFESTS / "alerts.test.yaml").read_text()))
    assert tested == {rule["alert"] for rule in rules()}


def test_the_unit_tests_can_fail(prometheus_programs: Path, tmp_path: Path) -> None:
    """Each alert that never fires is missed by them."""
    text = (MANIFESTS / "alerts.test.yaml").read_text()
    lame = alert_rules()
    for rule in lame["groups"][0]["rules"]:
        rule["expr"] = f"({rule['expr']}) and on () vector(0) > 1"
    (tmp_path / "alerts.yaml").write_text(rule_file(lame))
    (tmp_path / "alerts.test.yaml").write_text(text)
    done = promtool(prometheus_programs, "test", "rules", tmp_path / "alerts.test.yaml")
    assert done.returncode != 0
    missed = set(re.findall(r'alertname="(\w+)"', done.stdout + done.stderr))
    assert missed == {rule["alert"] for rule in rules()}


def test_alerts_use_exported_metrics() -> None:
    metrics = TrainingMetrics("run-a", "demo", 1, 1)
    exported = set(re.findall(r"^# TYPE (esvit_\w+)", generate_latest(metrics.registry).decode(), re.MULTILINE))
    for rule in rules():
        used = {re.sub("_(sum|count|bucket)$", "", name) for name in re.findall(r"\b[A-Za-z]+_\w+_\w+", rule["expr"])}
        store = {name for name in used if name.startswith("SeaweedFS_")}  # tried in tests/manifests/test_store_roles.py
        functions = {"max_over_time", "min_over_time", "last_over_time"}
        assert used and used - store - functions <= exported, rule["alert"]


def test_alerts_hold_for_every_way_to_train() -> None:
    """A step's own pod and the pods of a job are scraped under other names of the job."""
    assert not [rule["alert"] for rule in rules() if re.search(r"\b(job|instance|pod|container)\b", rule["expr"])]


def test_shorter_durations_change_nothing_else() -> None:
    def without_times(rule: dict[str, Any]) -> str:
        return re.sub(r"\b\d+(ms|s|m|h)\b|> [\d.]+ unless", "", f"{rule['expr']} {rule['labels']} {'for' in rule}")

    short = rules(Durations().scaled(1 / 100))
    assert [without_times(rule) for rule in short] == [without_times(rule) for rule in rules()]
    assert "[6s]" in short[0]["expr"] and "[10m]" in rules()[0]["expr"]


@pytest.mark.parametrize("name", sorted({rule["alert"] for rule in rules()}))
def test_every_alert_is_documented(name: str) -> None:
    text = (ROOT / "docs" / "operate.md").read_text(encoding="utf-8")
    section = re.search(rf"^### {name}\n(.+?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    assert section and len(section.group(1)) > 150
