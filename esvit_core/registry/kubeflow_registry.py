"""Register champions as versions of a registered model in the Kubeflow Model Registry (REST API v1alpha3).

The pointer in the object store decides which run is the champion; the registry mirrors it. Registration is idempotent, so
it can be repeated after an outage: `esvit champions --register`.
"""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import yaml

from esvit_core.config import Config
from esvit_core.errors import InfrastructureError, UserError
from esvit_core.registry.champions import pointer_uri
from esvit_core.runs.run import CONFIG, Run, name_of_run
from esvit_core.storage import ObjectStore, join_uri, split_uri
from esvit_core.storage.store_errors import NotFound

URL_VARIABLE = "ESVIT_MODEL_REGISTRY_URL"
TOKEN_FILE_VARIABLE = "ESVIT_MODEL_REGISTRY_TOKEN_FILE"
_API = "/api/model_registry/v1alpha3"
_SECONDS = 15.0
_CONFLICT = 409

Resource = dict[str, Any]


class RegistryError(UserError):
    """The registry refused the request."""


class RegistryUnavailable(InfrastructureError):  # noqa: N818  the name states the condition
    """The registry did not answer, or failed."""


class ModelRegistry:
    """A client of one registry server.

    Args:
        url: ``http(s)://host:port``.
        token_file: file with a bearer token, if a gateway requires one; it is read for every request.

    Raises:
        UserError: the address is malformed.
    """

    def __init__(self, url: str, token_file: Path | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or "@" in parts.netloc:
            raise UserError(f"model registry {url}: expected http(s)://host:port; check registry.url or {URL_VARIABLE}")
        self.url, self.token_file = url.rstrip("/"), token_file
        self._opener = urllib.request.build_opener(_NoRedirects)

    def find(self, path: str, **query: str) -> Resource | None:
        """Return the resource that a query finds; None if there is none."""
        status, answer = self._send("GET", f"{path}?{urlencode(query)}")
        return None if status == 404 else answer

    def ensure(self, path: str, found_at: str, query: Mapping[str, str], body: Resource) -> Resource:
        """Create a resource if it does not exist, and update its description and properties.

        Args:
            path: collection in which it is created and, by id, updated.
            found_at: path at which ``query`` finds it.
        """
        found = self.find(found_at, **query)
        if found is None:
            status, made = self._send("POST", path, body)
            if status != _CONFLICT:
                return made
            found = self.find(found_at, **query)  # another process was faster
            if found is None:
                raise RegistryError(f"model registry {self.url}: {made.get('message', 'conflict')}")
        wanted: Resource = {key: body[key] for key in ("description", "customProperties") if key in body}
        if all(found.get(key) == value for key, value in wanted.items()):
            return found
        return self._send("PATCH", f"{path}/{found['id']}", wanted)[1]

    def create(self, path: str, body: Resource) -> None:
        """Create a resource; an existing one is left unchanged."""
        self._send("POST", path, body)

    def _send(self, method: str, path: str, body: Resource | None = None) -> tuple[int, Resource]:
        """Send a request; return status and body. Of the error statuses only 404 of a GET and 409 are returned."""
        request = urllib.request.Request(f"{self.url}{_API}{path}", method=method)
        request.add_header("Accept", "application/json")
        if self.token_file is not None:
            request.add_header("Authorization", f"Bearer {_token(self.token_file)}")
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        try:
            with self._opener.open(request, timeout=_SECONDS) as response:
                status, data = response.status, response.read()
        except urllib.error.HTTPError as error:
            status, data = error.code, error.read()
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise RegistryUnavailable(
                f"model registry {self.url}: no answer ({reason}); check registry.url or {URL_VARIABLE}"
            ) from None
        if 300 <= status < 400:
            raise RegistryError(
                f"model registry {self.url}: requires a login; set {TOKEN_FILE_VARIABLE} to a file with a bearer token"
            )
        try:
            answer = json.loads(data)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise RegistryUnavailable(
                f"model registry {self.url}: the server is not a model registry (HTTP status {status})"
            )
        if status >= 400 and status != _CONFLICT and (method, status) != ("GET", 404):
            kind = RegistryUnavailable if status >= 500 else RegistryError
            message = " ".join(str(answer.get("message", "")).split())
            raise kind(
                f"model registry {self.url}: {method} {path.partition('?')[0]}: HTTP status {status} ({message})"
            )
        return status, answer


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Do not follow redirects, which lead to a login page."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _token(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise UserError(f"{TOKEN_FILE_VARIABLE}={file}: {error}; expected a file with a bearer token") from None


def registry_of(config: Config | None = None, url: str | None = None) -> ModelRegistry:
    """Return a client of the configured registry.

    Args:
        config: configuration of a run, if there is one.
        url: address that overrides the configuration and the environment.

    Raises:
        UserError: there is no address, or it is malformed.
    """
    address = url or (config and config.registry.url) or os.environ.get(URL_VARIABLE, "").strip()
    if not address:
        raise UserError(f"model registry: no address; set registry.url or {URL_VARIABLE} to http(s)://host:port")
    file = os.environ.get(TOKEN_FILE_VARIABLE, "").strip()
    return ModelRegistry(address, Path(file) if file else None)


def register_champions(
    registry: ModelRegistry, store: ObjectStore, bucket: str, pointer: str, history: bool = True
) -> list[str]:
    """Register the champion, and the former champions in the pointer's history, as versions of the model ``pointer``.

    Returns:
        Names of the versions, the current champion's last.

    Raises:
        UserError: there is no champion, or the registry refuses a request.
        InfrastructureError: the registry or the store is unavailable.
    """
    uri = pointer_uri(bucket, pointer)
    current = store.read_pointer(uri)
    if current is None:
        raise UserError(f"pointer {pointer}: there is no champion yet (no {uri}); a run has to be promoted first")
    model = registry.find("/registered_model", name=pointer)
    other = _texts(model).get("pointer", uri) if model else uri
    if other != uri:
        raise UserError(
            f"model registry {registry.url}: the registered model {pointer} belongs to {other}, not to {uri}; "
            "give this one another name with promotion.pointer"
        )
    former = {entry["run"]: entry for entry in current.value.get("history", [])} if history else {}
    former.pop(current.value["run"], None)
    properties = _properties({"pointer": uri, "champion": name_of_run(current.value["run"])})
    body = {"name": pointer, "description": f"Champions of {uri}", "customProperties": properties}
    if model is None:  # set the property `champion` only after the version exists
        model = registry.ensure("/registered_models", "/registered_model", {"name": pointer}, {"name": pointer})
    names = [_register(registry, store, model, entry) for entry in (*former.values(), current.value)]
    registry.ensure("/registered_models", "/registered_model", {"name": pointer}, body)
    return names


def register_after_promotion(run: Run) -> str:
    """Register the champion after a promotion, if the run's configuration asks for it.

    Returns:
        A message in one line; empty if no registration is configured. A failure is reported in the message and not
        raised, because the promotion itself succeeded.
    """
    if run.config.registry.kind == "none":
        return ""
    pointer, bucket = run.config.promotion.pointer, split_uri(run.uri)[0]
    try:
        registry = registry_of(run.config)
        version = register_champions(registry, run.store, bucket, pointer, history=False)[-1]
    except Exception as error:  # the promotion succeeded in any case
        command = f"esvit champions --register --pointer {pointer} --bucket {bucket}"
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"not registered ({reason}); retry with `{command}`"
    return f"registered as {pointer}, version {version}, in {registry.url}"


def _register(registry: ModelRegistry, store: ObjectStore, model: Resource, entry: Mapping[str, Any]) -> str:
    """Register one champion as a version, with its backbone as the artifact."""
    name, parent = name_of_run(entry["run"]), str(model["id"])
    body = {
        "name": name,
        "registeredModelId": parent,
        "description": entry.get("reason", ""),
        "customProperties": _properties(_lineage(store, entry)),
    }
    version = registry.ensure("/model_versions", "/model_version", {"name": name, "parentResourceId": parent}, body)
    artifacts = f"/model_versions/{version['id']}/artifacts"
    listed = registry.find(artifacts, pageSize="100") or {}
    if not any(one.get("uri") == entry["backbone"] for one in listed.get("items", [])):
        artifact = {
            "artifactType": "model-artifact",
            "name": name,
            "uri": entry["backbone"],
            "modelFormatName": "safetensors",
            "state": "LIVE",
        }
        registry.create(artifacts, artifact)
    return name


def _lineage(store: ObjectStore, entry: Mapping[str, Any]) -> dict[str, str | float | None]:
    """Collect the figures and the lineage of a champion, as far as its run still exists."""
    run = str(entry["run"])
    config, data = _read_config(store, run), _read_json(store, join_uri(run, "data", "manifest.json"))
    rolled_back, compared = entry.get("rolled_back") or {}, entry.get("compared") or {}
    return {
        "run": run,
        "metric": entry.get("metric"),
        "value": entry.get("value"),
        "baseline": entry.get("baseline"),
        "promoted_at": entry.get("time"),
        "champion_before": name_of_run(str(compared["run"])) if compared.get("run") else None,
        "rolled_back_at": rolled_back.get("time"),
        "recipe": config.get("recipe"),
        "parent": (config.get("init") or {}).get("source"),
        "data_fingerprint": data.get("fingerprint"),
    }


def _read_config(store: ObjectStore, run: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(store.get_bytes(join_uri(run, CONFIG)))
    except (NotFound, yaml.YAMLError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_json(store: ObjectStore, uri: str) -> dict[str, Any]:
    try:
        found = store.get_json(uri)
    except NotFound:
        return {}
    return found if isinstance(found, dict) else {}


def _properties(values: Mapping[str, str | float | None]) -> dict[str, Resource]:
    """Convert values to custom properties of the API; unknown values are omitted."""
    made: dict[str, Resource] = {}
    for name, value in values.items():
        if isinstance(value, float):
            made[name] = {"metadataType": "MetadataDoubleValue", "double_value": value}
        elif value:
            made[name] = {"metadataType": "MetadataStringValue", "string_value": str(value)}
    return made


def _texts(resource: Resource) -> dict[str, str]:
    properties = resource.get("customProperties") or {}
    return {name: value["string_value"] for name, value in properties.items() if "string_value" in value}
