"""Temporary credentials for a token, from the real server's security token service."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from minio import Minio
from minio.error import S3Error
from sts_server import ROLE, Issuer, StsServer

from esvit_core.errors import InfrastructureError, UserError
from esvit_core.storage import ObjectStore, StoreAddress, StoreRefused, StoreUnavailable, identity
from esvit_core.storage.connection import _credentials
from esvit_core.storage.retry import RetryPolicy
from esvit_core.storage.roles import policy

SESSION = 8  # lifetime of the server's temporary credentials, seconds


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    made = Issuer()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture(scope="module")
def sts(issuer: Issuer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StsServer]:
    server = StsServer(tmp_path_factory.mktemp("sts") / "server", issuer, f"{SESSION}s", policy("train", "runs"))
    try:
        admin = ObjectStore(server.admin, RetryPolicy.lasting(60))
        admin.ensure_bucket("runs")
        admin.put_bytes("s3://runs/pointers/champion", b"the champion")
        yield server
    finally:
        server.stop()


@pytest.fixture
def token(issuer: Issuer, tmp_path: Path) -> Path:
    """The file into which the platform writes the token."""
    path = tmp_path / "token"
    path.write_text(issuer.token())
    return path


@pytest.fixture
def connect(sts: StsServer, token: Path) -> Callable[..., ObjectStore]:
    """A client without a key: ``connect()``, ``connect(ESVIT_S3_STS_ENDPOINT=...)``."""

    def connect(**more: str) -> ObjectStore:
        names = {"ESVIT_S3_WEB_IDENTITY_TOKEN_FILE": str(token), "ESVIT_S3_ROLE_ARN": ROLE}
        address = StoreAddress.from_env({"ESVIT_S3_ENDPOINT": sts.url, **names, **more})
        return ObjectStore(address, RetryPolicy(attempts=2, base=0.01))

    return connect


def read(store: ObjectStore) -> bytes:
    return store.get_bytes("s3://runs/pointers/champion")


def access_key(store: ObjectStore) -> str:
    return _credentials(store.address, os.getpid()).retrieve().access_key


def test_a_token_has_the_permissions_of_its_role(connect: Callable[..., ObjectStore]) -> None:
    store = connect()
    assert read(store) == b"the champion"
    store.put_bytes("s3://runs/runs/a/training/latest", b"x")
    with pytest.raises(
        StoreRefused, match=r"refuses the temporary credentials .*AccessDenied.*permissions of the role .*train"
    ):
        store.put_bytes("s3://runs/pointers/champion", b"another")


def test_credentials_are_renewed_while_a_client_is_used(
    connect: Callable[..., ObjectStore], sts: StsServer, issuer: Issuer, token: Path
) -> None:
    token.write_text(issuer.token(seconds=SESSION - 2))
    store = connect()
    assert read(store) == b"the champion"
    first = _credentials(store.address, os.getpid()).retrieve()
    token.write_text(issuer.token())  # as the kubelet does before the old token expires
    old = Minio(
        sts.url.removeprefix("http://"), first.access_key, first.secret_key, first.session_token, False, "us-east-1"
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert read(store) == b"the champion"  # no request fails meanwhile
        try:
            old.get_object("runs", "pointers/champion").release_conn()
        except S3Error:
            break
        time.sleep(0.2)
    else:
        pytest.fail("the first credentials never ended")
    assert access_key(store) != first.access_key


def test_credentials_that_the_store_no_longer_accepts_are_replaced(
    connect: Callable[..., ObjectStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "RENEW_BEFORE_SECONDS", -3600.0)  # the client does not notice that they expire
    store = connect()
    first = access_key(store)
    time.sleep(SESSION + 2)
    assert access_key(store) == first
    assert read(store) == b"the champion"
    assert access_key(store) != first


def test_an_unavailable_sts_matters_only_after_the_credentials_have_expired(
    connect: Callable[..., ObjectStore],
    sts: StsServer,
    cutting_proxy: Callable[[int], Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(identity, "RENEW_BEFORE_SECONDS", 3600.0)  # capped at a quarter of their lifetime
    monkeypatch.setattr(identity, "RETRY_SECONDS", 0.1)
    proxy = cutting_proxy(sts.ports.s3)
    store = connect(ESVIT_S3_STS_ENDPOINT=f"http://127.0.0.1:{proxy.port}")
    assert read(store) == b"the champion"
    proxy.plan = ["refuse"] * 10_000
    deadline = time.monotonic() + 120
    with caplog.at_level(logging.WARNING), pytest.raises(StoreUnavailable, match="no answer from the STS") as caught:
        while time.monotonic() < deadline:
            read(store)
            time.sleep(0.2)
    assert "not renewed yet" in caplog.text  # warned before they expired
    assert isinstance(caught.value, InfrastructureError) and "\n" not in str(caught.value)
    proxy.plan = []
    assert read(store) == b"the champion"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda issuer: issuer.token(audience="another"), "accepts issuer http.*, audience another, subject system:"),
        (lambda issuer: issuer.token(seconds=-60), "it has expired .*still renews the file"),
        (lambda issuer: issuer.token(key=rsa.generate_private_key(65537, 2048)), "refuses .*signature"),
        (lambda issuer: "no token", r"refuses the web identity token in .*role .*train trusts it"),
        (lambda issuer: " \n", "the file is empty"),
        (lambda issuer: None, "no such file; expected the token that the platform mounts"),
    ],
    ids=["audience", "expired", "signature", "no-jwt", "empty", "missing"],
)
def test_a_rejected_token_is_a_one_line_user_error(
    connect: Callable[..., ObjectStore],
    issuer: Issuer,
    token: Path,
    change: Callable[[Issuer], str | None],
    message: str,
) -> None:
    text = change(issuer)
    if text is None:
        token.unlink()
    else:
        token.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read(connect())
    message = str(caught.value)
    assert "\n" not in message and str(token) in message
    assert not text or not text.strip() or text == "no token" or text not in message


def test_a_server_that_is_not_an_sts_is_reported(connect: Callable[..., ObjectStore], issuer: Issuer) -> None:
    with pytest.raises(StoreUnavailable, match=r"http://127.* is not an STS \(HTTP status 501\)"):
        read(connect(ESVIT_S3_STS_ENDPOINT=issuer.url))
    with pytest.raises(StoreUnavailable, match=r"no credentials for the object store .*no answer from the STS"):
        read(connect(ESVIT_S3_STS_ENDPOINT="http://127.0.0.1:9"))


@pytest.mark.parametrize(
    ("values", "sts"),
    [
        ({"ESVIT_S3_ENDPOINT": "http://store:9000"}, "http://store:9000"),
        ({"ESVIT_S3_ENDPOINT": "store:9000", "AWS_ENDPOINT_URL_STS": "https://sts:1/x"}, "https://sts:1/x"),
        (
            {"ESVIT_S3_ENDPOINT": "s3.eu-central-1.amazonaws.com", "ESVIT_S3_REGION": "eu-central-1"},
            "https://sts.eu-central-1.amazonaws.com",
        ),
        (
            {"ESVIT_S3_ENDPOINT": "s3.cn-north-1.amazonaws.com.cn", "AWS_REGION": "cn-north-1"},
            "https://sts.cn-north-1.amazonaws.com.cn",
        ),
        ({"ESVIT_S3_ENDPOINT": "s3.amazonaws.com"}, "https://sts.amazonaws.com"),
    ],
)
def test_the_variables_of_an_annotated_account_are_enough(values: dict[str, str], sts: str) -> None:
    given = {"AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/token", "AWS_ROLE_ARN": ROLE, **values}
    address = StoreAddress.from_env(given)
    assert address.identity == identity.WebIdentity(Path("/var/run/token"), sts, ROLE)
    assert StoreAddress.from_env(address.environment()) == address


def test_a_key_takes_precedence_over_a_token() -> None:
    keys = {"ESVIT_S3_ACCESS_KEY": "a", "ESVIT_S3_SECRET_KEY": "b", "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/token"}
    assert StoreAddress.from_env({"ESVIT_S3_ENDPOINT": "store:9000", **keys}).identity is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ESVIT_S3_STS_ENDPOINT": "sts:80"}, "ESVIT_S3_STS_ENDPOINT=sts:80: expected http"),
        ({"ESVIT_S3_SESSION_SECONDS": "60"}, "ESVIT_S3_SESSION_SECONDS=60: expected a number of seconds from 900"),
        ({"ESVIT_S3_SESSION_SECONDS": "1h"}, "ESVIT_S3_SESSION_SECONDS=1h: expected a number"),
        ({"ESVIT_S3_WEB_IDENTITY_TOKEN_FILE": ""}, "ESVIT_S3_ACCESS_KEY, ESVIT_S3_SECRET_KEY: not set.*TOKEN_FILE"),
        ({"ESVIT_S3_ACCESS_KEY": "half"}, "^ESVIT_S3_SECRET_KEY: not set"),
    ],
)
def test_malformed_values_are_named(values: dict[str, str], message: str) -> None:
    given = {"ESVIT_S3_ENDPOINT": "store:9000", "ESVIT_S3_WEB_IDENTITY_TOKEN_FILE": "/var/run/token", **values}
    with pytest.raises(UserError, match=message):
        StoreAddress.from_env(given)
