"""The capacity check, against a server that responds like the Kubernetes API."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from esvit_core.config import Config
from esvit_pipelines.cluster.capacity import capacity_problems, size_lines

NODE = {"cpu": "3920m", "memory": "15Gi", "pods": "110"}
SIZES = [f"cluster.{role}.{size}" for role in ("train", "evaluate") for size in ("cpu=500m", "memory=2Gi")]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """Items that the API returns by plural name of their kind; other kinds are forbidden."""
    found: dict[str, list[dict[str, Any]]] = {"nodes": [node()], "limitranges": [], "resourcequotas": []}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            items = found.get(self.path.partition("?")[0].rpartition("/")[2])
            body = json.dumps({"items": items}).encode()
            self.send_response(200 if items is not None else 403)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    address = {"clusters": [{"name": "lab", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}]}
    user = {
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "x", "context": {"cluster": "lab", "user": "u"}}],
    }
    text = json.dumps({"apiVersion": "v1", "kind": "Config", **address, **user, "current-context": "x"})
    (tmp_path / "kubeconfig").write_text(text)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    yield found
    server.shutdown()
    server.server_close()


def node(**labels: str) -> dict[str, Any]:
    return {"metadata": {"name": "n", "labels": labels}, "spec": {}, "status": {"allocatable": NODE}}


def problems(*settings: str) -> list[str]:
    return capacity_problems(Config.load("demo", [*SIZES, *settings]), "team")


def test_the_demo_fits_on_a_node_of_four_cores(answers: dict[str, list[dict[str, Any]]]) -> None:
    assert problems() == []


def test_a_pod_that_fits_on_no_node_is_reported(answers: dict[str, list[dict[str, Any]]]) -> None:
    (line,) = problems("cluster.train.cpu=8", "cluster.train.accelerators=1")
    assert line.startswith("cluster.train: one pod requests 8 cpu, 2.0 GiB of memory, 1 nvidia.com/gpu; the largest")
    assert "3.92 cpu, 15.0 GiB of memory, 0 nvidia.com/gpu (cluster lab)" in line
    (line,) = problems("cluster.evaluate.node_selector={pool: gpu}")
    assert line.startswith("cluster.evaluate: no node has the labels {'pool': 'gpu'}")
    answers["nodes"].append(node(pool="gpu"))
    assert problems("cluster.evaluate.node_selector={pool: gpu}") == []


def test_a_pod_over_a_limit_range_or_a_quota_is_reported(answers: dict[str, list[dict[str, Any]]]) -> None:
    limits = {"limits": [{"type": "Container", "max": {"memory": "3Gi", "cpu": "16"}}]}
    answers["limitranges"] = [{"metadata": {"name": "bounds"}, "spec": limits}]
    hard = {"requests.cpu": "2", "limits.memory": "64Gi", "requests.nvidia.com/gpu": "1", "pods": "5"}
    answers["resourcequotas"] = [{"metadata": {"name": "share"}, "spec": {"hard": hard}}]
    lines = problems("cluster.train.memory=4Gi", "cluster.train.accelerators=2")
    assert any(
        line.startswith("cluster.train: one pod needs 4.0 GiB of memory; LimitRange team/bounds allows 3.0")
        for line in lines
    )
    assert any("one pod needs 2 nvidia.com/gpu; ResourceQuota team/share allows 1" in line for line in lines)


def test_without_permissions_nothing_is_reported(answers: dict[str, list[dict[str, Any]]]) -> None:
    answers.clear()
    assert problems("cluster.train.cpu=99") == []


def test_the_sizes_of_all_pods_are_listed() -> None:
    lines = size_lines(Config.load("demo", [*SIZES, "cluster.train.accelerators=2", "launch.scheduler=volcano"]))
    assert lines[1] == "  train      cpu 500m to 16, memory 2Gi to 2Gi, disk 50Gi, 2 nvidia.com/gpu"
    assert lines[-1] == "  the step that starts the job cpu 100m to 1, memory 512Mi to 2Gi, disk 2Gi"
