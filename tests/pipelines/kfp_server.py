"""A fake server with the REST API of Kubeflow Pipelines 2 (v2beta1).

Requests and responses use the types that KFP generates from its API description (``kfp_server_api``), so an unknown
field is an error. The server stores experiments, pipelines with their versions, runs and recurring runs. The steps of a
run come from ``workflows`` and ``logs``.
"""

from __future__ import annotations

import datetime
import json
import re
import threading
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kfp_server_api
import yaml
from kfp_server_api import models

TYPES = {
    "experiments": "V2beta1Experiment",
    "runs": "V2beta1Run",
    "recurringruns": "V2beta1RecurringRun",
    "pipelines": "V2beta1Pipeline",
    "versions": "V2beta1PipelineVersion",
}
IDS = {
    "experiments": "experiment_id",
    "runs": "run_id",
    "recurringruns": "recurring_run_id",
    "pipelines": "pipeline_id",
    "versions": "pipeline_version_id",
}
DEFAULT_ACCOUNT = "pipeline-runner"
LISTS = {
    "experiments": (models.V2beta1ListExperimentsResponse, "experiments"),
    "runs": (models.V2beta1ListRunsResponse, "runs"),
    "recurringruns": (models.V2beta1ListRecurringRunsResponse, "recurring_runs"),
    "versions": (models.V2beta1ListPipelineVersionsResponse, "pipeline_versions"),
}


