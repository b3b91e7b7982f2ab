"""Client of the Kubernetes API for launching a training, with errors that say what to do."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from esvit_core.errors import InfrastructureError, UserError

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
DEFAULT_NAMESPACE = "esvit"
TIMEOUT_SECONDS = 30.0  # of a request; log streams have their own
# Set by KFP in its steps' pods; elsewhere by the downward API.
POD_NAME_VARIABLES = ("KFP_POD_NAME", "ESVIT_POD_NAME")


class UnreachableError(InfrastructureError):
    """The API did not answer, or answered with a temporary error: try again."""


class ForbiddenError(UserError):
    """The service account lacks a permission."""


class State(Enum):
    """The state of a job, for any scheduler."""

    WAITING = "waiting"
    RUNNING = "running"
    RESTARTING = "restarting"
    ENDING = "ending"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self in (State.SUCCEEDED, State.FAILED, State.CANCELLED)


@dataclass(frozen=True)
class Kind:
    """A kind of API object.

    Attributes:
        group, version, plural: as in its URL.
        name: for messages.
        needs: what has to be installed for the kind to exist, if it is not built into Kubernetes.
    """

    group: str
    version: str
    plural: str
    name: str
    needs: str = ""


POD, POD_LOG, EVENT = (
    Kind("", "v1", plural, name) for plural, name in (("pods", "pod"), ("pods/log", "log"), ("events", "event"))
)


class Cluster:
    """The objects of one namespace.

    Args:
        namespace: None: the namespace of the pod in which this runs, otherwise ``esvit``.
    """

    def __init__(self, namespace: str | None = None) -> None:
        from kubernetes import client

        configuration = _configuration()
        configuration.retries = 2
        api = client.ApiClient(configuration)
        self.objects = client.CustomObjectsApi(api)
        self.core = client.CoreV1Api(api)
        self.client = api
        self.namespace = namespace or own_namespace() or DEFAULT_NAMESPACE

    def create(self, kind: Kind, body: dict[str, Any]) -> bool:
        """Create an object; return False if an object of that name exists."""
        with _api_errors(f"create the {kind.name} {body['metadata']['name']}", self.namespace, kind, "create"):
            try:
                self.objects.create_namespaced_custom_object(
                    kind.group, kind.version, self.namespace, kind.plural, body, _request_timeout=TIMEOUT_SECONDS
                )
            except _api_exception() as error:
                if error.status != 409:
                    raise
                return False
        return True

    def get(self, kind: Kind, name: str) -> dict[str, Any] | None:
        """Return the object of that name; None if there is none."""
        with _api_errors(f"read the {kind.name} {name}", self.namespace, kind, "get"):
            try:
                return self.objects.get_namespaced_custom_object(
                    kind.group, kind.version, self.namespace, kind.plural, name, _request_timeout=TIMEOUT_SECONDS
                )
            except _api_exception() as error:
                # For a kind that is not installed the server answers "page not found" without a Status object.
                if error.status == 404 and _status(error).get("kind") == "Status":
                    return None
                raise

    def delete(self, kind: Kind, name: str) -> None:
        """Delete the object and its dependents; pods get their grace period."""
        with _api_errors(f"delete the {kind.name} {name}", self.namespace, kind, "delete"):
            try:
                self.objects.delete_namespaced_custom_object(
                    kind.group,
                    kind.version,
                    self.namespace,
                    kind.plural,
                    name,
                    propagation_policy="Background",
                    _request_timeout=TIMEOUT_SECONDS,
                )
            except _api_exception() as error:
                if error.status != 404:
                    raise

    def patch_metadata(self, kind: Kind, name: str, metadata: dict[str, Any]) -> None:
        """Patch parts of the object's metadata, such as its owner or an annotation."""
        with _api_errors(f"change the metadata of the {kind.name} {name}", self.namespace, kind, "patch"):
            self.objects.patch_namespaced_custom_object(
                kind.group,
                kind.version,
                self.namespace,
                kind.plural,
                name,
                {"metadata": metadata},
                _request_timeout=TIMEOUT_SECONDS,
            )

    def pods(self, selector: str) -> list[dict[str, Any]]:
        """List the pods that match a label selector, as plain dictionaries."""
        with _api_errors("list pods", self.namespace, POD, "list"):
            found = self.core.list_namespaced_pod(
                self.namespace, label_selector=selector, _request_timeout=TIMEOUT_SECONDS
            )
            return [self.client.sanitize_for_serialization(pod) for pod in found.items]

    def events(self, name: str) -> list[str]:
        """List the messages of the Kubernetes events of an object, the newest last."""
        with _api_errors("list events", self.namespace, EVENT, "list"):
            found = self.core.list_namespaced_event(
                self.namespace, field_selector=f"involvedObject.name={name}", _request_timeout=TIMEOUT_SECONDS
            ).items
        found.sort(key=lambda event: str(event.last_timestamp or event.event_time or ""))
        return [" ".join((event.message or "").split()) for event in found]

    def log(self, pod: str, seconds: float) -> Any:
        """Return the stream of a pod's log, each line with its time.

        Args:
            pod: name of the pod.
            seconds: how far to go back.
        """
        with _api_errors(f"read the log of pod {pod}", self.namespace, POD_LOG, "get"):
            return self.core.read_namespaced_pod_log(
                pod,
                self.namespace,
                follow=True,
                timestamps=True,
                since_seconds=max(1, round(seconds)),
                _preload_content=False,
                _request_timeout=(TIMEOUT_SECONDS, 300.0),
            )

    def owner(self) -> dict[str, Any] | None:
        """Return an owner reference for a job: the workflow of the pod in which this runs, or the pod if it has none.

        A job that belongs to the workflow outlives an evicted pod: Argo restarts the step, which finds the job.

        Returns:
            None outside a pod, or if the pod is in another namespace.
        """
        name = self._own_pod()
        metadata = self._pod_metadata(name) if name else None
        if metadata is None:
            return None
        for ref in metadata.owner_references or []:
            if ref.controller:
                return {"apiVersion": ref.api_version, "kind": ref.kind, "name": ref.name, "uid": ref.uid}
        return {"apiVersion": "v1", "kind": "Pod", "name": name, "uid": metadata.uid}

    def own_pod_deleted(self) -> bool:
        """Return whether the pod in which this runs is being deleted, as by an eviction; another pod continues its run."""
        if (name := self._own_pod()) is None:
            return False
        metadata = self._pod_metadata(name)
        return metadata is None or metadata.deletion_timestamp is not None

    def _own_pod(self) -> str | None:
        """Return the name of the pod in which this runs; None outside a pod, or if its namespace differs."""
        if "KUBERNETES_SERVICE_HOST" not in os.environ or own_namespace() != self.namespace:
            return None
        return next((os.environ[v] for v in POD_NAME_VARIABLES if os.environ.get(v)), socket.gethostname())

    def _pod_metadata(self, pod: str) -> Any:
        """Return the metadata of a pod; None if there is none of that name (it was deleted without grace)."""
        with _api_errors(f"read pod {pod}", self.namespace, POD, "get"):
            try:
                return self.core.read_namespaced_pod(pod, self.namespace, _request_timeout=TIMEOUT_SECONDS).metadata
            except _api_exception() as error:
                if error.status == 404:
                    return None
                raise


