"""The connection to a Kubeflow Pipelines server: address, credentials, and readable errors.

Address, token and certificate are checked with one request without retries before KFP's own client is created: that
client retries a wrong address for half a minute, and fails with a traceback.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esvit_core.errors import InfrastructureError, UserError

if TYPE_CHECKING:
    import kfp

IN_CLUSTER = "http://ml-pipeline.kubeflow.svc.cluster.local:8888"
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
# Kubernetes mounts the token with KFP's audience here, if the pod requests one.
TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")
HEALTH = "/apis/v2beta1/healthz"
OLD_HEALTH = "/apis/v1beta1/healthz"
_SECONDS = (5, 20)  # to connect, to read
_PAGE = 100


@dataclass(frozen=True)
class Server:
    """Address of Kubeflow Pipelines and the credentials; in a pod, defaults for None are found there.

    Args:
        host: address of its API.
        namespace: the user's namespace, if the server has one per user.
        token_file: file with the token.
        ca_file: CA certificate of the server.
        cookie: session cookie, if the server is behind a login page.
        ui: base address of links; None: ``host``.
    """

    host: str | None = None
    namespace: str | None = None
    token_file: Path | None = None
    ca_file: Path | None = None
    cookie: str | None = None
    ui: str | None = None


@dataclass(frozen=True)
class Connection:
    """A connection to a server that has answered.

    Attributes:
        client: KFP's client.
        host: address of the API.
        namespace: the user's namespace; None if the server has a single one.
        ui: base address of links.
        server: the address and credentials that were given.
        release: version of Kubeflow Pipelines that the server reports, such as ``2.16.1``; empty if it reports none.
    """

    client: kfp.Client
    host: str
    namespace: str | None
    ui: str
    server: Server
    release: str = ""

    @property
    def restarts_lost_pods(self) -> bool:
        """Whether its retries restart lost pods, and nothing else: true since version 2.17, and assumed if unknown."""
        version = re.match(r"v?(\d+)\.(\d+)", self.release)
        return version is None or (int(version[1]), int(version[2])) >= (2, 17)

    def api(self) -> Any:
        """Return the generated API client, for requests that ``kfp.Client`` lacks; a context manager that closes it."""
        return _client(self.host, _token(self.server), self.server)

    def request(self, method: str, path: str, body: Any = None, base: str | None = None) -> bytes:
        """Send one request directly, without retries.

        The token is read from its file each time, since Kubernetes renews it there within the hour.

        Args:
            method: ``GET`` or ``POST``.
            path: path below the host, such as ``/apis/v1beta1/runs/<id>``.
            body: body of the request, sent as JSON.
            base: another address than the host; it gets the token too.

        Returns:
            The body of the response.

        Raises:
            urllib3.exceptions.HTTPError: the server does not answer.
            kfp_server_api.ApiException: the server refuses the request.
        """
        with self.api() as api:
            headers = _headers(api, "application/json, text/plain")
            url = (base or self.host) + path
            response = api.request(method, url, headers=headers, body=body, _request_timeout=_SECONDS)
        return response.data if isinstance(response.data, bytes) else str(response.data).encode()

    def link(self, kind: str, name: str) -> str:
        """Return the address of a page; ``kind`` is ``runs``, ``recurringrun`` or ``pipelines``."""
        return f"{self.ui}/#/{kind}/details/{name}"


@contextlib.contextmanager
def connected(server: Server) -> Iterator[Connection]:
    """Connect to a server, and turn its errors within the block into one-line errors.

    Raises:
        UserError: the server is too old, or it refuses the token or a request.
        InfrastructureError: it does not answer, or it fails.
    """
    host = _host(server)
    if server.ca_file is not None and not server.ca_file.is_file():
        raise UserError(f"--ca-file {server.ca_file}: no such file; expected a PEM file with the CA certificate")
    token = _token(server)
    with translate_errors(host, token is not None):
        namespace, release = _check_server(host, token, server)
        import kfp

        quiet = warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO())
        with quiet[0], quiet[1]:  # it warns of beta versions, and prints its own links
            warnings.simplefilter("ignore")
            client = kfp.Client(
                host=host,
                namespace=namespace or "kubeflow",
                credentials=None if token is None else _RenewedToken(server),
                cookies=server.cookie,
                ssl_ca_cert=str(server.ca_file) if server.ca_file else None,
            )
        yield Connection(client, host, namespace, (server.ui or host).rstrip("/"), server, release)


@contextlib.contextmanager
def translate_errors(host: str, with_token: bool) -> Iterator[None]:
    """Turn the exceptions of KFP's client within the block into one-line errors."""
    import kfp_server_api
    from urllib3.exceptions import HTTPError

    try:
        yield
    except (kfp_server_api.ApiException, HTTPError) as error:
        family = UserError if 400 <= (getattr(error, "status", None) or 0) < 500 else InfrastructureError
        raise family(f"{host}: {describe_error(error, with_token)}") from None


