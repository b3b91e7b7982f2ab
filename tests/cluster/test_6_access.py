"""Who reaches whom, and a namespace of its own with quotas in a multi-user Kubeflow."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster_settings import Settings
from evidence import Saw
from kube import Kube, wait_for

#: Labels of a pod that is looked at as ours, by the name that the report uses.
KINDS = {
    "step": {"app.kubernetes.io/name": "esvit", "app.kubernetes.io/component": "step"},
    "trainer": {"app.kubernetes.io/name": "esvit", "app.kubernetes.io/component": "trainer"},
    "stranger": {"app": "stranger"},
}
CONNECT = (
    "import socket, sys\n"
    "for target in sys.argv[1:]:\n"
    "    host, _, port = target.rpartition(':')\n"
    "    try:\n"
    "        socket.create_connection((host, int(port)), timeout=4).close()\n"
    "        print(target, 'open')\n"
    "    except OSError as error:\n"
    "        print(target, 'closed')\n"
)
LISTEN = (
    "import socketserver, threading, time\n"
    "for port in (29500, 9400, 2222):\n"
    "    server = socketserver.ThreadingTCPServer(('', port), socketserver.BaseRequestHandler)\n"
    "    threading.Thread(target=server.serve_forever, daemon=True).start()\n"
    "time.sleep(900)\n"
)


@pytest.fixture(scope="module")
def probes(kube: Kube, settings: Settings) -> Iterator[dict[str, dict]]:
    """A pod of each kind, which listens and from which connections are tried."""

    def pod(name: str, labels: dict[str, str]) -> dict:
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": f"probe-{name}", "labels": {**labels, "probe": name}},
            "spec": {
                "automountServiceAccountToken": False,
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": 1,
                "securityContext": {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}},
                "containers": [
                    {
                        "name": "main",
                        "image": settings.image,
                        "imagePullPolicy": "IfNotPresent",
                        "command": ["python", "-c", LISTEN],
                        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                    }
                ],
            },
        }  # fmt: skip

    names = {**KINDS, "trainer-2": KINDS["trainer"]}
    kube.run("delete", "pod", "-l", "probe", "--ignore-not-found", "--wait=true", seconds=180)
    kube.apply(*(pod(name, labels) for name, labels in names.items()))
    kube.run("wait", "--for=condition=Ready", "pod", "-l", "probe", "--timeout=180s", seconds=200)
    yield {p["metadata"]["labels"]["probe"]: p for p in kube.list("pods", "probe")}
    kube.run("delete", "pod", "-l", "probe", "--wait=false")


def reached(kube: Kube, pod: dict, *targets: str) -> set[str]:
    """The targets that a connection from the pod reaches."""
    message = kube.run("exec", pod["metadata"]["name"], "-c", "main", "--", "python", "-c", CONNECT, *targets)
    return {line.split()[0] for line in message.splitlines() if line.endswith("open")}


def test_network_policies(kube: Kube, settings: Settings, probes: dict[str, dict], saw: Saw) -> None:
    """Allowed pairs are reached and forbidden ones are not."""
    space = settings.namespace
    address = {name: pod["status"]["podIP"] for name, pod in probes.items()}
    store, kfp = f"esvit-object-store.{space}.svc:8333", f"ml-pipeline.{space}.svc:8888"
    api = "kubernetes.default.svc:443"
    allowed = {
        "step": {store, kfp, api},
        "trainer": {store, f"{address['trainer-2']}:29500", f"{address['trainer-2']}:2222"},
    }
    forbidden = {
        "step": {f"{address['trainer']}:29500", f"esvit-object-store.{space}.svc:9327"},
        "trainer": {kfp, api, f"{address['step']}:2222"},
        "stranger": {store, f"{address['trainer']}:29500", f"{address['step']}:9400"},
    }
    wait_for("the policies to be in force", lambda: reached(kube, probes["step"], store) or None, 60)
    for name, targets in allowed.items():
        missing = targets - reached(kube, probes[name], *sorted(targets))
        saw(f"{name} reaches {', '.join(sorted(targets))}")
        assert not missing, f"{name} does not reach {missing}"
    for name, targets in forbidden.items():
        open_ = reached(kube, probes[name], *sorted(targets))
        saw(f"{name} does not reach {', '.join(sorted(targets))}")
        assert not open_, f"{name} reaches {open_}"
