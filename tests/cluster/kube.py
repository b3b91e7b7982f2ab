"""kubectl for the tests: objects as dictionaries, waiting with a reason, and port-forwards that come back."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")
KUBECTL = str(Path(sys.executable).with_name("kubectl"))


class KubectlError(AssertionError):
    """kubectl ended with an error."""


class Kube:
    """A namespace of the cluster that the kubeconfig names."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace

    def run(self, *arguments: str, text: str | None = None, seconds: float = 120) -> str:
        """Run kubectl in the namespace; its standard output.

        Raises:
            KubectlError: it ended with an error.
        """
        done = subprocess.run(
            [KUBECTL, "--namespace", self.namespace, *arguments],
            input=text,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        if done.returncode:
            raise KubectlError(f"kubectl {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def get(self, kind: str, name: str) -> dict[str, Any] | None:
        """An object, or None."""
        found = self.run("get", kind, name, "--ignore-not-found", "-o", "json")
        return json.loads(found) if found.strip() else None

    def list(self, kind: str, selector: str = "", *, everywhere: bool = False) -> list[dict[str, Any]]:
        """The objects of a kind that carry the labels of the selector."""
        more = ["--all-namespaces"] if everywhere else []
        found = self.run("get", kind, *(["-l", selector] if selector else []), *more, "-o", "json")
        items: list[dict[str, Any]] = json.loads(found)["items"]
        return items

    def has(self, kind: str) -> bool:
        """Whether the cluster knows a kind, such as ``jobs.batch.volcano.sh``."""
        with contextlib.suppress(KubectlError):
            self.run("get", kind, "--ignore-not-found")
            return True
        return False

    def apply(self, *objects: dict[str, Any]) -> str:
        """Apply objects."""
        return self.run("apply", "-f", "-", text=yaml.safe_dump_all(objects))

    def pods(self, selector: str, phase: str | None = "Running") -> list[dict[str, Any]]:
        """Pods with the labels of the selector in a phase that are not being deleted; None: in any phase."""
        return [
            pod
            for pod in self.list("pods", selector)
            if phase is None or (pod["status"].get("phase") == phase and "deletionTimestamp" not in pod["metadata"])
        ]

    def logs(self, pod: str) -> str:
        """The log of a pod's container that does the work, as far as it can be had; of a step's pod Argo says which."""
        with contextlib.suppress(KubectlError):
            return self.run("logs", pod)
        return ""

    def delete_pod(self, pod: dict[str, Any], *, force: bool = False) -> None:
        """Delete a pod, with its grace period or without."""
        more = ["--grace-period=0", "--force"] if force else []
        self.run("delete", "pod", pod["metadata"]["name"], "--wait=false", *more)


def wait_for(what: str, look: Callable[[], T | None], seconds: float, every: float = 3.0) -> T:
    """Look again and again until something is there.

    Raises:
        AssertionError: it has not come in time.
    """
    end = time.monotonic() + seconds
    while True:
        found = None
        with contextlib.suppress(KubectlError, OSError):  # the API server may be away; this is what some tests do
            found = look()
        if found:
            return found
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(every)


@contextlib.contextmanager
def forwarded(kube: Kube, target: str, port: int) -> Iterator[int]:
    """Forward a local port to a service, again whenever the connection is lost; the local port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        local = free.getsockname()[1]
    over = threading.Event()
    current: list[subprocess.Popen[bytes]] = []

    def keep() -> None:
        while not over.is_set():
            command = [KUBECTL, "-n", kube.namespace, "port-forward", target, f"{local}:{port}"]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            current[:] = [process]
            while process.poll() is None and not over.wait(0.2):
                pass
            process.kill()
            process.wait()
            over.wait(0.5)

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        wait_for(f"a connection to {target}", lambda: _open(local), 90, every=0.3)
        yield local
    finally:
        over.set()
        thread.join(10)


def _open(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
