"""The variables that name a web identity token and the service that exchanges it.

identity.py performs the exchange. This module does not import the store's client, so that the command line starts quickly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from esvit_core.errors import UserError

TOKEN_FILE = "ESVIT_S3_WEB_IDENTITY_TOKEN_FILE"
STS_ENDPOINT = "ESVIT_S3_STS_ENDPOINT"
ROLE_ARN = "ESVIT_S3_ROLE_ARN"
SESSION_SECONDS = "ESVIT_S3_SESSION_SECONDS"
VARIABLES = (TOKEN_FILE, STS_ENDPOINT, ROLE_ARN, SESSION_SECONDS)
# Variables of Amazon's own SDKs, which EKS sets in the pods of an annotated service account.
_AMAZON = {
    TOKEN_FILE: "AWS_WEB_IDENTITY_TOKEN_FILE",
    STS_ENDPOINT: "AWS_ENDPOINT_URL_STS",
    ROLE_ARN: "AWS_ROLE_ARN",
}

SHORTEST, LONGEST = 900, 7 * 24 * 3600  # seconds: minimum of AWS and SeaweedFS, maximum of MinIO


@dataclass(frozen=True)
class WebIdentity:
    """A token and the service that exchanges it.

    Args:
        token_file: read again for every exchange, because the platform renews it.
        sts: URL of the security token service.
        role: ARN of the role to assume; None: the role that the service derives from the token's claims.
        seconds: lifetime to request; None: the service's default.
    """

    token_file: Path
    sts: str
    role: str | None = None
    seconds: int | None = None

    @classmethod
    def from_env(cls, values: Mapping[str, str], store: str, region: str | None) -> WebIdentity | None:
        """Read the variables; return None if they name no token.

        Args:
            values: the environment.
            store: URL of the object store, whose own STS is used unless another one is named.
            region: AWS region.

        Raises:
            UserError: a value is malformed.
        """
        given = {name: values.get(name, "").strip() for name in VARIABLES}
        given |= {name: values.get(other, "").strip() for name, other in _AMAZON.items() if not given[name]}
        if not given[TOKEN_FILE]:
            return None
        sts = given[STS_ENDPOINT] or _default_sts(store, region or values.get("AWS_REGION", "").strip())
        parts = urlsplit(sts)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or "@" in parts.netloc:
            raise UserError(f"{STS_ENDPOINT}={sts}: expected http(s)://host:port, with a path if the service has one")
        return cls(
            token_file=Path(given[TOKEN_FILE]),
            sts=sts,
            role=given[ROLE_ARN] or None,
            seconds=_seconds(given[SESSION_SECONDS]),
        )

    def environment(self) -> dict[str, str]:
        """Return the variables from which :meth:`from_env` restores this identity."""
        values = {
            TOKEN_FILE: self.token_file,
            STS_ENDPOINT: self.sts,
            ROLE_ARN: self.role,
            SESSION_SECONDS: self.seconds,
        }
        return {name: str(value) for name, value in values.items() if value is not None}


def _default_sts(store: str, region: str) -> str:
    host = urlsplit(store).hostname or ""
    if host.endswith((".amazonaws.com", ".amazonaws.com.cn")):
        suffix = host[host.index(".amazonaws.com") :]
        return f"https://sts.{region}{suffix}" if region else f"https://sts{suffix}"
    return store


def _seconds(text: str) -> int | None:
    if not text:
        return None
    if not text.isdecimal() or not SHORTEST <= int(text) <= LONGEST:
        raise UserError(f"{SESSION_SECONDS}={text}: expected a number of seconds from {SHORTEST} to {LONGEST}")
    return int(text)
