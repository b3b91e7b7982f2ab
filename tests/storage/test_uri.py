from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esvit_core.errors import UserError
from esvit_core.storage import join_uri, split_uri

letters = string.ascii_lowercase + string.digits
buckets = st.from_regex(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]", fullmatch=True)
names = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/"), min_size=1, max_size=20).filter(
    lambda name: name not in (".", "..")
)
paths = st.lists(names, min_size=1, max_size=6)


@given(buckets, paths)
def test_a_joined_address_is_split_again(bucket: str, parts: list[str]) -> None:
    uri = join_uri(f"s3://{bucket}", *parts)
    assert split_uri(uri) == (bucket, "/".join(parts))


@given(buckets, paths, st.integers(0, 6))
def test_joining_is_associative(bucket: str, parts: list[str], cut: int) -> None:
    whole = join_uri(f"s3://{bucket}", "/".join(parts))
    assert join_uri(join_uri(f"s3://{bucket}/", *parts[:cut]), *parts[cut:]) == whole
    assert join_uri(f"s3://{bucket}", *(f"/{part}/" for part in parts)) == whole


@given(st.text(max_size=40))
def test_any_text_is_an_address_or_an_explained_error(text: str) -> None:
    for uri in (text, f"s3://{text}", f"s3://bucket/{text}"):
        try:
            bucket, key = split_uri(uri)
        except UserError as error:
            assert "\n" not in str(error) and "; " in str(error) + "; "
        else:
            assert uri in (f"s3://{bucket}/{key}", f"s3://{bucket}")


@pytest.mark.parametrize(
    ("uri", "bucket", "key"),
    [
        ("s3://esvit", "esvit", ""),
        ("s3://esvit/", "esvit", ""),
        ("s3://esvit/runs/a/", "esvit", "runs/a/"),
        ("s3://my.bucket-1/ä b+c%20?#", "my.bucket-1", "ä b+c%20?#"),
    ],
)
def test_addresses(uri: str, bucket: str, key: str) -> None:
    assert split_uri(uri) == (bucket, key)


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "runs/a",
        "/runs/a",
        "S3://esvit/a",
        "http://esvit/a",
        "s3:/esvit/a",
        "s3://",
        "s3:///key",
        "s3://ab/key",
        "s3://Esvit/key",
        "s3://-esvit/key",
        "s3://es..vit/key",
        "s3://10.0.0.1/key",
        "s3://" + "a" * 64 + "/key",
        "s3://esvit//key",
        "s3://esvit/a//b",
        "s3://esvit/a/../b",
        "s3://esvit/./b",
        "s3://esvit/a\nb",
        "s3://esvit/\udcff",
        "s3://esvit/" + "ä" * 513,
    ],
)
def test_addresses_that_no_store_supports_are_refused(uri: str) -> None:
    with pytest.raises(UserError):
        split_uri(uri)