class RefusalError(Exception):
    """An error response in the format of the server's gateway."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class KfpServer:
    """A fake KFP server.

    Attributes:
        kept: created objects by kind and id.
        token: required token; None: no token is required.
        multi_user: whether lists need a namespace.
        kind: ``v2``; ``v1``, which has only the old API; ``login``, which sends a login page; ``other``.
        states: states of a run, one per request; the last one is final.
        workflows: Argo workflows of a run, one per request; the last one is final.
        logs: logs of pods by pod name.
        lost: number of following requests whose connection breaks.
        down: status of a proxy without a backend; 0: the server answers.
        accounts: permitted service accounts besides the default; None: all.
        forgetful: the account of a schedule that refers to a version is lost, as in KFP 2.16.1.
        closed: registering pipelines is not permitted.
        unlisted: number of following lists of versions that are empty, as if a version was registered just afterwards.
        gateway: only the user interface answers, which forwards v1beta1 and v2beta1 and reads logs itself.
        requests: method and path of each request.
        queries: query of each request.
        authorization: authorization header of each request.
    """

    def __init__(self) -> None:
        self._json = kfp_server_api.ApiClient()
        handler = type("Handler", (_Handler,), {"api": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._http.serve_forever, daemon=True, name="kfp").start()
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self.reset()

    def reset(self) -> None:
        """Restore the initial state."""
        self.kept: dict[str, dict[str, Any]] = {kind: {} for kind in TYPES}
        self.token: str | None = None
        self.multi_user = False
        self.kind = "v2"
        self.states: list[str] = []
        self.workflows: list[dict[str, Any]] = []
        self.logs: dict[str, str] = {}
        self.lost = self.down = self.unlisted = 0
        self.accounts: set[str] | None = None
        self.forgetful = self.closed = self.gateway = False
        self.release = "unknown"  # servers that were built without a version report this
        self.queries: list[dict[str, str]] = []
        self.requests: list[str] = []
        self.authorization: list[str | None] = []

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, method: str, path: str, query: dict[str, str], body: bytes, header: str | None) -> Any:
        """Return the response: a KFP type, or a dictionary."""
        self.requests.append(f"{method} {path}")
        self.queries.append(query)
        self.authorization.append(header)
        if self.token is not None and header != f"Bearer {self.token}":
            raise RefusalError(401, "Unauthenticated: the token is missing or has expired")
        if self.down:
            raise RefusalError(self.down, "no healthy upstream")
        version = "v1beta1" if self.kind == "v1" else "v2beta1"
        if self.kind == "v2" and (special := self._special(method, path, query, body)) is not None:
            return special
        if self.kind == "other" or not path.startswith(f"/apis/{version}/"):
            raise RefusalError(404, "Not Found")
        if path.endswith("/healthz"):
            return {"multi_user": self.multi_user, "tag_name": self.release, "commit_sha": "unknown"}
        match = re.fullmatch(rf"/apis/{version}/(\w+)(?:/([\w-]+)(?::(\w+))?)?", path)
        if match is None or match[1] not in TYPES:
            raise RefusalError(404, "Not Found")
        kind, name, verb = match.groups()
        handlers: dict[tuple[str, bool, str | None], Callable[[], Any]] = {
            ("GET", False, None): lambda: self._list(kind, query),
            ("POST", False, None): lambda: self._create(kind, body),
            ("GET", True, None): lambda: self._get(kind, name),
            ("DELETE", True, None): lambda: self._delete(kind, name),
            ("POST", True, "enable"): lambda: self._turn(name, "ENABLED"),
            ("POST", True, "disable"): lambda: self._turn(name, "DISABLED"),
            ("POST", True, "terminate"): lambda: self._end(name),
            ("POST", True, "retry"): lambda: self._retry(name),
        }
        handler = handlers.get((method, name is not None, verb))
        if handler is None:
            raise RefusalError(501, "Method Not Allowed")
        return handler()

    def _special(self, method: str, path: str, query: dict[str, str], body: bytes) -> Any:
        """Handle paths outside the common scheme; None: the path is not one of these."""
        if self.gateway and path == "/k8s/pod/logs" and query["podname"] in self.logs:
            return self.logs[query["podname"]]
        if match := re.fullmatch(r"/apis/v1alpha1/runs/[\w-]+/nodes/([\w-]+)/log", path):
            if self.gateway:
                raise RefusalError(404, f"Cannot GET {path}")
            missing = json.dumps({"error_message": f'pods "{match[1]}" not found', "error_details": "..."})
            return self.logs.get(match[1], missing)
        if match := re.fullmatch(r"/apis/v1beta1/runs/([\w-]+)", path):
            self._found("runs", match[1])
            kept = self._next(self.workflows)
            return {"pipeline_runtime": {"workflow_manifest": json.dumps(kept)} if kept else {}}
        if match := re.fullmatch(r"/apis/v2beta1/pipelines/names/([\w.-]+)", path):
            for one in self.kept["pipelines"].values():
                if (one.display_name, one.namespace or "") == (match[1], query.get("namespace", "")):
                    return one
            raise RefusalError(404, f"Pipeline {match[1]} not found")
        if path == "/apis/v2beta1/pipelines/upload_version":
            return self._upload(query, body)
        if match := re.fullmatch(r"/apis/v2beta1/pipelines/([\w-]+)/versions", path):
            if self.unlisted:
                self.unlisted -= 1
                return models.V2beta1ListPipelineVersionsResponse()
            return self._list("versions", {**query, "pipeline_id": match[1]})
        if path == "/apis/v2beta1/pipelines" and method == "POST" and self.closed:
            raise RefusalError(403, "User is not authorized to create pipelines")
        return None

    def _upload(self, query: dict[str, str], body: bytes) -> Any:
        """Create a version of a pipeline from a form with a file."""
        self._found("pipelines", query["pipelineid"])
        if self.closed:
            raise RefusalError(400, "Failed to create a pipeline version")
        kept = self.kept["versions"].values()
        if any((one.pipeline_id, one.name) == (query["pipelineid"], query["name"]) for one in kept):
            raise RefusalError(409, "The pipeline version already exists")
        pipeline, platform = yaml.safe_load_all(body.partition(b"\r\n\r\n")[2].rpartition(b"\r\n--")[0])
        made = models.V2beta1PipelineVersion(
            pipeline_id=query["pipelineid"],
            pipeline_version_id=str(uuid.uuid4()),
            name=query["name"],
            display_name=query["name"],
            description=query.get("description"),
            created_at=datetime.datetime.now(datetime.UTC),
            pipeline_spec={"pipeline_spec": pipeline, "platform_spec": platform},
        )
        self.kept["versions"][made.pipeline_version_id] = made
        return made

    @staticmethod
    def _next(moments: list[Any]) -> Any:
        """Remove and return the first item; the last one is kept."""
        if not moments:
            return None
        return moments.pop(0) if len(moments) > 1 else moments[0]

    def _end(self, name: str) -> Any:
        self._found("runs", name).state = "CANCELING"
        return {}

    def _retry(self, name: str) -> Any:
        found = self._found("runs", name)
        if found.state != "FAILED":
            raise RefusalError(400, "Workflow must be Failed/Error to retry")
        found.state = "RUNNING"
        return {}

    def refuse(self, status: int, message: str) -> None:
        raise RefusalError(status, message)

    def text(self, value: Any) -> bytes:
        return json.dumps(self._json.sanitize_for_serialization(value)).encode()

    def _create(self, kind: str, body: bytes) -> Any:
        known = set(getattr(models, TYPES[kind]).attribute_map.values())
        if unknown := json.loads(body).keys() - known:
            raise RefusalError(400, f"unknown fields {sorted(unknown)}")
        made = self._json.deserialize(SimpleNamespace(data=body.decode()), TYPES[kind])
        setattr(made, IDS[kind], str(uuid.uuid4()))
        made.created_at = datetime.datetime.now(datetime.UTC) + datetime.timedelta(microseconds=len(self.kept[kind]))
        if kind in ("runs", "recurringruns"):
            self._check(made)
            self._account(made, kind)
        if kind == "runs":
            made.state = "PENDING"
        if kind == "recurringruns":
            made.status = {"ENABLE": "ENABLED", "DISABLE": "DISABLED"}[made.mode]
        self.kept[kind][getattr(made, IDS[kind])] = made
        return made

    def _check(self, made: Any) -> None:
        """Check a pipeline as the real server does."""
        if made.experiment_id not in self.kept["experiments"]:
            raise RefusalError(404, f"Experiment {made.experiment_id} not found")
        spec = self._spec_of(made)
        declared = spec["root"].get("inputDefinitions", {}).get("parameters", {})
        given = (made.runtime_config.parameters if made.runtime_config else None) or {}
        kinds = {"STRING": str, "STRUCT": dict, "LIST": list, "BOOLEAN": bool, "NUMBER_INTEGER": int}
        for name, value in given.items():
            if name not in declared:
                raise RefusalError(400, f"parameter {name} is not one of the pipeline")
            if not isinstance(value, kinds[declared[name]["parameterType"]]):
                raise RefusalError(400, f"parameter {name} has the wrong type")
        missing = [name for name, p in declared.items() if not p.get("isOptional") and name not in given]
        if missing:
            raise RefusalError(400, f"parameter {missing[0]} is required")

    def _spec_of(self, made: Any) -> Any:
        """Return the pipeline: an inline one, that of a version, or that of the newest version."""
        if made.pipeline_spec:
            return made.pipeline_spec["pipeline_spec"]
        reference = made.pipeline_version_reference
        versions = [v for v in self.kept["versions"].values() if v.pipeline_id == reference.pipeline_id]
        if reference.pipeline_version_id:
            versions = [self._found("versions", reference.pipeline_version_id)]
        return versions[-1].pipeline_spec["pipeline_spec"]

    def _account(self, made: Any, kind: str) -> None:
        asked = made.service_account
        if asked and self.accounts is not None and asked not in self.accounts | {DEFAULT_ACCOUNT}:
            raise RefusalError(403, f"service account {asked} is not in the list of allowed service accounts")
        reference = made.pipeline_version_reference
        pinned = made.pipeline_spec or reference.pipeline_version_id
        lost = self.forgetful and kind == "recurringruns" and pinned
        made.service_account = DEFAULT_ACCOUNT if lost or not asked else asked

    def _found(self, kind: str, name: str) -> Any:
        if name not in self.kept[kind]:
            raise RefusalError(404, f"{TYPES[kind].removeprefix('V2beta1')} {name} not found")
        return self.kept[kind][name]

    def _get(self, kind: str, name: str) -> Any:
        found = self._found(kind, name)
        if kind == "runs" and self.states:
            found.state = self._next(self.states)
            if found.state in ("SUCCEEDED", "FAILED"):
                found.finished_at = found.created_at + datetime.timedelta(minutes=67)
        return found

    def _delete(self, kind: str, name: str) -> Any:
        self._get(kind, name)
        del self.kept[kind][name]
        return {}

    def _list(self, kind: str, query: dict[str, str]) -> Any:
        if self.multi_user and not any(query.get(key) for key in ("namespace", "experiment_id", "pipeline_id")):
            raise RefusalError(400, "Invalid input error: a namespace is required in multi-user mode")
        found = list(self.kept[kind].values())
        for predicate in json.loads(query.get("filter") or "{}").get("predicates", []):
            found = [one for one in found if getattr(one, predicate["key"]) == predicate["stringValue"]]
        for key in ("experiment_id", "pipeline_id"):
            if wanted := query.get(key):
                found = [one for one in found if getattr(one, key) == wanted]
        if query.get("sort_by", "").endswith("desc"):
            found.sort(key=lambda one: one.created_at, reverse=True)
        start, size = int(query.get("page_token") or 0), int(query.get("page_size") or 10)
        following = str(start + size) if start + size < len(found) else ""
        response, key = LISTS[kind]
        return response(**{key: found[start : start + size]}, total_size=len(found), next_page_token=following)

    def _turn(self, name: str, status: str) -> Any:
        self._get("recurringruns", name).status = status
        return {}


class _Handler(BaseHTTPRequestHandler):
    api: KfpServer

    def _respond(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.api.lost:
            self.api.lost -= 1
            self.close_connection = True
            return
        status, content, kind = 200, b"<html><title>Log in</title></html>", "text/html"
        if self.api.kind != "login":
            kind = "application/json"
            try:
                output = self.api.answer(self.command, url.path, query, body, self.headers.get("authorization"))
                content = output.encode() if isinstance(output, str) else self.api.text(output)
            except RefusalError as refusal:
                status = refusal.status
                content = self.api.text({"error": str(refusal), "code": status, "message": str(refusal)})
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_DELETE = _respond  # noqa: N815 (named so by http.server)

    def log_message(self, format: str, *arguments: object) -> None:
        """Log nothing; the requests are in ``KfpServer.requests``."""
