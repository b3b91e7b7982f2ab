"""Champions in the Kubeflow Model Registry, on a real object store; the registry's answers are those of its API."""

from __future__ import annotations

import json
import os
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from registry_server import RegistryServer, Resource

from esvit_core.config import Config
from esvit_core.errors import InfrastructureError, UserError
from esvit_core.registry.champions import roll_back, with_history
from esvit_core.registry.kubeflow_registry import ModelRegistry, register_after_promotion, register_champions
from esvit_core.runs.run import Run

REAL = "ESVIT_TEST_MODEL_REGISTRY"  # address of a real registry, to test against it as well


@pytest.fixture
def registry() -> Iterator[RegistryServer]:
    server = RegistryServer()
    yield server
    server.shutdown()
    server.server_close()


def promoted(store: Any, name: str, value: float, pointer_name: str = "champion", **config: Any) -> dict[str, Any]:
    """A run that became champion, and the pointer as the promotion leaves it."""
    uri = store.uri(f"runs/{name}")
    store.put_bytes(f"{uri}/config.yaml", yaml.safe_dump({"recipe": "micro", **config}).encode())
    store.put_bytes(f"{uri}/data/manifest.json", json.dumps({"fingerprint": f"print-of-{name}"}).encode())
    store.put_bytes(f"{uri}/backbone/weights", b"x")
    pointer = store.read_pointer(store.uri(f"pointers/{pointer_name}"))
    before = None if pointer is None else pointer.value
    entry = {
        "run": uri,
        "backbone": f"{uri}/backbone",
        "metric": "knn/20",
        "value": value,
        "baseline": 20.5,
        "task": "t",
        "reason": f"better: {value}",
        "compared": before and {key: before[key] for key in ("run", "metric", "value")},
        "time": "2026-11-28T12:00:00+00:00",
    }
    assert store.swap_pointer(store.uri(f"pointers/{pointer_name}"), with_history(entry, before), pointer)
    return entry


def values(resource: Resource) -> dict[str, Any]:
    return {k: v.get("string_value", v.get("double_value")) for k, v in resource["customProperties"].items()}


def test_a_champion_becomes_a_version_with_its_figures_and_its_lineage(store: Any, registry: RegistryServer) -> None:
    promoted(store, "first-1", 30.0)
    entry = promoted(store, "second-2", 33.25, init={"source": store.uri("runs/first-1")})
    assert register_champions(ModelRegistry(registry.url), store, store.bucket, "champion") == ["first-1", "second-2"]
    (model,) = registry.models
    assert model["name"] == "champion"
    assert values(model) == {"pointer": store.uri("pointers/champion"), "champion": "second-2"}
    assert [version["name"] for version in registry.versions] == ["first-1", "second-2"]
    assert {version["registeredModelId"] for version in registry.versions} == {model["id"]}
    assert values(registry.versions[1]) == {
        "run": entry["run"],
        "metric": "knn/20",
        "value": 33.25,
        "baseline": 20.5,
        "promoted_at": entry["time"],
        "champion_before": "first-1",
        "recipe": "micro",
        "parent": store.uri("runs/first-1"),
        "data_fingerprint": "print-of-second-2",
    }
    assert [a["uri"] for a in registry.artifacts] == [store.uri(f"runs/{n}/backbone") for n in ("first-1", "second-2")]


def test_registering_again_changes_nothing(store: Any, registry: RegistryServer) -> None:
    promoted(store, "first-1", 30.0)
    client = ModelRegistry(registry.url)
    register_champions(client, store, store.bucket, "champion")
    before = json.dumps([registry.models, registry.versions, registry.artifacts])
    registry.requests.clear()
    register_champions(client, store, store.bucket, "champion")
    assert json.dumps([registry.models, registry.versions, registry.artifacts]) == before
    assert all(request.startswith("GET") for request in registry.requests)


