"""A real Prometheus scrapes a real run of two processes that collapse, stall and disappear."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from esvit_core.errors import TRY_AGAIN_EXIT_CODE
from esvit_core.monitoring.alerts import Durations, alert_rules, rule_file
from esvit_core.runs.events import read_events

DASHBOARD = Path(__file__).parents[2] / "manifests" / "monitoring" / "grafana" / "dashboards" / "esvit.json"
# Ten minutes become five seconds: the rules' own durations, a hundred and twentieth of each, and of the scrape interval.
FACTOR = 1 / 120


class Prometheus:
    """A server on a port of its own that scrapes one address."""

    def __init__(self, programs: Path, folder: Path, target: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        (folder / "alerts.yaml").write_text(rule_file(alert_rules(Durations().scaled(FACTOR))))
        every = {"scrape_interval": "125ms", "evaluation_interval": "125ms", "scrape_timeout": "125ms"}
        scrape = {"job_name": "esvit", "static_configs": [{"targets": [target]}]}
        configuration = {"global": every, "rule_files": ["alerts.yaml"], "scrape_configs": [scrape]}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
        self.url = f"http://127.0.0.1:{port}"
        self.log = (folder / "log").open("w")
        self.process = subprocess.Popen(
            [
                programs / "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=self.log,
            stderr=self.log,
        )

    def ask(self, path: str, **arguments: str) -> Any:
        query = urllib.parse.urlencode(arguments)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[Any]:
        return self.ask("query", query=expression)["result"]

    def firing(self) -> dict[tuple[str, str], str]:
        """Summaries of the alerts that fire, by name and sign."""
        return {
            (a["labels"]["alertname"], a["labels"].get("sign", "")): a["annotations"]["summary"]
            for a in self.ask("alerts")["alerts"]
            if a["state"] == "firing"
        }

    def wait_for(self, name: str, sign: str = "", seconds: float = 120) -> str:
        """Until the alert fires; its summary."""
        end = time.monotonic() + seconds
        while (name, sign) not in (firing := self.firing()):
            assert time.monotonic() < end, f"{name} does not fire; firing: {firing}"
            time.sleep(0.1)
        return firing[name, sign]

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


@pytest.fixture
def prometheus(prometheus_programs: Path, tmp_path: Path) -> Iterator[Callable[[str], Prometheus]]:
    started: list[Prometheus] = []

    def start(target: str) -> Prometheus:
        started.append(Prometheus(prometheus_programs, tmp_path, target))
        return started[0]

    yield start
    for server in started:
        server.stop()


def queries() -> list[str]:
    """The dashboard's, for the window that the scrape interval of the test needs."""
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    texts = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    return [
        text.replace("$__rate_interval", "5s").replace("$run", ".*").replace("$recipe", ".*").replace("[10m]", "[5s]")
        for text in texts
    ]


def test_prometheus_sees_a_run_collapse_and_stall_and_go(
    micro_run: Callable[..., Any], prometheus: Callable[[str], Prometheus], esvit: Callable[..., Any]
) -> None:
    run = micro_run(
        "watched",
        objective={"teacher_temp": 1e4, "warmup_teacher_temp": 1e4},  # uniform for every image, from the start
        training={"epochs": 100_000, "processes": 2, "metrics_port": 0, "collapse_patience": 10**6},
    )
    launcher = run.launch()
    lines = iter(launcher.stdout.readline, "")
    address = next(m.group(1) for line in lines if (m := re.search(r"metrics on http://(\S+)/metrics", line)))
    server = prometheus(address)
    next(line for line in lines if "images/s" in line)
    run.wait_until(lambda: server.process.poll() is None and _ready(server), "Prometheus")

    summary = server.wait_for("EsvitTeacherCollapse", "uniform")
    assert summary == "watched: the teacher collapses (uniform)"
    time.sleep(1)  # two samples of everything
    assert ("EsvitTrainStalled", "") not in server.firing()

    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        message = {line.partition("{")[0] for line in answer.read().decode().splitlines() if not line.startswith("#")}
    # A warning has no series unless there was one, nor a figure unless this run measures it.
    due = [q for q in queries() if set(re.findall(r"(?:esvit|process)_\w+", q)) <= message]
    assert len(due) > 25 and [query for query in due if not server.query(query)] == []
    status = esvit("status", "watched", "--json", "--bucket", run.store.bucket, env=run.store.address.environment())
    assert status.returncode == 0, status.stderr
    seen = json.loads(status.stdout)
    assert seen["state"] == "training" and 0 < seen["step"] < seen["steps"] and seen["checkpoint"]["step"] >= 5

    victim = next(process for process in run.trainers() if process.environ().get("RANK") == "1")
    victim.suspend()  # the first process waits for it, and still answers
    assert server.wait_for("EsvitTrainStalled") == "watched has made no step for 5s"
    assert server.query("esvit_train_step")

    victim.send_signal(signal.SIGKILL)
    launcher.communicate(timeout=240)
    assert launcher.returncode == TRY_AGAIN_EXIT_CODE
    assert "has gone with" in server.wait_for("EsvitTrainGone")

    failed = read_events(run.store, run.uri)[-1]
    assert (failed.kind, failed.rank) == ("failed", 1)
    status = esvit("status", "watched", "--bucket", run.store.bucket, env=run.store.address.environment())
    assert "process 1 was killed by SIGKILL" in " ".join(status.stdout.split()), status.stdout + status.stderr


def _ready(server: Prometheus) -> bool:
    try:
        return bool(server.query("esvit_train_step"))
    except OSError:
        return False
