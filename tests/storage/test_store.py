from __future__ import annotations

import os
from pathlib import Path

import pytest

from esvit_core.errors import UserError
from esvit_core.storage import IntegrityError, NotFound


def test_an_object_comes_back_as_it_went(store) -> None:
    for data in (b"", b"x", bytes(range(256)) * 1000):
        store.put_bytes(store.uri("a/b c+ü%.bin"), data)
        assert store.get_bytes(store.uri("a/b c+ü%.bin")) == data


def test_a_large_file_goes_in_parts_and_comes_back(store, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(40 * 2**20 + 17))
    store.put_file(store.uri("big.bin"), source)
    store.get_file(store.uri("big.bin"), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    assert store.open_range(store.uri("big.bin"), 16 * 2**20 - 3, 10) == source.read_bytes()[16 * 2**20 - 3 :][:10]


def test_what_is_not_there_is_said_so(store) -> None:
    with pytest.raises(NotFound, match="no such object"):
        store.get_bytes(store.uri("absent"))
    assert store.read_pointer(store.uri("absent")) is None
    assert not store.exists(store.uri("absent"))


def test_listing(store) -> None:
    for name in ("runs/a/1", "runs/a/sub/2", "runs/ab/3"):
        store.put_bytes(store.uri(name), b"1")
    assert [s.uri for s in store.list(store.uri("runs/a"))] == [store.uri("runs/a/1"), store.uri("runs/a/sub/2")]
    assert [s.uri for s in store.list(store.uri("runs/a"), recursive=False)] == [
        store.uri("runs/a/1"),
        store.uri("runs/a/sub/"),
    ]
    assert store.remove_prefix(store.uri("runs/a")) == 2
    assert [s.uri for s in store.list(store.uri("runs"))] == [store.uri("runs/ab/3")]


def test_a_pointer_is_swapped_only_from_what_was_read(store) -> None:
    uri = store.uri("pointers/champion")
    assert store.swap_pointer(uri, {"run": 1}, None)
    assert not store.swap_pointer(uri, {"run": 2}, None)
    first = store.read_pointer(uri)
    assert store.swap_pointer(uri, {"run": 2}, first)
    assert not store.swap_pointer(uri, {"run": 3}, first)
    assert store.read_pointer(uri).value == {"run": 2}


def test_put_if_absent(store) -> None:
    assert store.put_if_absent(store.uri("once"), b"1")
    assert not store.put_if_absent(store.uri("once"), b"2")
    assert store.get_bytes(store.uri("once")) == b"1"


def test_a_published_set_is_fetched_and_checked(store, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"xx")
    files = {"a.bin": b"a", "deep/x": tmp_path / "x"}
    manifest = store.publish(store.uri("set"), files, "thing", {"note": 1})
    assert manifest["format"] == "esvit-thing/1" and manifest["note"] == 1
    assert store.publish(store.uri("set"), files, "thing", {"note": 1}) == manifest
    with pytest.raises(UserError, match="already there"):
        store.publish(store.uri("set"), {"a.bin": b"b"}, "thing")
    assert store.fetch(store.uri("set"), tmp_path / "out") == manifest
    assert (tmp_path / "out/deep/x").read_bytes() == b"xx"
    store.put_bytes(store.uri("set/a.bin"), b"b")
    with pytest.raises(IntegrityError, match=r"set/a\.bin"):
        store.fetch(store.uri("set"), tmp_path / "out2")
