"""Address and credentials of the object store: the ``ESVIT_S3_*`` variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from esvit_core.errors import UserError
from esvit_core.storage import web_identity
from esvit_core.storage.web_identity import WebIdentity

ENDPOINT = "ESVIT_S3_ENDPOINT"
ACCESS_KEY = "ESVIT_S3_ACCESS_KEY"
SECRET_KEY = "ESVIT_S3_SECRET_KEY"
SECURE = "ESVIT_S3_SECURE"
REGION = "ESVIT_S3_REGION"
CA_FILE = "ESVIT_S3_CA_FILE"
# The embedded store sets this for the processes that use it: its data directory, so that they can check its disk.
DISK = "ESVIT_S3_DISK"
VARIABLES = (ENDPOINT, ACCESS_KEY, SECRET_KEY, SECURE, REGION, CA_FILE, DISK, *web_identity.VARIABLES)

_TRUE, _FALSE = frozenset({"1", "true", "yes", "on"}), frozenset({"0", "false", "no", "off"})


@dataclass(frozen=True)
class StoreAddress:
    """An S3 endpoint and its credentials: a key, or a token that is exchanged for temporary credentials.

    Args:
        endpoint: ``host:port``.
        access_key: name of the key; empty with ``identity``.
        secret_key: never included in a repr, a log, or an error.
        secure: whether to use TLS.
        region: None: the region that the server reports for a bucket.
        ca_file: certificates to trust instead of the system's.
        directory: data directory, if the server is this machine's embedded one.
        identity: web identity, used instead of a key.
    """

    endpoint: str
    access_key: str = field(default="", repr=False)
    secret_key: str = field(default="", repr=False)
    secure: bool = True
    region: str | None = None
    ca_file: Path | None = None
    directory: Path | None = None
    identity: WebIdentity | None = None

    @property
    def url(self) -> str:
        """The endpoint as a URL."""
        return f"{'https' if self.secure else 'http'}://{self.endpoint}"

    @classmethod
    def from_env(cls, environment: Mapping[str, str] | None = None) -> StoreAddress:
        """Read the ``ESVIT_S3_*`` variables. A key takes precedence over a web identity token.

        Args:
            environment: environment to read; None: that of the process.

        Raises:
            UserError: a variable is missing or malformed.
        """
        values = os.environ if environment is None else environment
        given = {name: values.get(name, "").strip() for name in VARIABLES}
        if not given[ENDPOINT]:
            raise UserError(f"{ENDPOINT}: not set; expected the address of an S3 object store")
        endpoint, secure = _parse_endpoint(given[ENDPOINT], given[SECURE])
        ca_file = Path(given[CA_FILE]) if given[CA_FILE] else None
        if ca_file is not None and not ca_file.is_file():
            raise UserError(f"{CA_FILE}={ca_file}: no such file; expected CA certificates in PEM form")
        address = cls(
            endpoint=endpoint,
            access_key=given[ACCESS_KEY],
            secret_key=given[SECRET_KEY],
            secure=secure,
            region=given[REGION] or None,
            ca_file=ca_file,
            directory=Path(given[DISK]) if given[DISK] else None,
        )
        missing = [name for name in (ACCESS_KEY, SECRET_KEY) if not given[name]]
        if not missing:
            return address
        token = WebIdentity.from_env(values, address.url, address.region) if len(missing) == 2 else None
        if token is None:
            raise UserError(
                f"{', '.join(missing)}: not set; expected the key of the store {endpoint} in {ACCESS_KEY} and {SECRET_KEY}, "
                f"or in {web_identity.TOKEN_FILE} the path of a token that its STS accepts"
            )
        return replace(address, identity=token)

    def environment(self) -> dict[str, str]:
        """Return the variables from which :meth:`from_env` restores this address, for child processes."""
        values = {
            ENDPOINT: self.endpoint,
            ACCESS_KEY: self.access_key or None,
            SECRET_KEY: self.secret_key or None,
            SECURE: "true" if self.secure else "false",
            REGION: self.region,
            CA_FILE: self.ca_file,
            DISK: self.directory,
        }
        given = {name: str(value) for name, value in values.items() if value is not None}
        return given | (self.identity.environment() if self.identity else {})


def _parse_endpoint(text: str, secure: str) -> tuple[str, bool]:
    scheme, separator, rest = text.partition("://")
    host = (rest if separator else text).rstrip("/")
    if separator and scheme not in ("http", "https"):
        raise UserError(f"{ENDPOINT}={text}: expected host:port, http://host:port or https://host:port")
    if not _is_host(host):
        raise UserError(f"{ENDPOINT}={text}: expected host:port or http(s)://host:port, without a path or a key")
    if secure and secure.lower() not in _TRUE | _FALSE:
        raise UserError(f"{SECURE}={secure}: expected true or false")
    wanted = secure.lower() in _TRUE if secure else None
    if separator and wanted is not None and wanted != (scheme == "https"):
        raise UserError(f"{ENDPOINT}={text} and {SECURE}={secure} contradict each other; leave {SECURE} unset")
    if separator:
        return host, scheme == "https"
    return host, wanted if wanted is not None else True


def _is_host(text: str) -> bool:
    try:
        parts = urlsplit(f"//{text}")
        return (
            bool(parts.hostname)
            and parts.netloc == text.strip() == text
            and not {" ", "@"} & {*text}
            and parts.port != 0
        )
    except ValueError:  # an invalid port
        return False


def pod_variables(keys: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the variables that a pod needs for the store: the required ones, and those with defaults.

    Args:
        keys: whether the pod has a key; otherwise it has a token, which an STS exchanges for temporary credentials.
    """
    if keys:
        return (ENDPOINT, ACCESS_KEY, SECRET_KEY), (SECURE, REGION, CA_FILE)
    return (ENDPOINT,), (
        SECURE,
        REGION,
        CA_FILE,
        web_identity.STS_ENDPOINT,
        web_identity.ROLE_ARN,
        web_identity.SESSION_SECONDS,
    )
