"""The metrics on /metrics."""

import http.server
import re
import socket
import threading
import urllib.request

import pytest
from prometheus_client import generate_latest

from esvit_core.errors import UserError
from esvit_core.monitoring.metrics import TrainingMetrics

LINE = {"step": 1, "loss": 5.0, "loss_view": 4.0, "loss_region": 6.0, "lr": 1e-3, "entropy_view": 3.0, "kl_view": 1.0}


def scrape(metrics: TrainingMetrics) -> str:
    return generate_latest(metrics.registry).decode()


def series(text: str) -> set[str]:
    return {line.rpartition(" ")[0] for line in text.splitlines() if line.startswith("esvit_")}


def test_served_metrics_have_conventional_names() -> None:
    metrics = TrainingMetrics("run-a", "demo", world_size=2, total_steps=100)
    metrics.step(1, seconds=0.2, wait_seconds=0.01, images=64)
    metrics.line(LINE)
    metrics.line({"student_kl_region": 0.5, "prototypes_view": 12, "center_norm_view": 0.25})
    metrics.line({"feature_rank": 7.5, "mutual_matches": 0.75, "feature_std": None})
    metrics.warned("entropy_view")
    metrics.checkpoint(0.5, 1000)
    metrics.started(1, restarts=3)
    metrics.describe("cuda", "bfloat16", "triton")
    address = metrics.serve(0)
    text = urllib.request.urlopen(address, timeout=5).read().decode()
    assert address.startswith("http://127.0.0.1:")
    who = 'recipe="demo",run="run-a"'
    for line in (
        f"esvit_train_step_seconds_count{{{who}}} 1.0",
        f"esvit_train_images_total{{{who}}} 64.0",
        f'esvit_train_loss{{{who},term="region"}} 6.0',
        f"esvit_train_learning_rate{{{who}}} 0.001",
        f'esvit_teacher_entropy_nats{{level="view",{who}}} 3.0',
        f'esvit_teacher_kl_nats{{level="view",{who}}} 1.0',
        f'esvit_student_teacher_kl_nats{{level="region",{who}}} 0.5',
        f'esvit_teacher_prototypes_in_use{{level="view",{who}}} 12.0',
        f'esvit_teacher_center_norm{{level="view",{who}}} 0.25',
        f"esvit_teacher_feature_rank{{{who}}} 7.5",
        f"esvit_region_mutual_match_ratio{{{who}}} 0.75",
        f'esvit_train_warnings_total{{{who},sign="entropy_view"}} 1.0',
        f"esvit_train_world_size{{{who}}} 2.0",
        f'esvit_train_info{{device="cuda",objective="triton",precision="bfloat16",{who}}} 1.0',
        f"esvit_train_restarts_total{{{who}}} 3.0",
        f"esvit_checkpoint_bytes{{{who}}} 1000.0",
    ):
        assert line in text
    assert "process_resident_memory_bytes" in text


def test_a_port_in_use_is_a_user_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"training.metrics_port {port}"):
            TrainingMetrics("run-a", "demo", 1, 1).serve(port)


def test_the_number_of_series_does_not_grow_with_steps() -> None:
    metrics = TrainingMetrics("run-a", "demo", 2, 1000, memory=lambda: {"used": 1.0, "peak": 1.0, "total": 2.0})
    numbers = []
    for step in range(1, 1001):
        metrics.step(step, seconds=0.01 * step, wait_seconds=0.01, images=64)
        metrics.line({**LINE, "step": step})
        metrics.checkpoint(0.1 * step, 1000 + step)
        numbers.append(len(series(scrape(metrics))) if step in (1, 1000) else 0)
    assert numbers[0] == numbers[-1] < 120
    assert all('run="run-a"' in name and 'recipe="demo"' in name for name in series(scrape(metrics)))


def test_names_follow_the_conventions() -> None:
    """Base units, and the counters' ending: https://prometheus.io/docs/practices/naming/."""
    metrics = TrainingMetrics("run-a", "demo", 1, 1, memory=lambda: {"used": 1.0})
    kinds = dict(re.findall(r"^# TYPE (esvit_\w+) (\w+)$", scrape(metrics), re.MULTILINE))
    kinds = {name: kind for name, kind in kinds.items() if not name.endswith("_created")}
    assert len(kinds) > 20
    for name, kind in kinds.items():
        assert (kind == "counter") == name.endswith("_total"), name
        assert not re.search(r"_(ms|milliseconds|minutes|hours|mb|kb|gb|percent)\b", name)
        assert kind != "histogram" or name.endswith("_seconds")


def test_other_nodes_export_only_their_own_metrics() -> None:
    """Or the sums over the nodes would count the run several times."""
    metrics = TrainingMetrics("run-a", "demo", 4, 100, memory=lambda: {"used": 1.0}, is_main=False)
    metrics.step(1, seconds=0.2, wait_seconds=0.01, images=32)
    metrics.line(LINE)
    names = {name.partition("{")[0].removesuffix("_created") for name in series(scrape(metrics))}
    assert {re.sub("_(bucket|sum|count|total)$", "", name) for name in names} == {
        "esvit_train_step_seconds",
        "esvit_train_data_wait_seconds",
        "esvit_train_images",
        "esvit_train_device_memory_bytes",
        "esvit_store_errors",
    }


def test_the_age_of_a_checkpoint_starts_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.time", lambda: now[0])
    metrics = TrainingMetrics("run-a", "demo", 1, 1)

    def age() -> float:
        return float(re.search(r"^esvit_checkpoint_age_seconds\{.*\} (\S+)$", scrape(metrics), re.MULTILINE)[1])

    now[0] += 30
    assert age() == 30
    metrics.checkpoint(1.0, 1000)
    now[0] += 12
    assert age() == 12


def test_the_last_metrics_are_pushed_only_if_a_gateway_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[tuple[str, bytes]] = []

    class Gateway(http.server.BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            pushed.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    metrics = TrainingMetrics("run-a", "demo", 1, 1)
    monkeypatch.delenv("ESVIT_PUSHGATEWAY", raising=False)
    assert metrics.push() is None and not pushed
    with http.server.HTTPServer(("127.0.0.1", 0), Gateway) as server:
        threading.Thread(target=server.handle_request).start()
        monkeypatch.setenv("ESVIT_PUSHGATEWAY", f"127.0.0.1:{server.server_port}")
        assert metrics.push() is None
    ((path, body),) = pushed
    assert path == "/metrics/job/esvit/run/run-a" and b'esvit_train_world_size{recipe="demo",run="run-a"} 1.0' in body
    failed = metrics.push()  # nobody answers any more: the run goes on
    assert failed is not None and "could not be pushed" in failed
