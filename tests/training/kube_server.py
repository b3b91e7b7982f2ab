"""A small HTTP server with the paths of the Kubernetes API that the launch uses."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from esvit_core.config import Config
from esvit_core.launch.kubernetes import follow

RECORDED = Path(__file__).parent / "recorded"
_CUSTOM = re.compile(
    r"^/apis/(?P<group>[^/]+)/(?P<version>[^/]+)/namespaces/(?P<ns>[^/]+)/(?P<plural>[^/]+)(/(?P<name>[^/]+))?$"
)
_CORE = re.compile(r"^/api/v1/namespaces/(?P<ns>[^/]+)/(?P<plural>pods|events)(/(?P<name>[^/]+))?(?P<log>/log)?$")


def recorded(name: str) -> dict[str, Any]:
    """Return objects by name, from ``recorded/<name>.json``."""
    return json.loads((RECORDED / f"{name}.json").read_text(encoding="utf-8"))


@dataclass
class Stage:
    """The state of the cluster between two reads of the job.

    Attributes:
        phase: of the job: a key of ``recorded/jobs.json``, or of ``recorded/trainjobs.json``.
        pods: keys of ``recorded/pods.json``, by node.
        group: key of ``recorded/podgroups.json``.
        events: key of ``recorded/events.json``.
    """

    phase: str
    pods: dict[int, str] = field(default_factory=dict)
    group: str = "scheduled"
    events: str = "none"


class KubeServer:
    """The API of one cluster, with a script of the states of its only job.

    Args:
        kind: of the job: ``jobs`` are Volcano's, ``trainjobs`` the Trainer's.

    Attributes:
        script: stages; each read of the job advances to the next, and the last one stays.
        log: of the first pod.
        requests: the requests received, ``("POST", path, body)``.
        refusals: error responses by method and plural: ``{("POST", "jobs"): (403, "message")}``.
        failing: number of initial responses with status 500, by method and plural.
        at: callbacks by the number of the read of the job.
        jobs: by name.
        lag: seconds until deleted pods are gone.
        own: metadata of the step's own pods, by name.
    """

    def __init__(self, kind: str = "jobs") -> None:
        self.kind = kind
        self.script: list[Stage] = [Stage("Pending")]
        self.log: list[str] = []
        self.requests: list[tuple[str, str, Any]] = []
        self.refusals: dict[tuple[str, str], tuple[int, str]] = {}
        self.failing: dict[tuple[str, str], int] = {}
        self.at: dict[int, Callable[[], object]] = {}
        self.looks = 0
        self.jobs: dict[str, dict[str, Any]] = {}
        self.lag = 0.0
        self.own: dict[str, dict[str, Any]] = {}
        self.now: Stage | None = None
        self._gone_at = 0.0
        self._born = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def _answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                server.requests.append((self.command, self.path, body))
                split = urlsplit(self.path)
                server.answer(self, split.path, parse_qs(split.query), body)

            do_GET = do_POST = do_DELETE = do_PATCH = _answer  # noqa: N815

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def kubeconfig(self, path: Path) -> Path:
        """Write a kubeconfig for this server."""
        named = {"clusters": [{"name": "c", "cluster": {"server": self.url}}], "users": [{"name": "u", "user": {}}]}
        contexts = {"contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}], "current-context": "x"}
        path.write_text(json.dumps({"apiVersion": "v1", "kind": "Config", **named, **contexts}), encoding="utf-8")
        return path

    def verbs(self) -> list[tuple[str, str]]:
        """Return method and path of the requests in order, without consecutive repetitions."""
        asked = [(method, urlsplit(path).path) for method, path, _ in self.requests]
        return [a for a, b in zip(asked, [None, *asked], strict=False) if a != b]

    def put(self, body: dict[str, Any], phase: str) -> None:
        """A job that is there before the step."""
        self._born += 1
        created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        metadata = {"creationTimestamp": created, **body["metadata"], "uid": f"job-uid-{self._born}"}
        self.jobs[body["metadata"]["name"]] = {**body, "metadata": metadata}
        self.now = Stage(phase)

    def answer(self, request: BaseHTTPRequestHandler, path: str, query: dict[str, list[str]], body: Any) -> None:
        custom, core = _CUSTOM.match(path), _CORE.match(path)
        found = custom or core
        assert found, path
        plural = "pods/log" if core and core["log"] else found["plural"]
        if refusal := self.refusals.get((request.command, plural)):
            return _send(request, refusal[0], _status(*refusal) if refusal[1] else "404 page not found")
        if self.failing.get((request.command, plural), 0) > 0:
            self.failing[request.command, plural] -= 1
            return _send(request, 500, _status(500, "etcdserver: request timed out"))
        if custom and plural == self.kind:
            return self._job(request, custom["name"], body)
        if custom and request.command == "POST":
            return _send(request, 201, body)
        if custom:
            groups = recorded("podgroups")
            return _send(request, 200, groups[self.now.group if self.now else "scheduled"])
        if plural == "events":
            return _send(request, 200, {"items": recorded("events")[self.now.events if self.now else "none"]})
        if plural == "pods/log":
            return self._stream(request)
        if core and core["name"]:
            if (own := self.own.get(core["name"])) is None:
                return _send(request, 404, _status(404, f'pods "{core["name"]}" not found'))
            return _send(request, 200, {"kind": "Pod", "apiVersion": "v1", "metadata": own})
        return _send(request, 200, {"kind": "PodList", "apiVersion": "v1", "items": self._pods()})

    def _job(self, request: BaseHTTPRequestHandler, name: str | None, body: Any) -> None:
        if request.command == "POST":
            if body["metadata"]["name"] in self.jobs:
                return _send(request, 409, _status(409, f'{self.kind} "{body["metadata"]["name"]}" already exists'))
            self.put(body, self.script[0].phase)
            self.now = None
            return _send(request, 201, self.jobs[body["metadata"]["name"]])
        assert name
        if name not in self.jobs:
            return _send(request, 404, _status(404, f'{self.kind} "{name}" not found'))
        job = self.jobs[name]
        if request.command == "DELETE":
            del self.jobs[name]
            self._gone_at = time.monotonic() + self.lag
            return _send(request, 200, _status(200, "deleted"))
        if request.command == "PATCH":
            for name, value in body["metadata"].items():  # a merge patch
                there = job["metadata"].get(name)
                job["metadata"][name] = {**there, **value} if isinstance(there, dict) else value
            return _send(request, 200, job)
        self.looks += 1
        self.at.get(self.looks, int)()
        self.now = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        return _send(request, 200, job | {"status": recorded(self.kind)[self.now.phase]})

    def _pods(self) -> list[dict[str, Any]]:
        if not self.now or (not self.jobs and time.monotonic() > self._gone_at):
            return []
        pods, name = [], next(iter(self.jobs), "gone")
        for node, kind in self.now.pods.items():
            pod = recorded("pods")[kind]
            names = {"jobs": f"{name}-training-{node}-0", "trainjobs": f"{name}-node-0-{node}-{kind[:5]}"}
            metadata = {**pod["metadata"], "name": names[self.kind], "uid": f"{name}-{node}-{kind}"}
            pods.append({"spec": {"containers": [{"name": "training-0"}]}, **pod, "metadata": metadata})
        return pods

    def _stream(self, request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Type", "text/plain")
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        for line in self.log:
            piece = f"{line}\n".encode()
            request.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            request.wfile.flush()
        request.wfile.write(b"0\r\n\r\n")


@contextmanager
def serving(folder: Path, patch: pytest.MonkeyPatch, kind: str = "jobs") -> Iterator[KubeServer]:
    """A server that this process takes for its cluster, asked without long waits."""
    server = KubeServer(kind)
    patch.setenv("KUBECONFIG", str(server.kubeconfig(folder / "kubeconfig")))
    patch.setattr(follow, "POLL_SECONDS", 0.02)
    patch.setattr(follow, "RESCHEDULED_SECONDS", 5.0)  # a busy machine must not decide a test
    yield server
    server.stop()


def launching(store: Any, scheduler: str) -> Callable[..., None]:
    """Launch the run ``runs/a`` of the store on one or two nodes: ``launch("launch.queue=x")``."""

    def launch(*settings: str) -> None:
        nodes = ["launch.nodes=2", "launch.min_nodes=1"]
        config = Config.load("demo", [f"launch.scheduler={scheduler}", *nodes, *settings])
        follow.launch_on_cluster(store, store.uri("runs/a"), config)

    return launch


def _status(code: int, message: str) -> dict[str, Any]:
    return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code}


def _send(request: BaseHTTPRequestHandler, code: int, body: Any) -> None:
    data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    request.send_response(code)
    request.send_header("Content-Type", "text/plain" if isinstance(body, str) else "application/json")
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    request.wfile.write(data)
