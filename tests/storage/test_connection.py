"""Retries and error messages, with scripted responses."""

from __future__ import annotations

import dataclasses
import random
import socket
import ssl
import time
from pathlib import Path

import pytest

from esvit_core.storage import (
    NotFound,
    ObjectStore,
    StoreAddress,
    StoreError,
    StoreFull,
    StoreRefused,
    StoreRejected,
    StoreUnavailable,
    weed,
)
from esvit_core.storage.retry import RetryPolicy, failed_requests


@pytest.mark.parametrize(
    "answer",
    [
        (503, "SlowDown"),
        (500, "InternalError"),
        (502, ""),
        (503, ""),
        (400, "RequestTimeout"),
        (409, "OperationAborted"),
    ],
)
def test_transient_failures_are_retried(scripted, answer: tuple[int, str]) -> None:
    server = scripted(answer, answer, (200, ""))
    server.store().put_bytes("s3://bucket/key", b"data")
    assert server.requests == ["PUT /bucket/key"] * 3


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ((403, "AccessDenied"), StoreRefused),
        ((403, "InvalidAccessKeyId"), StoreRefused),
        ((404, "NoSuchKey"), NotFound),
        ((404, "NoSuchBucket"), NotFound),
        ((400, "InvalidArgument"), StoreRejected),
        ((501, "NotImplemented"), StoreRejected),
        ((507, "InsufficientStorage"), StoreFull),
        ((404, ""), StoreUnavailable),
    ],
)
def test_permanent_failures_are_not_retried(scripted, answer: tuple[int, str], error: type[StoreError]) -> None:
    server = scripted(answer)
    with pytest.raises(error) as caught:
        server.store().get_bytes("s3://bucket/key")
    assert len(server.requests) == 1
    assert "s3://bucket/key" in str(caught.value) and "nobody-sees" not in str(caught.value)


def test_a_server_that_lists_nonsense_is_not_taken_for_an_empty_store(scripted) -> None:
    server = scripted((200, ""))
    with pytest.raises(StoreUnavailable, match="not a working S3 server"):
        list(server.store().list("s3://bucket/key"))
    assert len(server.requests) == 1


def test_retries_are_limited(scripted) -> None:
    server = scripted((503, "SlowDown"))
    with pytest.raises(StoreError, match="SlowDown"):
        server.store().get_bytes("s3://bucket/key")
    assert len(server.requests) == 4


def test_transient_failures_are_counted_by_kind(scripted) -> None:
    before = failed_requests()
    server = scripted((503, "SlowDown"), (500, "InternalError"), (404, "NoSuchKey"))
    with pytest.raises(NotFound):
        server.store().get_bytes("s3://bucket/key")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    nobody = dataclasses.replace(server.store().address, endpoint=f"127.0.0.1:{port}")
    with pytest.raises(StoreUnavailable):
        ObjectStore(nobody, RetryPolicy(attempts=2, base=0.01, cap=0.01)).get_bytes("s3://bucket/key")
    counted = {kind: number - before[kind] for kind, number in failed_requests().items()}
    assert counted == {"throttled": 1, "server": 1, "connection": 2, "timeout": 0}


def test_a_key_that_may_not_list_buckets_is_accepted(scripted) -> None:
    scripted((403, "AccessDenied")).store().check()
    with pytest.raises(StoreRefused, match="refuses the key"):
        scripted((403, "SignatureDoesNotMatch")).store().check()


def test_waits_double_up_to_a_cap_and_have_jitter() -> None:
    policy = RetryPolicy(attempts=8, base=0.1, cap=2.0)
    bounds = [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    for _ in range(50):
        assert all(bound / 2 <= wait <= bound for wait, bound in zip(policy.waits(), bounds, strict=True))
    assert len({next(policy.waits()) for _ in range(10)}) > 1


def test_retries_do_not_change_seeded_random_numbers(scripted) -> None:
    random.seed(7)
    expected = random.random()
    random.seed(7)
    scripted((503, "SlowDown"), (200, "")).store().put_bytes("s3://bucket/key", b"data")
    assert random.random() == expected


def test_a_web_server_is_not_accepted_as_a_store(scripted) -> None:
    with pytest.raises(StoreUnavailable, match="not a working S3 server"):
        scripted((404, "")).store().check()


def test_an_unreachable_endpoint_fails_soon_with_one_line() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match=rf"{endpoint} \(.*Connection refused\); check ESVIT_S3_ENDPOINT"):
        ObjectStore(StoreAddress(endpoint, "key", "secret", secure=False)).check()
    assert time.monotonic() - began < 5


def test_a_pod_waits_until_the_network_policies_let_it_reach_the_store(scripted, monkeypatch) -> None:
    server = scripted(*[(503, "")] * 5, (403, "AccessDenied"))
    with pytest.raises(StoreUnavailable):
        server.store().check()
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    server.store().check()
    assert len(server.requests) == 6


def test_tls_to_a_plain_server_names_the_setting(store) -> None:
    address = StoreAddress(store.address.endpoint, store.address.access_key, store.address.secret_key, secure=True)
    with pytest.raises(StoreUnavailable, match="ESVIT_S3_SECURE=false"):
        ObjectStore(address).check()


def test_a_private_certificate_is_trusted_through_the_ca_file(scripted, tmp_path: Path) -> None:
    weed.write_configuration(tmp_path)  # makes a certificate for the loopback address
    server = scripted((200, ""))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / weed.CERTIFICATE, tmp_path / weed.PRIVATE_KEY)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    address = dataclasses.replace(server.store().address, secure=True)
    with pytest.raises(StoreUnavailable, match=r"certificate verify failed.*set ESVIT_S3_CA_FILE"):
        ObjectStore(address).put_bytes("s3://bucket/key", b"data")
    trusting = {**address.environment(), "ESVIT_S3_CA_FILE": str(tmp_path / weed.CERTIFICATE)}
    ObjectStore.from_env(trusting).put_bytes("s3://bucket/key", b"data")
    assert server.requests == ["PUT /bucket/key"]


def test_a_wrong_region_names_the_setting(scripted) -> None:
    with pytest.raises(StoreError, match=r"AuthorizationHeaderMalformed .*; check ESVIT_S3_REGION"):
        scripted((400, "AuthorizationHeaderMalformed")).store().get_bytes("s3://bucket/key")


def test_the_real_server_refuses_a_wrong_key(store) -> None:
    for access_key, secret_key in ((store.address.access_key, "wrong"), ("wrong", store.address.secret_key)):
        refused = ObjectStore(StoreAddress(store.address.endpoint, access_key, secret_key, secure=False))
        for action in (refused.check, lambda refused=refused: refused.get_bytes(store.uri("x"))):
            with pytest.raises(StoreRefused, match="check ESVIT_S3_ACCESS_KEY and ESVIT_S3_SECRET_KEY"):
                action()
