"""The connection to a Kubeflow Pipelines server: where it is, who asks, and what its errors mean.

The address, the token and the certificate are looked at before KFP's own client is made, with one request that does not
wait: that client tries an address that is wrong for half a minute, and tells it with a traceback.
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
# Where Kubernetes puts the token with KFP's audience, if the pod asks for one.
TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")
HEALTH = "/apis/v2beta1/healthz"
OLD_HEALTH = "/apis/v1beta1/healthz"
_SECONDS = (5, 20)  # to connect, to answer
_PAGE = 100


@dataclass(frozen=True)
class Server:
    """Where Kubeflow Pipelines is, and who asks; what is None is found in the pod that this runs in.

    Args:
        host: address of its API.
        namespace: of the user, where the server has several.
        token_file: file with the token.
        ca_file: certificate of the authority that signed the server's.
        cookie: of a session, where a login page stands before the server.
        ui: address that links begin with; None: the host's.
    """

    host: str | None = None
    namespace: str | None = None
    token_file: Path | None = None
    ca_file: Path | None = None
    cookie: str | None = None
    ui: str | None = None


@dataclass(frozen=True)
class Connection:
    """A server that has answered.

    Attributes:
        client: KFP's client.
        host: address of the API.
        namespace: of the user; None where the server has one for all.
        ui: what links begin with.
        server: how it was reached.
        release: version of Kubeflow Pipelines, such as ``2.16.1``, as the server states it; some do not know it.
    """

    client: kfp.Client
    host: str
    namespace: str | None
    ui: str
    server: Server
    release: str = ""

    @property
    def restarts_lost_pods(self) -> bool:
        """Whether its retries start lost pods again, and nothing else: from version 2.17 on; taken for so if unknown."""
        found = re.match(r"v?(\d+)\.(\d+)", self.release)
        return found is None or (int(found[1]), int(found[2])) >= (2, 17)

    def api(self) -> Any:
        """The lower half of KFP's client, for what the upper half does not offer; it closes when its block ends."""
        return _client(self.host, _token(self.server), self.server)

    def ask(self, method: str, path: str, body: Any = None, base: str | None = None) -> bytes:
        """Send one request past KFP's client, and do not repeat it.

        The token is read from its file each time: those that Kubernetes issues are renewed there within the hour.

        Args:
            method: ``GET`` or ``POST``.
            path: below the host, such as ``/apis/v1beta1/runs/<id>``.
            body: sent as JSON.
            base: another address than the host; the token goes there, too.

        Returns:
            The body of the answer.

        Raises:
            urllib3.exceptions.HTTPError: the server does not answer.
            kfp_server_api.ApiException: the server refuses.
        """
        with self.api() as asking:
            headers = _headers(asking, "application/json, text/plain")
            url = (base or self.host) + path
            answer = asking.request(method, url, headers=headers, body=body, _request_timeout=_SECONDS)
        return answer.data if isinstance(answer.data, bytes) else str(answer.data).encode()

    def link(self, kind: str, name: str) -> str:
        """Address of a page: ``kind`` is ``runs`` or ``recurringrun``."""
        return f"{self.ui}/#/{kind}/details/{name}"


@contextlib.contextmanager
def connected(server: Server) -> Iterator[Connection]:
    """Connect, and tell every refusal of the server in one line.

    Raises:
        UserError: the server is too old, it refuses the token, or what it is asked for.
        InfrastructureError: it does not answer, or cannot.
    """
    host = _host(server)
    if server.ca_file is not None and not server.ca_file.is_file():
        raise UserError(f"--ca-file {server.ca_file}: no such file; expected a certificate in PEM form")
    token = _token(server)
    with told(host, token is not None):
        namespace, release = _looked_at(host, token, server)
        import kfp

        quiet = warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO())
        with quiet[0], quiet[1]:  # it tells of beta versions, and prints its own links
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
def told(host: str, with_token: bool) -> Iterator[None]:
    """Turn what KFP's client raises into one line."""
    import kfp_server_api
    from urllib3.exceptions import HTTPError

    try:
        yield
    except (kfp_server_api.ApiException, HTTPError) as error:
        family = UserError if 400 <= (getattr(error, "status", None) or 0) < 500 else InfrastructureError
        raise family(f"{host}: {refusal(error, with_token)}") from None


