"""The Grafana dashboard uses metrics that the run exports; a real Prometheus answers it in tests/training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from prometheus_client import generate_latest

from esvit_core.monitoring.metrics import TrainingMetrics

GRAFANA = Path(__file__).parents[2] / "manifests" / "monitoring" / "grafana"
DOCS = Path(__file__).parents[2] / "docs" / "monitoring.md"


def dashboard() -> dict[str, Any]:
    return json.loads((GRAFANA / "dashboards" / "esvit.json").read_text(encoding="utf-8"))


def exported() -> dict[str, set[str]]:
    """Names of the labels of every metric, by the metric's name as one asks for it."""
    metrics = TrainingMetrics("run-a", "demo", 1, 1, memory=lambda: {"used": 1.0})
    keys = [f"{figure}_{level}" for figure in metrics._levels for level in ("view", "region")]
    metrics.line(dict.fromkeys([*keys, "loss", "loss_view", "loss_region"], 1.0))
    metrics.warned("entropy_view")
    metrics.describe("cpu", "float32", "torch")
    found: dict[str, set[str]] = {}
    for name, labels in re.findall(r"^(\w+)(?:\{(.*)\})? ", generate_latest(metrics.registry).decode(), re.MULTILINE):
        found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    return found


def queries() -> list[str]:
    panels = dashboard()["panels"]
    assert len(panels) > 20
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def test_every_query_asks_for_metrics_and_labels_that_are_exported() -> None:
    metrics = exported()
    for query in queries():
        used = re.findall(r"\b((?:esvit|process)_\w+)(?:\{(.*?)\})?", query)
        assert used or "ALERTS" in query, query
        for name, selector in used:
            assert name in metrics, query
            assert set(re.findall(r"(\w+)=", selector)) <= metrics[name], query


def test_every_exported_metric_has_a_panel() -> None:
    shown = {name for query in queries() for name in re.findall(r"esvit_\w+", query)}
    base = {re.sub("_(bucket|sum|count)$", "", name) for name in shown}
    missing = {name for name in exported() if name.startswith("esvit_") and not name.endswith("_created")}
    assert not {name for name in missing if re.sub("_(bucket|sum|count)$", "", name) not in base}


def test_every_exported_metric_is_documented() -> None:
    text = DOCS.read_text(encoding="utf-8")
    names = {re.sub("_(bucket|sum|count)$", "", n) for n in exported() if n.startswith("esvit_")}
    assert not {name for name in names if not name.endswith("_created") and f"`{name}`" not in text}


def test_panels_lie_side_by_side() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(set(ids)) == len(ids)


def test_grafana_finds_the_dashboard_and_its_data() -> None:
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/esvit.yaml").read_text())["providers"]
    assert source["type"] == "prometheus" and source["isDefault"]
    assert provider["type"] == "file" and "ESVIT_DASHBOARDS" in provider["options"]["path"]
    variables = {variable["name"] for variable in dashboard()["templating"]["list"]}
    used = {name for query in queries() for name in re.findall(r"\$(\w+)", query)} - {"__rate_interval"}
    assert used <= variables
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in dashboard()["panels"] if "targets" in panel)