@pytest.mark.parametrize("requests", range(1, 8))
def test_a_registration_that_was_interrupted_is_completed(
    store: Any, registry: RegistryServer, requests: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    promoted(store, "first-1", 30.0)
    client, send = ModelRegistry(registry.url), ModelRegistry._send

    def breaks_off(self: ModelRegistry, *arguments: Any) -> Any:
        if len(registry.requests) >= requests:
            raise InfrastructureError("cut")
        return send(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ModelRegistry, "_send", breaks_off)
        with pytest.raises(InfrastructureError):
            register_champions(client, store, store.bucket, "champion")
    register_champions(client, store, store.bucket, "champion")
    assert values(registry.models[0])["champion"] == "first-1"
    assert len(registry.models) == len(registry.versions) == len(registry.artifacts) == 1


def test_a_model_of_another_bucket_is_left_alone(store: Any, registry: RegistryServer) -> None:
    promoted(store, "first-1", 30.0)
    other = {"metadataType": "MetadataStringValue", "string_value": "s3://other/pointers/champion"}
    registry.models.append({"id": "1", "name": "champion", "customProperties": {"pointer": other}})
    with pytest.raises(UserError, match=r"belongs to s3://other/pointers/champion.*promotion\.pointer"):
        register_champions(ModelRegistry(registry.url), store, store.bucket, "champion")
    assert not registry.versions


@pytest.mark.parametrize(
    ("status", "kind", "output"),
    [
        (503, InfrastructureError, "HTTP status 503"),
        (401, UserError, "HTTP status 401"),
        (302, UserError, "requires a login"),
    ],
)
def test_a_registry_that_fails_or_refuses_is_told_in_one_line(
    store: Any, registry: RegistryServer, status: int, kind: type[Exception], output: str
) -> None:
    promoted(store, "first-1", 30.0)
    registry.fail = status
    with pytest.raises(kind, match=f"model registry {registry.url}.*{output}") as caught:
        register_champions(ModelRegistry(registry.url), store, store.bucket, "champion")
    assert "\n" not in str(caught.value)


def test_a_promotion_announces_where_it_is_configured_and_never_fails(
    store: Any, registry: RegistryServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ESVIT_MODEL_REGISTRY_URL", raising=False)
    entry = promoted(store, "first-1", 30.0)

    def reported(*settings: str) -> str:
        return register_after_promotion(Run(entry["run"], store, Config.load("demo", list(settings))))

    assert reported() == "" and not registry.requests
    kind = "registry.kind=kubeflow"
    message = reported(kind)
    assert message.startswith("not registered (")
    assert "); retry with `esvit champions --register --pointer champion --bucket " in message
    assert "no answer" in reported(kind, "registry.url=http://127.0.0.1:9")
    registry.fail = 500
    assert "HTTP status 500" in reported(kind, f"registry.url={registry.url}")
    registry.fail = None
    assert (
        reported(kind, f"registry.url={registry.url}") == f"registered as champion, version first-1, in {registry.url}"
    )
    monkeypatch.setenv("ESVIT_MODEL_REGISTRY_URL", registry.url)
    assert reported(kind).startswith("registered as champion")


def test_where_champions_are_listed_is_no_part_of_a_run() -> None:
    assert Config.load("demo", ["registry.kind=kubeflow"]).digest() == Config.load("demo").digest()


def test_the_command_registers_the_champions_and_what_a_rollback_changes(
    store: Any, registry: RegistryServer, esvit: Callable[..., Any], tmp_path: Path
) -> None:
    promoted(store, "first-1", 30.0)
    promoted(store, "second-2", 33.0)
    (tmp_path / "token").write_text("a-token\n")
    environment = {
        **store.address.environment(),
        "ESVIT_MODEL_REGISTRY_URL": registry.url,
        "ESVIT_MODEL_REGISTRY_TOKEN_FILE": str(tmp_path / "token"),
    }
    done = esvit("champions", "--register", "--bucket", store.bucket, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"champion in {registry.url}: 2 versions, champion second-2" in done.stdout
    assert set(registry.tokens) == {"Bearer a-token"} and "a-token" not in done.stdout + done.stderr
    wrong = esvit("champions", "--register", "--bucket", store.bucket, "--registry", "registry:80", env=environment)
    assert wrong.returncode == 2 and "model registry registry:80: expected http(s)://host:port" in wrong.stderr


def test_a_champion_that_was_taken_back_is_marked(store: Any, registry: RegistryServer, monkeypatch: Any) -> None:
    promoted(store, "first-1", 30.0)
    promoted(store, "second-2", 33.0)
    client = ModelRegistry(registry.url)
    register_champions(client, store, store.bucket, "champion")
    monkeypatch.setattr(type(store), "read_manifest", lambda *_: {})
    roll_back(store, store.bucket, "champion", None, "somebody", "wrong labels")
    assert register_champions(client, store, store.bucket, "champion")[-1] == "first-1"
    assert values(registry.models[0])["champion"] == "first-1"
    second = next(version for version in registry.versions if version["name"] == "second-2")
    assert "rolled_back_at" in values(second)


@pytest.mark.skipif(not os.environ.get(REAL), reason=f"{REAL} does not name a Kubeflow Model Registry")
def test_a_real_registry_has_the_champions_with_their_lineage(store: Any) -> None:
    url, name = os.environ[REAL], f"champion-{uuid.uuid4().hex[:8]}"
    client = ModelRegistry(url)
    promoted(store, "first-1", 30.0, name)
    assert register_champions(client, store, store.bucket, name) == ["first-1"]
    promoted(store, "second-2", 33.25, name, init={"source": store.uri("runs/first-1")})
    for _ in range(2):  # registering again changes nothing
        assert register_champions(client, store, store.bucket, name) == ["first-1", "second-2"]
    model = client.find("/registered_model", name=name)
    assert model and values(model) == {"pointer": store.uri(f"pointers/{name}"), "champion": "second-2"}
    versions = _items(url, f"/registered_models/{model['id']}/versions")
    assert sorted(version["name"] for version in versions) == ["first-1", "second-2"]
    second = next(version for version in versions if version["name"] == "second-2")
    assert values(second)["champion_before"] == "first-1" and values(second)["value"] == 33.25
    assert values(second)["parent"] == store.uri("runs/first-1")
    (artifact,) = _items(url, f"/model_versions/{second['id']}/artifacts")
    assert artifact["uri"] == store.uri("runs/second-2/backbone")


def _items(url: str, path: str) -> list[Resource]:
    with urllib.request.urlopen(f"{url}/api/model_registry/v1alpha3{path}", timeout=20) as answer:
        found: list[Resource] = json.load(answer)["items"]
    return found