def refusal(error: Exception, with_token: bool) -> str:
    """What an error of KFP's client means, and what to do."""
    import kfp_server_api

    if isinstance(error, kfp_server_api.ApiException):
        return _refusal(error, with_token)
    return _silence(getattr(error, "reason", None) or error)


def words_of(error: Any) -> str:
    """What the server itself said when it refused, in short."""
    return _message(error).removeprefix(": ") or f"status {error.status}"


def experiment_id(connection: Connection, name: str, create: bool) -> str:
    """The id of an experiment.

    Args:
        create: make it if it is not there.

    Raises:
        UserError: it is not there.
    """
    known = {e.display_name: e.experiment_id for e in experiments(connection)}
    if name in known:
        return str(known[name])
    if not create:
        told = ", ".join(sorted(known)) or "none"
        raise UserError(
            f"experiment {name}: there is none at {connection.host}; it has {told}; --new-experiment makes it"
        )
    with contextlib.redirect_stdout(io.StringIO()):
        made = connection.client.create_experiment(name, namespace=connection.namespace)
    return str(made.experiment_id)


def experiments(connection: Connection) -> list[Any]:
    """All experiments of the namespace."""

    def page(token: str) -> Any:
        return connection.client.list_experiments(
            page_token=token, page_size=_PAGE, namespace=connection.namespace or ""
        )

    return list(pages(page, "experiments"))


def pages(page: Callable[[str], Any], key: str) -> Iterator[Any]:
    """Everything of a list that comes in pages.

    Args:
        page: gives the page of a token, the first one's is empty.
        key: where the things are in a page.
    """
    token = ""
    while True:
        answer = page(token)
        yield from getattr(answer, key) or []
        token = answer.next_page_token or ""
        if not token:
            return


def _host(server: Server) -> str:
    host = server.host or (IN_CLUSTER if SERVICE_ACCOUNT.is_dir() else None)
    if host is None:
        raise UserError(
            "no Kubeflow Pipelines server is named; give --host https://..., or set KF_PIPELINES_ENDPOINT "
            "(of a cluster on this machine: kubectl -n kubeflow port-forward svc/ml-pipeline 8888, and "
            "--host http://localhost:8888; without a cluster: esvit run, status, logs)"
        )
    if not host.startswith(("http://", "https://")):
        raise UserError(f"--host {host}: expected http:// or https:// before it")
    return host.rstrip("/")


def _token(server: Server) -> str | None:
    """Read the token, which is never on a command line: other users of the machine would see it there."""
    file = server.token_file or (TOKEN if TOKEN.is_file() and server.host is None else None)
    if file is None:
        return None
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UserError(f"--token-file {file}: cannot be read ({reason})") from None
    if not token or len(token.split()) != 1:
        raise UserError(f"--token-file {file}: expected a token and nothing else")
    return token