def own_namespace() -> str | None:
    """Return the namespace of the pod in which this runs; None outside a pod."""
    try:
        return NAMESPACE_FILE.read_text(encoding="ascii").strip() or None
    except OSError:
        return None


def _configuration() -> Any:
    from kubernetes import client, config

    configuration = client.Configuration()
    try:
        config.load_incluster_config(client_configuration=configuration)
    except config.ConfigException:
        try:
            # The library itself reads the variable only once, when it is imported.
            config.load_kube_config(os.environ.get("KUBECONFIG") or None, client_configuration=configuration)
        except (config.ConfigException, OSError) as error:
            raise UserError(
                f"launch.scheduler: no Kubernetes cluster is configured ({error}); run this step in a pod with a service "
                "account, set KUBECONFIG, or use launch.scheduler=local"
            ) from None
    return configuration


def _api_exception() -> Any:
    from kubernetes.client.rest import ApiException

    return ApiException


def _status(error: Any) -> dict[str, Any]:
    try:
        value = json.loads(error.body)
    except (TypeError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


@contextlib.contextmanager
def _api_errors(action: str, namespace: str, kind: Kind, verb: str) -> Iterator[None]:
    """Translate the client's exceptions into :class:`UserError` or :class:`UnreachableError`."""
    import urllib3
    from kubernetes.client.rest import ApiException

    try:
        yield
    except urllib3.exceptions.HTTPError as error:
        raise UnreachableError(f"could not {action}: {error}") from None
    except ApiException as error:
        status, message = int(error.status or 0), " ".join(str(_status(error).get("message", "")).split())
        if status in (0, 429) or status >= 500:
            raise UnreachableError(f"could not {action}: the API answered {status} {message}".rstrip()) from None
        error_class = ForbiddenError if status == 403 else UserError
        resource = f"{kind.plural}.{kind.group}".rstrip(".")
        if status == 401:
            reason = (
                "the API refused the token; expected that of a service account, or a kubeconfig that is still valid"
            )
        elif status == 403:
            reason = f"{message or 'forbidden'}; the step's service account needs the verb {verb} on {resource}"
        elif status == 404 and kind.needs:
            reason = f"the cluster does not know {resource}; install {kind.needs}"
        else:
            reason = message or f"the API answered {status}"
        raise error_class(f"launch: could not {action} in namespace {namespace}: {reason}") from None


def iter_lines(response: Any) -> Iterator[str]:
    """Yield the lines of a log as they arrive, until the stream ends for any reason."""
    import urllib3

    rest = b""
    try:
        for chunk in response.stream(amt=None, decode_content=False):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield line.decode(errors="replace")
    except (
        urllib3.exceptions.HTTPError,
        OSError,
        ValueError,
        AttributeError,
    ):  # AttributeError: another thread closed it
        pass
    if rest:
        yield rest.decode(errors="replace")
