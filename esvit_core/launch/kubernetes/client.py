"""The Kubernetes API, as far as the launch of a training needs it, with errors that a person can act on."""

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
TIMEOUT_SECONDS = 30.0  # of a request; the stream of a log has its own
# Set by KFP in its steps' pods; elsewhere by the downward API.
POD_NAME_VARIABLES = ("KFP_POD_NAME", "ESVIT_POD_NAME")


class UnreachableError(InfrastructureError):
    """The API did not answer, or could not: to be asked again."""


class ForbiddenError(UserError):
    """The service account lacks a right."""


class State(Enum):
    """Where a job is, whoever runs it."""

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
    """A kind of object of the API.

    Attributes:
        group, version, plural: as in its address.
        name: for people.
        needs: what has to be installed for it to exist, where it is not Kubernetes' own.
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
        namespace: None: that of the pod in which this runs, else ``esvit``.
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
        """Create an object; False when there is one of that name."""
        with _told(f"create the {kind.name} {body['metadata']['name']}", self.namespace, kind, "create"):
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
        """The object of that name, None when there is none."""
        with _told(f"read the {kind.name} {name}", self.namespace, kind, "get"):
            try:
                return self.objects.get_namespaced_custom_object(
                    kind.group, kind.version, self.namespace, kind.plural, name, _request_timeout=TIMEOUT_SECONDS
                )
            except _api_exception() as error:
                # Of a kind that is not installed the server says "page not found", in no object of the API's.
                if error.status == 404 and _status(error).get("kind") == "Status":
                    return None
                raise

    def delete(self, kind: Kind, name: str) -> None:
        """Delete the object and what belongs to it; its pods get the grace that they ask for."""
        with _told(f"delete the {kind.name} {name}", self.namespace, kind, "delete"):
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
        """Replace these parts of the object's metadata, such as its owner or an annotation."""
        with _told(f"change the metadata of the {kind.name} {name}", self.namespace, kind, "patch"):
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
        """The pods with these labels, as plain dictionaries."""
        with _told("list pods", self.namespace, POD, "list"):
            found = self.core.list_namespaced_pod(
                self.namespace, label_selector=selector, _request_timeout=TIMEOUT_SECONDS
            )
            return [self.client.sanitize_for_serialization(pod) for pod in found.items]

    def events(self, name: str) -> list[str]:
        """What the cluster's parts have said of an object, the latest last."""
        with _told("list events", self.namespace, EVENT, "list"):
            found = self.core.list_namespaced_event(
                self.namespace, field_selector=f"involvedObject.name={name}", _request_timeout=TIMEOUT_SECONDS
            ).items
        found.sort(key=lambda event: str(event.last_timestamp or event.event_time or ""))
        return [" ".join((event.message or "").split()) for event in found]

    def log(self, pod: str, seconds: float) -> Any:
        """The stream of a pod's log, each line with its time.

        Args:
            pod: its name.
            seconds: how far to go back.
        """
        with _told(f"read the log of pod {pod}", self.namespace, POD_LOG, "get"):
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
        """A reference to what a job ends with: the workflow of the pod in which this runs, or the pod, if it has none.

        A job of the workflow outlives a pod that is evicted: Argo starts the step again, which finds the job.

        Returns:
            None outside of a pod, or where the pod is in another namespace.
        """
        name = self._own_pod()
        found = self._metadata_of(name) if name else None
        if found is None:
            return None
        for one in found.owner_references or []:
            if one.controller:
                return {"apiVersion": one.api_version, "kind": one.kind, "name": one.name, "uid": one.uid}
        return {"apiVersion": "v1", "kind": "Pod", "name": name, "uid": found.uid}

    def leaving(self) -> bool:
        """Whether the pod in which this runs is being deleted, as by an eviction; its run goes on in another pod."""
        if (name := self._own_pod()) is None:
            return False
        found = self._metadata_of(name)
        return found is None or found.deletion_timestamp is not None

    def _own_pod(self) -> str | None:
        """The name of the pod in which this runs; None outside of one, or where it is in another namespace."""
        if "KUBERNETES_SERVICE_HOST" not in os.environ or own_namespace() != self.namespace:
            return None
        return next((os.environ[v] for v in POD_NAME_VARIABLES if os.environ.get(v)), socket.gethostname())

    def _metadata_of(self, pod: str) -> Any:
        """The metadata of a pod, None when there is none of that name (it was deleted without grace)."""
        with _told(f"read pod {pod}", self.namespace, POD, "get"):
            try:
                return self.core.read_namespaced_pod(pod, self.namespace, _request_timeout=TIMEOUT_SECONDS).metadata
            except _api_exception() as error:
                if error.status == 404:
                    return None
                raise


def own_namespace() -> str | None:
    """That of the pod in which this runs."""
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
            # The variable is named here: the library reads it once, when it is imported.
            config.load_kube_config(os.environ.get("KUBECONFIG") or None, client_configuration=configuration)
        except (config.ConfigException, OSError) as error:
            raise UserError(
                f"launch.scheduler: no Kubernetes cluster is known here ({error}); run this step in a pod with a service "
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
def _told(doing: str, namespace: str, kind: Kind, verb: str) -> Iterator[None]:
    """Turn what the client raises into :class:`UserError` or :class:`UnreachableError`."""
    import urllib3
    from kubernetes.client.rest import ApiException

    try:
        yield
    except urllib3.exceptions.HTTPError as error:
        raise UnreachableError(f"could not {doing}: {error}") from None
    except ApiException as error:
        status, says = int(error.status or 0), " ".join(str(_status(error).get("message", "")).split())
        if status in (0, 429) or status >= 500:
            raise UnreachableError(f"could not {doing}: the API answered {status} {says}".rstrip()) from None
        family = ForbiddenError if status == 403 else UserError
        resource = f"{kind.plural}.{kind.group}".rstrip(".")
        if status == 401:
            why = "the API refused the token; expected that of a service account, or a kubeconfig that is still valid"
        elif status == 403:
            why = f"{says or 'forbidden'}; the step's service account needs the verb {verb} on {resource}"
        elif status == 404 and kind.needs:
            why = f"the cluster does not know {resource}; install {kind.needs}"
        else:
            why = says or f"the API answered {status}"
        raise family(f"launch: could not {doing} in namespace {namespace}: {why}") from None


def each_line(response: Any) -> Iterator[str]:
    """The lines of a log as they come; ends with the stream, however that ends."""
    import urllib3

    left = b""
    try:
        for piece in response.stream(amt=None, decode_content=False):
            *lines, left = (left + piece).split(b"\n")
            for line in lines:
                yield line.decode(errors="replace")
    except (urllib3.exceptions.HTTPError, OSError, ValueError, AttributeError):  # the latter: closed by another thread
        pass
    if left:
        yield left.decode(errors="replace")
