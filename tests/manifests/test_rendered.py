"""What is rendered is valid for three minor versions of Kubernetes, and keeps the rules of a careful cluster."""

from __future__ import annotations

import copy
import functools
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from referencing import Registry, Resource

from esvit_core.config.cluster_settings import TOKEN_FOLDER, ClusterConfig
from esvit_core.monitoring.alerts import alert_rules
from esvit_core.storage import StoreAddress
from esvit_core.storage.web_identity import TOKEN_FILE

Object = dict[str, Any]
MANIFESTS = Path(__file__).parents[2] / "manifests"
VERSIONS = ("1.35", "1.36", "1.37")
SCHEMAS = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
CRDS = yaml.safe_load((Path(__file__).parent / "crds.yaml").read_text())


@functools.cache
def validator(version: str, api_version: str, kind: str) -> jsonschema.Draft202012Validator:
    """As the package makes it, once per kind instead of once per object: the definitions take long to read."""
    group, _, name = api_version.rpartition("/")
    file = f"{kind.lower()}-{group.partition('.')[0]}-{name}.json" if group else f"{kind.lower()}-{name}.json"
    schema = json.loads((SCHEMAS / f"v{version}.0-local-strict" / file).read_text())
    return jsonschema.Draft202012Validator(schema, registry=definitions(version))


@functools.cache
def definitions(version: str) -> Registry:
    text = (SCHEMAS / f"v{version}.0-local-strict" / "_definitions.json").read_text()
    return Resource.from_contents(json.loads(text)) @ Registry()


def is_kubernetes_own(thing: Object) -> bool:
    group = thing["apiVersion"].rpartition("/")[0]
    return "." not in group or group.endswith(".k8s.io")


def check(thing: Object, version: str) -> list[str]:
    """What is wrong with an object."""
    if is_kubernetes_own(thing):
        return [error.message for error in validator(version, thing["apiVersion"], thing["kind"]).iter_errors(thing)]
    extra = thing.keys() - {"apiVersion", "kind", "metadata", "spec"}
    schema = CRDS[f"{thing['apiVersion']}/{thing['kind']}"]
    errors = jsonschema.Draft202012Validator(schema).iter_errors(thing["spec"])
    return [*(f"unknown field {name}" for name in extra), *(error.message for error in errors)]


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [thing for thing in objects if thing["kind"] == kind]


def names(objects: list[Object], kind: str) -> set[str]:
    return {thing["metadata"]["name"] for thing in of_kind(objects, kind)}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid(rendered: dict[str, list[Object]], version: str) -> None:
    unique = {json.dumps(thing, sort_keys=True): thing for objects in rendered.values() for thing in objects}
    wrong = {f"{t['kind']} {t['metadata']['name']}": errors for t in unique.values() if (errors := check(t, version))}
    assert not wrong
    assert len(unique) > 40


def test_an_unknown_field_and_a_wrong_type_are_found(rendered: dict[str, list[Object]]) -> None:
    kinds = {thing["kind"]: thing for thing in rendered["onprem"]}
    for thing in kinds.values():
        if thing["kind"] in ("ConfigMap", "PriorityClass"):
            continue
        broken = copy.deepcopy(thing)
        place = broken.get("spec") or broken.get("rules") or broken.get("roleRef") or broken
        (place[0] if isinstance(place, list) else place)["surely"] = 1
        assert check(broken, "1.37"), thing["kind"]


def test_the_names_are_unique(objects: list[Object]) -> None:
    found = [(t["apiVersion"], t["kind"], t["metadata"]["name"]) for t in objects]
    assert len(found) == len(set(found))


def test_every_object_is_in_the_namespace_of_its_overlay(rendered: dict[str, list[Object]]) -> None:
    cluster_wide = {"PriorityClass", "Queue", "Profile"}
    for overlay, namespace in {"kind": "kubeflow", "onprem": "esvit", "cloud": "esvit"}.items():
        found = {t["metadata"].get("namespace") for t in rendered[overlay] if t["kind"] not in cluster_wide}
        assert found == {namespace}


def test_no_secret_is_in_the_manifests(objects: list[Object]) -> None:
    assert not of_kind(objects, "Secret")
    text = json.dumps(objects)
    assert not re.search(r"(?i)(access_?key|secret_?key|password|token)\W{1,5}\s*[\w+/]{12,}", text)


