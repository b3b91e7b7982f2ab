"""A server that speaks the REST API of Kubeflow Pipelines 2 (v2beta1), for the tests.

What comes in and goes out passes through the types that KFP generates from its own API description
(``kfp_server_api``): a field that they do not know is an error here, too. It keeps experiments, runs and recurring runs.
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
from kfp_server_api import models

TYPES = {"experiments": "V2beta1Experiment", "runs": "V2beta1Run", "recurringruns": "V2beta1RecurringRun"}
IDS = {"experiments": "experiment_id", "runs": "run_id", "recurringruns": "recurring_run_id"}
LISTS = {
    "experiments": (models.V2beta1ListExperimentsResponse, "experiments"),
    "runs": (models.V2beta1ListRunsResponse, "runs"),
    "recurringruns": (models.V2beta1ListRecurringRunsResponse, "recurring_runs"),
}


class RefusalError(Exception):
    """An answer with an error code, as the server's gateway writes it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class KfpServer:
    """The server.

    Attributes:
        kept: by kind and id.
        token: that is asked for; None: none is.
        multi_user: whether lists need a namespace.
        kind: ``v2``; ``v1``, which has the old API only; ``login``, which shows a page to log in; ``other``.
        states: that a run goes through, one each time that it is asked for.
        requests: method and path of each.
        authorization: the header of each request.
    """

    def __init__(self) -> None:
        self._json = kfp_server_api.ApiClient()
        handler = type("Handler", (_Handler,), {"api": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._http.serve_forever, daemon=True, name="kfp").start()
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self.reset()

    def reset(self) -> None:
        """As it is at first: nothing is kept, nothing is asked for."""
        self.kept: dict[str, dict[str, Any]] = {kind: {} for kind in TYPES}
        self.token: str | None = None
        self.multi_user = False
        self.kind = "v2"
        self.states: list[str] = []
        self.requests: list[str] = []
        self.authorization: list[str | None] = []

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, method: str, path: str, query: dict[str, str], body: bytes, header: str | None) -> Any:
        """What the server says: a KFP type, or a dictionary."""
        self.requests.append(f"{method} {path}")
        self.authorization.append(header)
        if self.token is not None and header != f"Bearer {self.token}":
            raise RefusalError(401, "Unauthenticated: the token is missing or has expired")
        version = "v1beta1" if self.kind == "v1" else "v2beta1"
        if self.kind == "other" or not path.startswith(f"/apis/{version}/"):
            raise RefusalError(404, "Not Found")
        if path.endswith("/healthz"):
            return models.V2beta1GetHealthzResponse(multi_user=self.multi_user)
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
        }
        handler = handlers.get((method, name is not None, verb))
        if handler is None:
            raise RefusalError(501, "Method Not Allowed")
        return handler()

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
        if kind != "experiments":
            self._check(made)
        if kind == "runs":
            made.state = "PENDING"
        if kind == "recurringruns":
            made.status = {"ENABLE": "ENABLED", "DISABLE": "DISABLED"}[made.mode]
        self.kept[kind][getattr(made, IDS[kind])] = made
        return made

    def _check(self, made: Any) -> None:
        """What the real server checks before it takes a pipeline."""
        if made.experiment_id not in self.kept["experiments"]:
            raise RefusalError(404, f"Experiment {made.experiment_id} not found")
        spec = made.pipeline_spec["pipeline_spec"]
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

    def _get(self, kind: str, name: str) -> Any:
        if name not in self.kept[kind]:
            raise RefusalError(404, f"{TYPES[kind].removeprefix('V2beta1')} {name} not found")
        found = self.kept[kind][name]
        if kind == "runs" and self.states:
            found.state = self.states.pop(0)
            if found.state in ("SUCCEEDED", "FAILED"):
                found.finished_at = found.created_at + datetime.timedelta(minutes=67)
        return found

    def _delete(self, kind: str, name: str) -> Any:
        self._get(kind, name)
        del self.kept[kind][name]
        return {}

    def _list(self, kind: str, query: dict[str, str]) -> Any:
        if self.multi_user and not query.get("namespace") and not query.get("experiment_id"):
            raise RefusalError(400, "Invalid input error: a namespace is required in multi-user mode")
        found = list(self.kept[kind].values())
        for predicate in json.loads(query.get("filter") or "{}").get("predicates", []):
            found = [one for one in found if getattr(one, predicate["key"]) == predicate["stringValue"]]
        if experiment := query.get("experiment_id"):
            found = [one for one in found if one.experiment_id == experiment]
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
        status, content, kind = 200, b"<html><title>Log in</title></html>", "text/html"
        if self.api.kind != "login":
            kind = "application/json"
            try:
                content = self.api.text(
                    self.api.answer(self.command, url.path, query, body, self.headers.get("authorization"))
                )
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
        """Nothing: pytest has the requests in ``KfpServer.requests``."""