def describe_error(error: Exception, with_token: bool) -> str:
    """Return what an exception of KFP's client means, and what to do."""
    import kfp_server_api

    if isinstance(error, kfp_server_api.ApiException):
        return _describe_refusal(error, with_token)
    return _connection_problem(getattr(error, "reason", None) or error)


def server_message(error: Any) -> str:
    """Return the server's own error message, shortened."""
    return _server_text(error).removeprefix(": ") or f"status {error.status}"


def experiment_id(connection: Connection, name: str, create: bool) -> str:
    """Return the id of an experiment.

    Args:
        create: create it if it does not exist.

    Raises:
        UserError: it does not exist.
    """
    known = {e.display_name: e.experiment_id for e in experiments(connection)}
    if name in known:
        return str(known[name])
    if not create:
        names = ", ".join(sorted(known)) or "none"
        raise UserError(
            f"experiment {name}: it does not exist at {connection.host} (experiments: {names}); "
            "add --new-experiment to create it"
        )
    with contextlib.redirect_stdout(io.StringIO()):
        created = connection.client.create_experiment(name, namespace=connection.namespace)
    return str(created.experiment_id)


def experiments(connection: Connection) -> list[Any]:
    """List all experiments of the namespace."""

    def page(token: str) -> Any:
        return connection.client.list_experiments(
            page_token=token, page_size=_PAGE, namespace=connection.namespace or ""
        )

    return list(pages(page, "experiments"))


def pages(page: Callable[[str], Any], key: str) -> Iterator[Any]:
    """Iterate over the items of a paginated list.

    Args:
        page: returns the page of a token; the first token is empty.
        key: attribute of a page that holds the items.
    """
    token = ""
    while True:
        response = page(token)
        yield from getattr(response, key) or []
        token = response.next_page_token or ""
        if not token:
            return


def _host(server: Server) -> str:
    host = server.host or (IN_CLUSTER if SERVICE_ACCOUNT.is_dir() else None)
    if host is None:
        raise UserError(
            "no Kubeflow Pipelines server is given; add --host https://..., or set KF_PIPELINES_ENDPOINT "
            "(for a cluster that kubectl reaches: kubectl -n kubeflow port-forward svc/ml-pipeline 8888, and "
            "--host http://localhost:8888; without a cluster: esvit run, status, logs)"
        )
    if not host.startswith(("http://", "https://")):
        raise UserError(f"--host {host}: expected an address that starts with http:// or https://")
    return host.rstrip("/")


def _token(server: Server) -> str | None:
    """Read the token from its file; on a command line, other users of the machine would see it."""
    file = server.token_file or (TOKEN if TOKEN.is_file() and server.host is None else None)
    if file is None:
        return None
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text file"
        raise UserError(f"--token-file {file}: cannot be read ({reason})") from None
    if not token or len(token.split()) != 1:
        raise UserError(f"--token-file {file}: expected a file with a token and nothing else")
    return token


