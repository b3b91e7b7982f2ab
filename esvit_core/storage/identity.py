"""Workload identity: exchange the token that the platform gives a pod for temporary credentials of the object store.

Kubernetes writes a signed token into the pod and renews the file. The store's security token service (STS) verifies the
token and returns credentials that expire after minutes or hours (``AssumeRoleWithWebIdentity``, which AWS, MinIO and
SeaweedFS support). No key is stored anywhere.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from xml.etree import ElementTree

import urllib3
from minio.credentials import Credentials, Provider

from esvit_core.errors import EsvitError, UserError
from esvit_core.storage.store_errors import StoreRefused, StoreUnavailable
from esvit_core.storage.web_identity import STS_ENDPOINT, TOKEN_FILE, WebIdentity

RENEW_BEFORE_SECONDS = 300.0
RETRY_SECONDS = 30.0
_TIMEOUT = urllib3.Timeout(connect=5.0, read=15.0)
_TRANSIENT_CODES = frozenset({"IDPCommunicationError", "Throttling", "ThrottlingException", "SlowDown"})
_EXPIRED_CODES = frozenset({"ExpiredToken", "ExpiredTokenException"})

_log = logging.getLogger(__name__)


class StsUnavailable(ConnectionError):  # noqa: N818 (the name states the condition)
    """The STS does not answer, or returns an error that may be transient."""


class WebIdentityCredentials(Provider):
    """Credentials that renew themselves. minio retrieves them before every request; safe to share between threads.

    minio's own provider sends the token in the URL, where it ends up in logs and error messages, and drops the service's
    error message. This provider sends a form, renews the credentials before they expire, and keeps them while the service is
    unavailable.

    Args:
        identity: token and service.
        http: connection pool with the store's certificates.
    """

    def __init__(self, identity: WebIdentity, http: urllib3.PoolManager) -> None:
        self.identity = identity
        self._http = http
        self._lock = threading.Lock()
        self._credentials: Credentials | None = None
        self._renew_at = self._end = 0.0

    def retrieve(self) -> Credentials:
        """Return the credentials for signing.

        Raises:
            UserError: there is no token, or the service rejects it.
            StoreUnavailable: no TLS connection to the service.
            StsUnavailable: the service is unavailable, and the previous credentials have expired.
        """
        with self._lock:
            now = time.time()
            if self._credentials is not None and now < self._renew_at:
                return self._credentials
            try:
                self._renew(now)
            except (StsUnavailable, EsvitError) as error:
                if self._credentials is None or now >= self._end:
                    raise
                self._renew_at = now + RETRY_SECONDS
                _log.warning("credentials of the object store not renewed yet, %d s left: %s", self._end - now, error)
            assert self._credentials is not None
            return self._credentials

    def forget(self) -> None:
        """Drop the credentials, because the store rejects them; the next request gets new ones."""
        with self._lock:
            self._credentials = None

    def _renew(self, now: float) -> None:
        self._credentials, self._end = _exchange(self.identity, self._http)
        self._renew_at = self._end - min(RENEW_BEFORE_SECONDS, (self._end - now) / 4)


def _exchange(identity: WebIdentity, http: urllib3.PoolManager) -> tuple[Credentials, float]:
    """Return new credentials and the time at which they expire."""
    token = _read_token(identity.token_file)
    form = {
        "Action": "AssumeRoleWithWebIdentity",
        "Version": "2011-06-15",
        "WebIdentityToken": token,
        "RoleSessionName": f"esvit-{os.getpid()}",
    }
    if identity.role:
        form["RoleArn"] = identity.role
    if identity.seconds:
        form["DurationSeconds"] = str(identity.seconds)
    try:
        answer = http.request(
            "POST",
            identity.sts,
            body=urlencode(form),
            # The next exchange is an hour away; firewalls would drop a connection that is kept open until then.
            headers={"Content-Type": "application/x-www-form-urlencoded", "Connection": "close"},
            timeout=_TIMEOUT,
            redirect=False,
            retries=False,
        )
    except urllib3.exceptions.SSLError as error:
        raise StoreUnavailable(f"no TLS connection to the STS {identity.sts} ({error.args[-1]})") from None
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise StsUnavailable(f"no answer from the STS {identity.sts} ({type(error).__name__})") from None
    if answer.status != 200:
        raise _refusal(identity, token, answer.status, answer.data)
    try:
        found = _texts(answer.data)
        end = datetime.fromisoformat(found["Expiration"]).replace(tzinfo=UTC).timestamp()
        return Credentials(found["AccessKeyId"], found["SecretAccessKey"], found["SessionToken"]), end
    except (ElementTree.ParseError, KeyError, ValueError):
        raise StsUnavailable(f"{identity.sts} is not an STS; check {STS_ENDPOINT}") from None


def _read_token(file: Path) -> str:
    try:
        token = file.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        raise UserError(
            f"{TOKEN_FILE}={file}: no such file; expected the token that the platform mounts for the pod's service account"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not ASCII text"
        raise UserError(f"{TOKEN_FILE}={file}: {reason}; expected a token that this process can read") from None
    if not token:
        raise UserError(f"{TOKEN_FILE}={file}: the file is empty; expected a token")
    return token


def _refusal(identity: WebIdentity, token: str, status: int, body: bytes) -> StsUnavailable | StoreRefused:
    try:
        found = _texts(body)
    except ElementTree.ParseError:
        found = {}
    if "Code" not in found:
        return StsUnavailable(f"{identity.sts} is not an STS (HTTP status {status}); check {STS_ENDPOINT}")
    code = found["Code"]
    message = " ".join(found.get("Message", "").replace(token, "...").split())
    answer = f"{code}: {message}" if message else code
    if status >= 500 or status == 429 or code in _TRANSIENT_CODES:
        return StsUnavailable(f"the STS {identity.sts} returned {answer}")
    what = f"the STS {identity.sts} refuses the web identity token in {identity.token_file}"
    claims = _claims(token)
    if code in _EXPIRED_CODES or claims.get("exp", time.time() + 1) < time.time():
        return StoreRefused(f"{what}: it has expired ({answer}); check that the platform still renews the file")
    shown = ", ".join(f"{name} {_one_line(claims[key])}" for key, name in _SHOWN.items() if key in claims)
    role = f", and that the role {identity.role} trusts it" if identity.role else ""
    return StoreRefused(f"{what} ({answer}); check that it accepts {shown or 'this type of token'}{role}")


_SHOWN = {"iss": "issuer", "aud": "audience", "sub": "subject"}  # claims of a token that are not secret


def _one_line(claim: Any) -> str:
    return " ".join(map(str, claim)) if isinstance(claim, list) else str(claim)


def _claims(token: str) -> dict[str, Any]:
    """Return the claims of the token, for messages only; the service verifies the signature."""
    try:
        middle = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(middle + "=" * (-len(middle) % 4)))
    except (IndexError, ValueError):
        return {}
    return claims if isinstance(claims, dict) else {}


def _texts(body: bytes) -> dict[str, str]:
    """Return the texts of an XML document by the names of their elements, without namespaces."""
    root = ElementTree.fromstring(body)
    return {one.tag.rpartition("}")[2]: one.text.strip() for one in root.iter() if one.text and one.text.strip()}
