"""Answers of a Kubeflow Model Registry: the part of its REST API that is used, with its rules on names and properties."""

from __future__ import annotations

import http.server
import json
import threading
from typing import Any
from urllib.parse import parse_qsl, urlsplit

API = "/api/model_registry/v1alpha3"
Resource = dict[str, Any]


class RegistryServer(http.server.ThreadingHTTPServer):
    """Keeps what it is given. ``fail``: the status of every answer instead."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.models: list[Resource] = []
        self.versions: list[Resource] = []
        self.artifacts: list[Resource] = []
        self.requests: list[str] = []
        self.tokens: list[str | None] = []
        self.fail: int | None = None
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, method: str, path: str, query: dict[str, str], body: Resource) -> tuple[int, Resource]:
        parts = path.removeprefix(API).strip("/").split("/")
        match method, parts:
            case "GET", ["registered_model"]:
                return _found(self.models, name=query["name"])
            case "GET", ["model_version"]:
                return _found(self.versions, name=query["name"], registeredModelId=query["parentResourceId"])
            case "POST", ["registered_models"]:
                return _made(self.models, body, "name")
            case "POST", ["model_versions"]:
                if not any(model["id"] == body["registeredModelId"] for model in self.models):
                    return 404, {"code": "", "message": "no such registered model"}
                return _made(self.versions, body, "name", "registeredModelId")
            case "PATCH", ["registered_models", which]:
                return _changed(self.models, which, body)
            case "PATCH", ["model_versions", which]:
                return _changed(self.versions, which, body)
            case "GET", ["model_versions", which, "artifacts"]:
                items = [one for one in self.artifacts if one["version"] == which]
                return 200, {"items": items, "nextPageToken": "", "pageSize": 100, "size": len(items)}
            case "POST", ["model_versions", which, "artifacts"]:
                return _made(self.artifacts, {**body, "version": which}, "name", "version")
        return 404, {"code": "", "message": "no such path"}


def _found(resources: list[Resource], **wanted: str) -> tuple[int, Resource]:
    for one in resources:
        if all(one[key] == value for key, value in wanted.items()):
            return 200, one
    return 404, {"code": "", "message": "not found"}


def _made(resources: list[Resource], body: Resource, *unique: str) -> tuple[int, Resource]:
    if any(all(one[key] == body[key] for key in unique) for one in resources):
        return 409, {"code": "", "message": "already exists"}
    resources.append({**body, "id": str(len(resources) + 1)})
    return 201, resources[-1]


def _changed(resources: list[Resource], which: str, body: Resource) -> tuple[int, Resource]:
    for one in resources:
        if one["id"] == which:
            one |= body
            return 200, one
    return 404, {"code": "", "message": "not found"}


class _Answers(http.server.BaseHTTPRequestHandler):
    server: RegistryServer

    def _answer(self) -> None:
        split = urlsplit(self.path)
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        self.server.requests.append(f"{self.command} {split.path.removeprefix(API)}")
        self.server.tokens.append(self.headers.get("Authorization"))
        if self.server.fail is None:
            status, answer = self.server.answer(self.command, split.path, dict(parse_qsl(split.query)), body)
        else:
            status, answer = self.server.fail, {"code": "", "message": "so it says"}
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PATCH = _answer  # noqa: N815

    def log_message(self, format: str, *arguments: object) -> None:
        pass
