from __future__ import annotations

import json
from pathlib import Path

import pytest

from esvit_core.errors import UserError
from esvit_core.storage import IntegrityError, NotFound, ObjectStore
from esvit_core.storage.publication import describe, put_set


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path | bytes]:
    (tmp_path / "weights").write_bytes(b"w" * 1000)
    return {"model.bin": tmp_path / "weights", "notes/read.me": b"text", "empty": b""}


def test_a_set_is_published_and_fetched(store, files, tmp_path: Path) -> None:
    manifest = store.publish(store.uri("set"), files, "backbone", {"step": 7})
    assert manifest["format"] == "esvit-backbone/1" and manifest["step"] == 7
    assert manifest["files"]["model.bin"]["bytes"] == 1000
    assert store.read_manifest(store.uri("set")) == store.get_json(store.uri("set/manifest.json")) == manifest
    assert store.fetch(store.uri("set"), tmp_path / "out") == manifest
    assert (tmp_path / "out/notes/read.me").read_bytes() == b"text"
    assert (tmp_path / "out/model.bin").read_bytes() == b"w" * 1000


def test_only_requested_files_are_fetched(store, files, tmp_path: Path) -> None:
    store.publish(store.uri("set"), files, "backbone")
    store.fetch(store.uri("set"), tmp_path / "out", ["empty"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["empty"]
    with pytest.raises(NotFound, match=r"other: not in the set, which contains model\.bin"):
        store.fetch(store.uri("set"), tmp_path / "out", ["other"])


def test_valid_files_are_not_fetched_again(store, files, tmp_path: Path) -> None:
    store.publish(store.uri("set"), files, "backbone")
    store.fetch(store.uri("set"), tmp_path / "out")
    before = (tmp_path / "out/model.bin").stat().st_ino
    (tmp_path / "out/notes/read.me").write_bytes(b"TEXT")
    store.fetch(store.uri("set"), tmp_path / "out")
    assert (tmp_path / "out/model.bin").stat().st_ino == before
    assert (tmp_path / "out/notes/read.me").read_bytes() == b"text"


def test_publishing_again_changes_nothing(store, files) -> None:
    manifest = store.publish(store.uri("set"), files, "backbone", {"step": 7})
    times = {item.uri: item.etag for item in store.list(store.uri("set"))}
    assert store.publish(store.uri("set"), files, "backbone", {"step": 7}) == manifest
    for other in ({**files, "empty": b"not"}, {"empty": b""}):
        with pytest.raises(UserError, match="already holds a complete backbone"):
            store.publish(store.uri("set"), other, "backbone", {"step": 7})
    assert {item.uri: item.etag for item in store.list(store.uri("set"))} == times


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("survived", [0, 1, 2, 3])
def test_a_writer_killed_in_between_leaves_no_set(
    store, files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survived: int
) -> None:
    """With any number of objects written, the set is absent, and the next writer completes it."""
    client = type(store.connection.client)
    put, done = client.put, []

    def put_or_die(self, bucket, key, data, headers):
        if len(done) == survived:
            raise _Killed
        done.append(key)
        return put(self, bucket, key, data, headers)

    monkeypatch.setattr(client, "put", put_or_die)
    with pytest.raises(_Killed):
        store.publish(store.uri("set"), files, "backbone")
    monkeypatch.undo()
    assert len(list(store.list(store.uri("set")))) == survived
    assert store.read_manifest(store.uri("set")) is None
    with pytest.raises(NotFound, match="no complete set"):
        store.fetch(store.uri("set"), tmp_path / "out")
    manifest = store.publish(store.uri("set"), files, "backbone")
    assert store.fetch(store.uri("set"), tmp_path / "out") == manifest


def test_a_real_writer_killed_in_between_leaves_no_set(store_env, tmp_path: Path) -> None:
    import subprocess
    import sys

    script = """
import os, signal, sys
from esvit_core.storage import ObjectStore
store = ObjectStore.from_env()
put = store.put_bytes
store.put_bytes = lambda uri, data, **more: os.kill(os.getpid(), signal.SIGKILL) if "b" in uri[-1] else put(uri, data)
store.publish(sys.argv[1], {"a": b"1", "b": b"2"}, "thing")
"""
    ended = subprocess.run([sys.executable, "-c", script, store_env.uri("set")], timeout=60)
    assert ended.returncode == -9
    assert [item.uri for item in store_env.list(store_env.uri("set"))] == [store_env.uri("set/a")]
    assert store_env.read_manifest(store_env.uri("set")) is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:500] + bytes([data[500] ^ 1]) + data[501:], "damaged, SHA-256"),
        (lambda data: data[:-1], "damaged, 999 bytes instead of 1000"),
        (lambda data: data + b"w", "damaged, 1001 bytes instead of 1000"),
        (lambda data: None, "missing"),
    ],
    ids=["flipped", "truncated", "grown", "missing"],
)
def test_a_damaged_object_is_named(store, files, tmp_path: Path, damage, message: str) -> None:
    store.publish(store.uri("set"), files, "backbone")
    data = damage(store.get_bytes(store.uri("set/model.bin")))
    if data is None:
        store.remove(store.uri("set/model.bin"))
    else:
        store.put_bytes(store.uri("set/model.bin"), data)
    with pytest.raises(IntegrityError, match=rf"set/model\.bin: .*{message}") as caught:
        store.fetch(store.uri("set"), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out/model.bin").exists()


def test_sizes_are_checked_even_without_digests(store, files, tmp_path: Path) -> None:
    store.publish(store.uri("set"), files, "backbone")
    store.put_bytes(store.uri("set/model.bin"), b"v" * 1000)
    store.fetch(store.uri("set"), tmp_path / "out", verify=False)
    store.put_bytes(store.uri("set/model.bin"), b"v" * 999)
    with pytest.raises(IntegrityError, match="999 bytes"):
        store.fetch(store.uri("set"), tmp_path / "out2", verify=False)


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"format": "x"}', '{"format": "x", "files": {"a": {"bytes": "1"}}}', '{"format": 1}', "{"]
)
def test_an_invalid_manifest_is_an_error(store, tmp_path: Path, text: str) -> None:
    store.put_bytes(store.uri("set/manifest.json"), text.encode())
    with pytest.raises(UserError, match=r"set/manifest\.json: not"):
        store.fetch(store.uri("set"), tmp_path)


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "a/../../outside"])
def test_a_manifest_cannot_write_outside_the_directory(store, tmp_path: Path, name: str) -> None:
    entry = {"bytes": 1, "sha256": "0" * 64}
    manifest = {"format": "esvit-backbone/1", "files": {name: entry}}
    store.put_bytes(store.uri("set/manifest.json"), json.dumps(manifest).encode())
    with pytest.raises(UserError):
        store.fetch(store.uri("set"), tmp_path / "out")
    assert not (tmp_path / "outside").exists()


