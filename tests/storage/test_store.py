from __future__ import annotations

import multiprocessing
import os
import pickle
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest

from esvit_core.errors import UserError
from esvit_core.storage import NotFound, ObjectStore, StoreError, connection


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 1000])
def test_an_object_survives_a_round_trip(store, data: bytes) -> None:
    store.put_bytes(store.uri("a/object"), data)
    assert store.get_bytes(store.uri("a/object")) == data
    assert store.stat(store.uri("a/object")).size == len(data)


@pytest.mark.parametrize(
    "name", ["sp ace", "a+b", "per%25cent", "q?x=1", "hash#x", "über-日本", "a:b;c&d=e", "[x]{y}", ".hidden"]
)
def test_unusual_names_are_kept(store, name: str) -> None:
    store.put_bytes(store.uri(f"odd/{name}"), name.encode())
    assert store.get_bytes(store.uri(f"odd/{name}")) == name.encode()
    assert [item.uri for item in store.list(store.uri("odd"))] == [store.uri(f"odd/{name}")]


def test_ranges_end_where_the_object_ends(store) -> None:
    uri = store.uri("object")
    store.put_bytes(uri, b"0123456789")
    assert store.read_range(uri, 3, 4) == b"3456"
    assert store.read_range(uri, 8, 100) == b"89"
    assert store.read_range(uri, 10, 1) == store.read_range(uri, 99, 1) == store.read_range(uri, 2, 0) == b""


def test_json_keeps_its_order_and_characters(store) -> None:
    value = {"b": [1, 2.5, None], "a": {"ü": True}}
    store.put_json(store.uri("value.json"), value)
    assert store.get_json(store.uri("value.json")) == value
    assert list(store.get_json(store.uri("value.json"))) == ["b", "a"]
    store.put_bytes(store.uri("value.json"), b"{")
    with pytest.raises(UserError, match="not JSON"):
        store.get_json(store.uri("value.json"))


def test_a_missing_object_is_an_error(store) -> None:
    assert not store.exists(store.uri("absent"))
    with pytest.raises(NotFound, match=r"absent: no such object"):
        store.get_bytes(store.uri("absent"))
    with pytest.raises(NotFound, match="no such bucket"):
        store.put_bytes("s3://no-such-bucket/x", b"")
    with pytest.raises(NotFound, match="no such bucket"):
        list(store.list("s3://no-such-bucket"))
    store.remove(store.uri("absent"))


def test_a_folder_is_not_an_object(store) -> None:
    store.put_bytes(store.uri("folder/object"), b"")
    assert not store.exists(store.uri("folder"))
    for uri in (store.uri("folder/"), f"s3://{store.bucket}"):
        with pytest.raises(UserError, match="expected the address of an object"):
            store.put_bytes(uri, b"")


def test_a_name_too_long_for_the_server_is_a_one_line_error(store) -> None:
    with pytest.raises(StoreError, match="xxx"):
        store.put_bytes(store.uri("x" * 300), b"")


def test_a_listing_is_of_a_folder_and_in_order(store) -> None:
    for name in ("runs/a/2", "runs/a-b/3", "runs/a/1/x", "runs/ab", "runs/a"):
        store.put_bytes(store.uri(name), name.encode())
    assert [item.uri for item in store.list(store.uri("runs/a"))] == [store.uri("runs/a/1/x"), store.uri("runs/a/2")]
    assert [item.uri for item in store.list(store.uri("runs"))] == [
        store.uri(f"runs/{name}") for name in ("a", "a-b/3", "a/1/x", "a/2", "ab")
    ]
    one_level = list(store.list(store.uri("runs/"), recursive=False))
    assert [item.uri for item in one_level] == [store.uri(f"runs/{name}") for name in ("a", "a-b/", "a/", "ab")]
    assert [item.size for item in one_level] == [6, 0, 0, 7]


def test_listings_of_several_pages_are_complete(store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "PAGE", 20)
    names = [f"many/{i % 3}/{i:03d}" for i in range(130)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: store.put_bytes(store.uri(name), b""), names))
    assert [item.uri for item in store.list(store.uri("many"))] == sorted(store.uri(name) for name in names)
    requested = []
    call = store.connection.call
    monkeypatch.setattr(store.connection, "call", lambda *given: (requested.append(given), call(*given))[1])
    unordered = store.list_unordered(store.uri("many"))
    first = [next(unordered).uri for _ in range(10)]
    assert len(requested) == 1  # the next page is requested when it is needed
    assert sorted([*first, *(item.uri for item in unordered)]) == sorted(store.uri(name) for name in names)
    assert len(requested) == 7
    assert store.remove_prefix(store.uri("many")) == 130
    assert not list(store.list(f"s3://{store.bucket}"))


def test_removing_a_prefix_keeps_its_neighbors(store) -> None:
    for name in ("a/manifest.json", "a/b", "ab", "b/a"):
        store.put_bytes(store.uri(name), b"")
    assert store.remove_prefix(store.uri("a")) == 2
    assert [item.uri for item in store.list(f"s3://{store.bucket}")] == [store.uri("ab"), store.uri("b/a")]
    assert store.remove_prefix(store.uri("a")) == 0
    with pytest.raises(UserError, match="whole bucket"):
        store.remove_prefix(f"s3://{store.bucket}")


def test_concurrent_callers_create_a_bucket_once(store) -> None:
    bucket = f"{store.bucket}-shared"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: store.ensure_bucket(bucket), range(8)))
    assert bucket in store.buckets()
    with pytest.raises(UserError, match="not a valid bucket name"):
        store.ensure_bucket("Not_A_Bucket")


def _read(store: ObjectStore, uri: str) -> tuple[bytes, int]:
    return store.get_bytes(uri), os.getpid()


def test_forked_processes_use_the_same_store(store) -> None:
    uri = store.uri("object")
    store.put_bytes(uri, b"data")  # connections are open when the process forks
    plain = ObjectStore(store.address)
    plain.get_bytes(uri)
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        found = list(pool.map(_read, [plain] * 4, [uri] * 4))
    assert {data for data, _ in found} == {b"data"}
    assert os.getpid() not in {pid for _, pid in found}
    assert pickle.loads(pickle.dumps(plain)).get_bytes(uri) == b"data"