class _RenewedToken:
    """Token for KFP's client, read before each request: waiting for a run may outlast a token."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def refresh_api_key_hook(self, configuration: Any) -> None:
        configuration.api_key["authorization"] = _token(self._server)


def _check_server(host: str, token: str | None, server: Server) -> tuple[str | None, str]:
    """Check that a KFP server answers, and return the namespace to work in and the server's version."""
    import kfp_server_api

    with _client(host, token, server) as api:
        try:
            health = _json(api, HEALTH)
        except kfp_server_api.ApiException as error:
            if error.status != 404:
                raise
            with contextlib.suppress(kfp_server_api.ApiException):
                if _json(api, OLD_HEALTH) is not None:
                    raise UserError(
                        f"{host}: the server is Kubeflow Pipelines 1 (only {OLD_HEALTH} answers); expected version 2; "
                        "upgrade the server, or give the address of another one with --host"
                    ) from None
            raise UserError(
                f"{host}: the server is not Kubeflow Pipelines ({HEALTH}: 404); check --host: "
                "behind Kubeflow's gateway the address ends with /pipeline"
            ) from None
    if health is None:
        raise UserError(
            f"{host}: the server answers with a web page, probably a login page; give --token-file, or the session "
            "cookie in ESVIT_KFP_COOKIE; or append /pipeline to the address"
        )
    return _namespace(host, server, bool(health.get("multi_user"))), str(health.get("tag_name", ""))


def _namespace(host: str, server: Server, several: bool) -> str | None:
    if server.namespace is not None or not several:
        return server.namespace
    try:
        return (SERVICE_ACCOUNT / "namespace").read_text(encoding="utf-8").strip()
    except OSError:
        raise UserError(f"{host}: the server has one namespace per user; give yours with --namespace") from None


def _client(host: str, token: str | None, server: Server) -> Any:
    """Create the generated API client, without retries."""
    import kfp_server_api

    settings = kfp_server_api.Configuration(host=host)
    settings.retries = False
    if server.ca_file:
        settings.ssl_ca_cert = str(server.ca_file)
    if token:
        settings.api_key["authorization"], settings.api_key_prefix["authorization"] = token, "Bearer"
    return kfp_server_api.ApiClient(settings, cookie=server.cookie)


def _headers(api: Any, accept: str) -> dict[str, str]:
    headers = {"Accept": accept}
    if token := api.configuration.get_api_key_with_prefix("authorization"):
        headers["authorization"] = token
    if api.cookie:
        headers["Cookie"] = api.cookie
    return headers


def _json(api: Any, path: str) -> dict[str, Any] | None:
    """Return the JSON object that the server sends for a path; None if it sends something else."""
    headers = _headers(api, "application/json")
    # call_api fails with another exception when TLS cannot be established.
    response = api.request("GET", api.configuration.host + path, headers=headers, _request_timeout=_SECONDS)
    try:
        value = json.loads(response.data)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _describe_refusal(error: Any, with_token: bool) -> str:
    """Return the meaning of a refusal, and what to do."""
    if not error.status:  # TLS could not be established
        return _connection_problem(error.reason)
    text = _server_text(error)
    if error.status == 401:
        problem = "it rejects the token" if with_token else "it requires a token"
        return f"{problem} (401{text}); create one (kubectl create token ...) and give its file with --token-file"
    if error.status == 403:
        return f"it does not permit this (403{text}); check --namespace and the permissions of the account"
    if error.status == 404:
        return f"it does not exist (404{text}); check the name or id"
    return f"it refused the request ({error.status}{text})"


def _server_text(error: Any) -> str:
    """Return the server's own error message, shortened, after a colon; empty if there is none."""
    body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else str(error.body or "")
    try:
        value = json.loads(body)
        text = str(value.get("message") or value.get("error") or "")
    except (ValueError, AttributeError):
        text = "" if "<" in body[:200] else body
    text = " ".join(text.split())
    return f": {text[:300]}" if text else ""


def _connection_problem(reason: Any) -> str:
    text = " ".join(str(reason).split())
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return "its certificate is not signed by a known CA; give the CA certificate with --ca-file"
    if "WRONG_VERSION_NUMBER" in text or "record layer" in text:
        return "it does not use https; give --host http://..."
    if "getaddrinfo" in text or "Name or service" in text or "name resolution" in text:
        return "the host does not exist; check --host"
    if "timed out" in text:
        return "it does not answer in time; check --host, and proxies and firewalls on the way"
    short = text.rpartition(": ")[2].strip("'\")( ")
    return f"it does not answer ({short}); check --host"
