from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from esvit_core.storage import IntegrityError, ObjectStore


def race(writers: int, attempt: Callable[[int], bool]) -> list[int]:
    """Start all writers at the same moment and return those that won."""
    line = threading.Barrier(writers)

    def run(writer: int) -> bool:
        line.wait()
        return attempt(writer)

    with ThreadPoolExecutor(writers) as pool:
        return [writer for writer, won in enumerate(pool.map(run, range(writers))) if won]


def test_a_pointer_is_swapped_only_from_what_was_read(store) -> None:
    uri = store.uri("pointers/champion")
    assert store.read_pointer(uri) is None
    assert store.swap_pointer(uri, {"run": 1}, None)
    assert not store.swap_pointer(uri, {"run": 2}, None)
    first = store.read_pointer(uri)
    assert store.swap_pointer(uri, {"run": 2}, first)
    assert not store.swap_pointer(uri, {"run": 3}, first)
    assert store.read_pointer(uri).value == {"run": 2}


def test_a_removed_pointer_is_not_swapped(store) -> None:
    uri = store.uri("pointers/champion")
    store.swap_pointer(uri, {"run": 1}, None)
    first = store.read_pointer(uri)
    store.remove(uri)
    assert not store.swap_pointer(uri, {"run": 2}, first)
    assert store.read_pointer(uri) is None


def test_one_of_many_concurrent_swaps_wins(store) -> None:
    stores = [ObjectStore(store.address) for _ in range(3)]
    for number in range(4):
        uri = store.uri(f"pointers/{number}")
        created = race(3, lambda i, uri=uri: stores[i].swap_pointer(uri, {"run": i}, None))
        assert len(created) == 1
        state = store.read_pointer(uri)
        assert state.value == {"run": created[0]}
        swapped = race(3, lambda i, uri=uri, state=state: stores[i].swap_pointer(uri, {"run": 10 + i}, state))
        assert len(swapped) == 1
        assert store.read_pointer(uri).value == {"run": 10 + swapped[0]}


def test_no_increment_is_lost(store) -> None:
    uri = store.uri("counter")
    store.swap_pointer(uri, {"n": 0}, None)

    def count(_: int) -> None:
        mine = ObjectStore(store.address)
        for _ in range(10):
            while not mine.swap_pointer(uri, {"n": (state := mine.read_pointer(uri)).value["n"] + 1}, state):
                pass

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(count, range(4)))
    assert store.read_pointer(uri).value == {"n": 40}


def test_the_server_itself_rejects_a_failed_condition(store) -> None:
    """The condition holds even without the client's check before the put."""
    from minio.error import S3Error

    client = store.connection.client
    store.put_bytes(store.uri("object"), b"1")
    for headers, key in (
        ({"If-None-Match": "*"}, "object"),
        ({"If-Match": '"00000000000000000000000000000000"'}, "object"),
        ({"If-Match": '"00000000000000000000000000000000"'}, "absent"),
    ):
        with pytest.raises(S3Error) as caught:
            client.put(store.bucket, key, b"2", headers)
        assert caught.value.code == "PreconditionFailed"
    assert store.get_bytes(store.uri("object")) == b"1"


def test_put_if_absent_puts_once(store) -> None:
    uri = store.uri("once")
    won = race(4, lambda i: store.put_if_absent(uri, str(i).encode()))
    assert len(won) == 1
    assert store.get_bytes(uri) == str(won[0]).encode()


def test_a_swap_whose_response_was_lost_is_recognized_as_successful(store, through_proxy, proxy) -> None:
    uri = store.uri("pointers/champion")
    proxy.plan = ["PUT"]
    assert through_proxy.swap_pointer(uri, {"run": 1}, None)
    assert proxy.cuts == 1
    state = store.read_pointer(uri)
    assert state.value == {"run": 1}
    proxy.plan = ["PUT"]
    fresh = ObjectStore(through_proxy.address, through_proxy.connection.policy)
    assert fresh.swap_pointer(uri, {"run": 2}, state)
    assert proxy.cuts == 2
    assert not fresh.swap_pointer(uri, {"run": 3}, state)


def test_an_object_that_is_not_a_pointer_is_an_error(store) -> None:
    for data in (b"not json", b"[1]"):
        store.put_bytes(store.uri("pointer"), data)
        with pytest.raises(IntegrityError, match="not a pointer"):
            store.read_pointer(store.uri("pointer"))