def test_a_set_is_published_over_an_unreliable_connection(
    store, through_proxy: ObjectStore, proxy, files, tmp_path: Path
) -> None:
    proxy.plan = ["PUT", "refuse", 0]
    manifest = through_proxy.publish(store.uri("set"), files, "backbone")
    assert proxy.cuts == 3
    assert store.fetch(store.uri("set"), tmp_path / "out") == manifest


def test_a_file_that_cannot_be_read_is_named_before_anything_is_written(store, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent: cannot be read"):
        store.publish(store.uri("set"), {"a": b"1", "b": tmp_path / "absent"}, "thing")
    assert not list(store.list(store.uri("set")))


def test_a_set_published_concurrently_is_not_replaced(store, files, monkeypatch) -> None:
    put = ObjectStore.put_if_absent

    def overtaken(self, uri, data):
        monkeypatch.setattr(ObjectStore, "put_if_absent", put)
        store.publish(store.uri("set"), files, "backbone", {"step": 8})
        return put(self, uri, data)

    monkeypatch.setattr(ObjectStore, "put_if_absent", overtaken)
    with pytest.raises(UserError, match="another process published a different backbone here"):
        store.publish(store.uri("set"), files, "backbone", {"step": 7})
    assert store.read_manifest(store.uri("set"))["step"] == 8


def test_two_concurrent_publications_of_the_same_set_both_succeed(store, files, tmp_path: Path, monkeypatch) -> None:
    put = ObjectStore.put_if_absent

    def overtaken(self, uri, data):
        monkeypatch.setattr(ObjectStore, "put_if_absent", put)
        store.publish(store.uri("set"), files, "backbone")
        return put(self, uri, data)

    monkeypatch.setattr(ObjectStore, "put_if_absent", overtaken)
    manifest = store.publish(store.uri("set"), files, "backbone")
    assert store.fetch(store.uri("set"), tmp_path / "out") == manifest


def test_putting_a_set_again_removes_nothing_unless_it_is_damaged(store, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a").write_bytes(b"1")
    manifest = describe(folder, "thing")
    put_set(store, store.uri("set"), folder, manifest)
    monkeypatch.setattr(ObjectStore, "remove_prefix", lambda *_: pytest.fail("removed a complete set"))
    put_set(store, store.uri("set"), folder, manifest)
    monkeypatch.undo()
    store.put_bytes(store.uri("set/a"), b"2")
    put_set(store, store.uri("set"), folder, manifest, damaged=True)
    store.fetch(store.uri("set"), tmp_path / "out")
    store.put_bytes(store.uri("set/manifest.json"), b"{")
    put_set(store, store.uri("set"), folder, manifest)
    assert store.fetch(store.uri("set"), tmp_path / "out") == manifest