class _RenewedToken:
    """The token for KFP's client, which asks for it before each request: a run may be waited for longer than it lasts."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def refresh_api_key_hook(self, configuration: Any) -> None:
        configuration.api_key["authorization"] = _token(self._server)


def _looked_at(host: str, token: str | None, server: Server) -> tuple[str | None, str]:
    """Ask the server whether it is one, and return the namespace to work in and the server's version."""
    import kfp_server_api

    with _client(host, token, server) as asking:
        try:
            health = _json(asking, HEALTH)
        except kfp_server_api.ApiException as error:
            if error.status != 404:
                raise
            with contextlib.suppress(kfp_server_api.ApiException):
                if _json(asking, OLD_HEALTH) is not None:
                    raise UserError(
                        f"{host}: it is a server of Kubeflow Pipelines 1 (it answers {OLD_HEALTH} only); version 2 is "
                        "needed"
                    ) from None
            raise UserError(
                f"{host}: something answers, but not Kubeflow Pipelines ({HEALTH}: 404); "
                "behind Kubeflow's gateway the address ends with /pipeline"
            ) from None
    if health is None:
        raise UserError(
            f"{host}: it answers with a web page, probably to log in; give --token-file, or the session's cookie in "
            "ESVIT_KFP_COOKIE; or the address lacks /pipeline"
        )
    return _namespace(host, server, bool(health.get("multi_user"))), str(health.get("tag_name", ""))


def _namespace(host: str, server: Server, several: bool) -> str | None:
    if server.namespace is not None or not several:
        return server.namespace
    try:
        return (SERVICE_ACCOUNT / "namespace").read_text(encoding="utf-8").strip()
    except OSError:
        raise UserError(f"{host}: the server has a namespace for each user; give yours with --namespace") from None


def _client(host: str, token: str | None, server: Server) -> Any:
    """The lower half of KFP's client, which asks once and does not wait."""
    import kfp_server_api

    settings = kfp_server_api.Configuration(host=host)
    settings.retries = False
    if server.ca_file:
        settings.ssl_ca_cert = str(server.ca_file)
    if token:
        settings.api_key["authorization"], settings.api_key_prefix["authorization"] = token, "Bearer"
    return kfp_server_api.ApiClient(settings, cookie=server.cookie)


def _headers(asking: Any, accept: str) -> dict[str, str]:
    headers = {"Accept": accept}
    if token := asking.configuration.get_api_key_with_prefix("authorization"):
        headers["authorization"] = token
    if asking.cookie:
        headers["Cookie"] = asking.cookie
    return headers


def _json(asking: Any, path: str) -> dict[str, Any] | None:
    """What the server says at a path; None if that is no JSON."""
    headers = _headers(asking, "application/json")
    # Not by call_api, which stumbles over the errors of a connection that cannot be made safe.
    answer = asking.request("GET", asking.configuration.host + path, headers=headers, _request_timeout=_SECONDS)
    try:
        said = json.loads(answer.data)
    except ValueError:
        return None
    return said if isinstance(said, dict) else None


def _refusal(error: Any, with_token: bool) -> str:
    """What the server said, in words."""
    if not error.status:  # the connection could not be made safe
        return _silence(error.reason)
    said = _message(error)
    if error.status == 401:
        given = "it refuses the token" if with_token else "it asks for a token"
        return f"{given} (401{said}); make one (kubectl create token ...) and give its file with --token-file"
    if error.status == 403:
        return f"it does not allow this (403{said}); look at --namespace and at the rights of the account"
    if error.status == 404:
        return f"there is no such thing (404{said})"
    return f"it refused ({error.status}{said})"


def _message(error: Any) -> str:
    """The server's own words, in short, after a colon."""
    body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else str(error.body or "")
    try:
        said = json.loads(body)
        text = str(said.get("message") or said.get("error") or "")
    except (ValueError, AttributeError):
        text = "" if "<" in body[:200] else body
    text = " ".join(text.split())
    return f": {text[:300]}" if text else ""


def _silence(reason: Any) -> str:
    text = " ".join(str(reason).split())
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return "its certificate is not signed by an authority that is known here; give the authority's with --ca-file"
    if "WRONG_VERSION_NUMBER" in text or "record layer" in text:
        return "it does not speak https; give --host http://..."
    if "getaddrinfo" in text or "Name or service" in text or "name resolution" in text:
        return "there is no such host; look at --host"
    if "timed out" in text:
        return "it does not answer in time; look at --host, and at what stands between"
    short = text.rpartition(": ")[2].strip("'\")( ")
    return f"it does not answer ({short}); look at --host"