def test_with_workload_identity_nothing_refers_to_a_secret(rendered_without_keys: list[Object]) -> None:
    assert not [error for thing in rendered_without_keys for error in check(thing, "1.37")]
    assert "secretRef" not in json.dumps(rendered_without_keys)
    (store,) = of_kind(rendered_without_keys, "ConfigMap")
    assert store["metadata"]["name"] == ClusterConfig().store_config_map
    address = StoreAddress.from_env({**store["data"], TOKEN_FILE: "/token"})
    assert address.identity is not None and address.identity.sts == address.url
    (prune,) = of_kind(rendered_without_keys, "CronJob")
    pod = prune["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["envFrom"] == [{"configMapRef": {"name": store["metadata"]["name"]}}]
    assert {"name": TOKEN_FILE, "value": f"{TOKEN_FOLDER}/token"} in container["env"]
    (token,) = [volume for volume in pod["volumes"] if "projected" in volume]
    assert {"name": token["name"], "mountPath": TOKEN_FOLDER, "readOnly": True} in container["volumeMounts"]


def test_the_vault_brings_a_key_for_every_role(rendered: dict[str, list[Object]]) -> None:
    from esvit_core.storage.keys import SECRET, SERVER
    from esvit_core.storage.roles import ADMIN, ROLES

    assert names(rendered["cloud"], "ExternalSecret") == {f"{SECRET}-{role}" for role in ROLES}
    assert names(rendered["onprem"], "ExternalSecret") == {f"{SECRET}-{role}" for role in (*ROLES, ADMIN, SERVER)}
    for thing in of_kind(rendered["onprem"], "ExternalSecret"):
        role = thing["metadata"]["name"].removeprefix(f"{SECRET}-")
        assert thing["spec"]["dataFrom"] == [{"extract": {"key": f"esvit/object-store/{role}"}}]
        assert thing["spec"]["target"]["name"] == thing["metadata"]["name"]


def test_roles_name_every_verb_and_bind_to_accounts_that_exist(objects: list[Object]) -> None:
    accounts = names(objects, "ServiceAccount")
    assert not of_kind(objects, "ClusterRole") and not of_kind(objects, "ClusterRoleBinding")
    for role in of_kind(objects, "Role"):
        for rule in role["rules"]:
            assert "*" not in (*rule["verbs"], *rule["resources"], *rule["apiGroups"])
            if rule["resources"] == ["secrets"]:
                assert rule["verbs"] == ["get"] and rule["resourceNames"]
    for binding in of_kind(objects, "RoleBinding"):
        assert binding["roleRef"]["name"] in names(objects, "Role")
        assert {subject["name"] for subject in binding["subjects"]} == {"esvit-pipeline"} <= accounts


def test_the_alert_rules_are_those_made(rendered: dict[str, list[Object]]) -> None:
    for overlay in ("onprem", "cloud"):
        (rule,) = of_kind(rendered[overlay], "PrometheusRule")
        assert rule["spec"] == alert_rules(), (
            "run `python -m esvit_core.monitoring.alerts --kubernetes > manifests/monitoring/prometheusrule.yaml`"
        )


def test_the_dashboard_is_the_one_of_the_laptop(rendered: dict[str, list[Object]]) -> None:
    (board,) = of_kind(rendered["onprem"], "ConfigMap")
    assert board["metadata"]["labels"]["grafana_dashboard"] == "1"
    file = MANIFESTS / "monitoring" / "grafana" / "dashboards" / "esvit.json"
    assert json.loads(board["data"]["esvit.json"]) == json.loads(file.read_text())
    assert len(board["data"]["esvit.json"]) < 250_000  # an applied object is annotated with itself, up to 256 KiB


def test_monitors_find_the_ports_that_exist(rendered: dict[str, list[Object]]) -> None:
    (service,) = of_kind(rendered["onprem"], "Service")
    (monitor,) = of_kind(rendered["onprem"], "ServiceMonitor")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["spec"]["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}
    pod = of_kind(rendered["onprem"], "StatefulSet")[0]["spec"]["template"]
    ports = {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} == ports
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()


def test_monitors_and_rules_carry_the_label_that_prometheus_selects(rendered: dict[str, list[Object]]) -> None:
    for overlay in ("onprem", "cloud"):
        kinds = ("PodMonitor", "ServiceMonitor", "PrometheusRule")
        monitored = [thing for kind in kinds for thing in of_kind(rendered[overlay], kind)]
        assert len(monitored) >= 3
        assert {thing["metadata"]["labels"]["release"] for thing in monitored} == {"kube-prometheus-stack"}


def test_the_monitors_find_a_step_that_trains_and_the_pods_of_a_job(rendered: dict[str, list[Object]]) -> None:
    from esvit_core.launch.pod_metadata import METRICS_LABEL, METRICS_PORT, pod_labels

    monitors = {m["metadata"]["name"]: m["spec"] for m in of_kind(rendered["onprem"], "PodMonitor")}
    pods = {
        "esvit-step": pod_labels("step", **{METRICS_LABEL: "true"}),
        "esvit-trainer": pod_labels("trainer"),
        "": pod_labels("step"),  # launches a job, or does not train at all
    }
    for name, labels in pods.items():
        found = [m for m, spec in monitors.items() if spec["selector"]["matchLabels"].items() <= labels.items()]
        assert found == [name][: bool(name)]
    (endpoint,) = monitors["esvit-step"]["podMetricsEndpoints"]
    (address,) = [r for r in endpoint["relabelings"] if r.get("targetLabel") == "__address__"]
    assert address["replacement"] == f"$1:{METRICS_PORT}"
