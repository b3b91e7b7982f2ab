from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esvit_core.errors import UserError
from esvit_core.storage import ObjectStore, StoreAddress

KEYS = {"ESVIT_S3_ACCESS_KEY": "reader", "ESVIT_S3_SECRET_KEY": "hush-hush"}


@pytest.mark.parametrize(
    ("endpoint", "secure", "url"),
    [
        ("store:9000", "", "https://store:9000"),
        ("store:9000", "false", "http://store:9000"),
        ("store:9000", "True", "https://store:9000"),
        ("http://store:9000/", "", "http://store:9000"),
        ("https://s3.eu-central-1.amazonaws.com", "", "https://s3.eu-central-1.amazonaws.com"),
        ("http://[::1]:9000", "0", "http://[::1]:9000"),
    ],
)
def test_endpoints(endpoint: str, secure: str, url: str) -> None:
    address = StoreAddress.from_env({**KEYS, "ESVIT_S3_ENDPOINT": endpoint, "ESVIT_S3_SECURE": secure})
    assert address.url == url


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ESVIT_S3_ENDPOINT": ""}, "ESVIT_S3_ENDPOINT: not set"),
        ({"ESVIT_S3_SECRET_KEY": " "}, "ESVIT_S3_SECRET_KEY: not set"),
        ({"ESVIT_S3_ENDPOINT": "ftp://store"}, "expected host:port"),
        ({"ESVIT_S3_ENDPOINT": "http://store/bucket"}, "without a path"),
        ({"ESVIT_S3_ENDPOINT": "store:port"}, "expected host:port"),
        ({"ESVIT_S3_ENDPOINT": "key:secret@store:9000"}, "without a path or a key"),
        ({"ESVIT_S3_SECURE": "perhaps"}, "expected true or false"),
        ({"ESVIT_S3_ENDPOINT": "http://store", "ESVIT_S3_SECURE": "true"}, "contradict"),
        ({"ESVIT_S3_CA_FILE": "/no/such/file.pem"}, "no such file"),
    ],
)
def test_missing_and_malformed_variables_are_named(values: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        StoreAddress.from_env({"ESVIT_S3_ENDPOINT": "store:9000", **KEYS, **values})
    assert "hush" not in str(caught.value)


@given(
    st.builds(
        StoreAddress,
        endpoint=st.sampled_from(["store:9000", "[::1]:80", "s3.example.org"]),
        access_key=st.text(st.characters(codec="ascii", min_codepoint=33), min_size=1),
        secret_key=st.text(st.characters(codec="ascii", min_codepoint=33), min_size=1),
        secure=st.booleans(),
        region=st.sampled_from([None, "eu-west-1"]),
        directory=st.sampled_from([None, Path("/data/store")]),
    )
)
def test_child_processes_read_back_the_same_address(address: StoreAddress) -> None:
    assert StoreAddress.from_env(address.environment()) == address


def test_the_secret_is_not_shown() -> None:
    address = StoreAddress("store:9000", "reader", "hush-hush")
    assert "hush" not in repr(address) + repr(ObjectStore(address))
