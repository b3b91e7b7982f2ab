"""Pages of a listing are read as minio reads them, and what is none is an error."""

from __future__ import annotations

from datetime import UTC, datetime
from urllib.parse import quote_plus
from xml.sax.saxutils import escape

import pytest
from hypothesis import given
from hypothesis import strategies as st
from minio.datatypes import parse_list_objects
from urllib3 import HTTPResponse

from esvit_core.storage.list_page import ListedObject, parse_list_page

KEYS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1)
TIMES = st.datetimes(min_value=datetime(2000, 1, 1), timezones=st.just(UTC))
OBJECTS = st.lists(st.tuples(KEYS, st.integers(0, 2**50), TIMES))


def page(objects, folders=(), *, encoded: bool = True, token: str = "", namespace: bool = True) -> bytes:
    code = (lambda key: quote_plus(key)) if encoded else escape
    rows = [
        f"<Contents><Key>{code(key)}</Key><LastModified>{time:%Y-%m-%dT%H:%M:%S}.000Z</LastModified>"
        f"<ETag>&quot;{size:x}&quot;</ETag><Size>{size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
        for key, size, time in objects
    ]
    rows += [f"<CommonPrefixes><Prefix>{code(folder)}</Prefix></CommonPrefixes>" for folder in folders]
    space = ' xmlns="http://s3.amazonaws.com/doc/2006-03-01/"' if namespace else ""
    end = f"<NextContinuationToken>{escape(token)}</NextContinuationToken>" if token else ""
    encoding = "<EncodingType>url</EncodingType>" if encoded else ""
    return (
        f"<?xml version='1.0' encoding='UTF-8'?><ListBucketResult{space}><Name>bucket</Name>{encoding}"
        f"<IsTruncated>{str(bool(token)).lower()}</IsTruncated>{end}{''.join(rows)}</ListBucketResult>"
    ).encode()


@given(OBJECTS, st.lists(KEYS), st.booleans(), st.text("abc/&<", max_size=9), st.booleans())
def test_a_page_is_read_as_minio_reads_it(objects, folders, encoded, token, namespace):
    content = page(objects, folders, encoded=encoded, token=token, namespace=namespace)
    theirs, has_more, following, _ = parse_list_objects(HTTPResponse(content))
    found, next_token = parse_list_page(content)
    assert found == [
        ListedObject(each.object_name, each.size or 0, each.etag or "", each.last_modified) for each in theirs
    ]
    assert next_token == (following if has_more else "")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html><body>login",
        b"<html/>",
        b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>",  # and no token: it would end here
        b"<ListBucketResult><IsTruncated>false</IsTruncated><Contents><Size>1</Size></Contents></ListBucketResult>",
        b"<ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>a</Key><Size>?</Size></Contents></ListBucketResult>",
    ],
)
def test_what_is_no_listing_is_an_error(content: bytes):
    with pytest.raises(ValueError):
        parse_list_page(content)
