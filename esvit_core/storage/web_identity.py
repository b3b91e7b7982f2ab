"""The variables that name a web identity token, and where it is exchanged.

What does the exchange is in identity.py; this part needs no client of the store, so that the command line starts at once.
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
# What Amazon's own SDKs read, and what EKS puts into the pods of an annotated service account.
_AMAZON = {
    TOKEN_FILE: "AWS_WEB_IDENTITY_TOKEN_FILE",
    STS_ENDPOINT: "AWS_ENDPOINT_URL_STS",
    ROLE_ARN: "AWS_ROLE_ARN",
}

SHORTEST, LONGEST = 900, 7 * 24 * 3600  # seconds: of AWS and SeaweedFS, of MinIO


@dataclass(frozen=True)
class WebIdentity:
    """A token and where it is exchanged.

    Args:
        token_file: read anew for every exchange, since the platform renews it.
        sts: URL of the security token service.
        role: ARN of the role to take; None: the one that the service derives from the token's claims.
        seconds: lifetime to ask for; None: the service's default.
    """

    token_file: Path
    sts: str
    role: str | None = None
    seconds: int | None = None

    @classmethod
    def from_env(cls, values: Mapping[str, str], store: str, region: str | None) -> WebIdentity | None:
        """Read the variables; None if none of them names a token.

        Args:
            values: the environment.
            store: URL of the object store, whose own STS it is unless another one is named.
            region: of AWS.

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
            raise UserError(
                f"{STS_ENDPOINT}={sts}: expected http(s)://host:port, with a path where the service has one"
            )
        return cls(
            token_file=Path(given[TOKEN_FILE]),
            sts=sts,
            role=given[ROLE_ARN] or None,
            seconds=_seconds(given[SESSION_SECONDS]),
        )

    def environment(self) -> dict[str, str]:
        """The variables that :meth:`from_env` reads back."""
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
