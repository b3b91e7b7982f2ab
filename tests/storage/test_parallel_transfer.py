from __future__ import annotations

import os
from pathlib import Path

import pytest

from esvit_core.errors import UserError
from esvit_core.storage import IntegrityError, NotFound, StoreError, StoreUnavailable, parallel_transfer

MIB = 2**20


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> int:
    """Use the smallest part size that S3 allows, so that a file of many parts is small."""
    monkeypatch.setattr(parallel_transfer, "PART_BYTES", 5 * MIB)
    return 5 * MIB


def pending(store) -> list[object]:
    return store.connection.client.pending_uploads(store.bucket, "")


@pytest.mark.parametrize("size", [0, 1, 5 * MIB, 5 * MIB + 1, 13 * MIB + 7])
def test_files_of_any_number_of_parts_survive_a_round_trip(store, tmp_path: Path, small_parts: int, size: int) -> None:
    source, copy = tmp_path / "source", tmp_path / "deep" / "copy"
    source.write_bytes(os.urandom(size))
    store.put_file(store.uri("file.bin"), source, sha256=parallel_transfer.sha256_of(source))
    store.get_file(store.uri("file.bin"), copy)
    assert copy.read_bytes() == source.read_bytes()
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]
    assert store.read_range(store.uri("file.bin"), small_parts - 2, 4) == source.read_bytes()[small_parts - 2 :][:4]
    assert not pending(store)


@pytest.mark.parametrize(("size", "requests"), [(0, 1), (1, 1), (5 * MIB, 1), (5 * MIB + 1, 2)])
def test_a_download_takes_one_request_per_part(
    store, tmp_path: Path, small_parts: int, monkeypatch: pytest.MonkeyPatch, size: int, requests: int
) -> None:
    """A store may answer after 30 ms, so the size is not asked for first."""
    store.put_bytes(store.uri("object"), bytes(size))
    made = []
    client = store.connection.client
    execute = client._url_open

    def counted(*arguments, **named):
        made.append(arguments)
        return execute(*arguments, **named)

    monkeypatch.setattr(client, "_url_open", counted)
    store.get_file(store.uri("object"), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == bytes(size)
    assert len(made) == requests


def test_an_upload_survives_cut_connections(store, through_proxy, proxy, tmp_path: Path, small_parts: int) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(12 * MIB))
    proxy.plan = ["POST", "PUT", "refuse", "PUT", 0]
    through_proxy.put_file(store.uri("file.bin"), source)
    assert proxy.cuts >= 3
    store.get_file(store.uri("file.bin"), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()


def test_a_download_survives_cut_connections(store, through_proxy, proxy, tmp_path: Path, small_parts: int) -> None:
    data = os.urandom(12 * MIB)
    store.put_bytes(store.uri("file.bin"), data)
    proxy.plan = [10_000, 3 * MIB, 6 * MIB, "refuse", 70_000]  # the first part twice, then the others
    through_proxy.get_file(store.uri("file.bin"), tmp_path / "copy")
    assert proxy.cuts >= 4
    assert (tmp_path / "copy").read_bytes() == data


@pytest.mark.parametrize("cut", [0, 100, 200_000])
def test_a_truncated_body_is_never_accepted(store, through_proxy, proxy, cut: int) -> None:
    data = os.urandom(500_000)
    store.put_bytes(store.uri("object"), data)
    proxy.plan = [cut, cut]
    assert through_proxy.get_bytes(store.uri("object")) == data
    assert proxy.cuts == 2


def test_a_permanent_outage_is_a_one_line_error_and_leaves_nothing(store, through_proxy, proxy, tmp_path: Path) -> None:
    store.put_bytes(store.uri("object"), os.urandom(500_000))
    proxy.plan = [100_000] * 20
    with pytest.raises(StoreUnavailable, match=r"object: no answer from the object store .*check ESVIT_S3_ENDPOINT"):
        through_proxy.get_file(store.uri("object"), tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == []


def test_an_upload_that_fails_leaves_no_parts(
    store, tmp_path: Path, small_parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(11 * MIB))
    client = type(store.connection.client)
    send = client.put_part
    for failure in (KeyboardInterrupt, ValueError("broken")):

        def put_part(self, bucket, key, upload, number, data, failure=failure):
            if number == 3:
                assert len(pending(store)) == 1
                raise failure
            return send(self, bucket, key, upload, number, data)

        monkeypatch.setattr(client, "put_part", put_part)
        with pytest.raises((KeyboardInterrupt, StoreError)):
            store.put_file(store.uri("file.bin"), source)
        assert not pending(store)
    assert not store.exists(store.uri("file.bin"))


def test_an_upload_whose_parts_were_dropped_starts_again(
    store, tmp_path: Path, small_parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(11 * MIB))
    client = type(store.connection.client)
    finish = client.finish_upload

    def forget_first(self, *arguments):
        monkeypatch.setattr(client, "finish_upload", finish)
        assert store.abort_uploads(store.uri("")) == 1
        return finish(self, *arguments)

    monkeypatch.setattr(client, "finish_upload", forget_first)
    store.put_file(store.uri("file.bin"), source)
    assert store.get_bytes(store.uri("file.bin")) == source.read_bytes()
    assert not pending(store)


def test_an_upload_whose_response_was_lost_is_recognized_as_complete(
    store, tmp_path: Path, small_parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older object of the same size is not mistaken for the result."""
    source, old = tmp_path / "source", tmp_path / "old"
    old.write_bytes(os.urandom(6 * MIB))
    source.write_bytes(os.urandom(6 * MIB))
    store.put_file(store.uri("file.bin"), old)
    client = type(store.connection.client)
    finish, begin, begun = client.finish_upload, client.begin_upload, []

    def lose_the_answer(self, *arguments):
        monkeypatch.setattr(client, "finish_upload", finish)
        finish(self, *arguments)
        raise ConnectionResetError

    monkeypatch.setattr(client, "begin_upload", lambda *arguments: begun.append(1) or begin(*arguments))
    monkeypatch.setattr(client, "finish_upload", lose_the_answer)
    store.put_file(store.uri("file.bin"), source)
    assert len(begun) == 1
    assert store.get_bytes(store.uri("file.bin")) == source.read_bytes()

    def forget_it(self, bucket, key, upload, parts):
        monkeypatch.setattr(client, "finish_upload", finish)
        self.abort_upload(bucket, key, upload)
        return finish(self, bucket, key, upload, parts)

    monkeypatch.setattr(client, "finish_upload", forget_it)
    store.put_file(store.uri("file.bin"), old)
    assert len(begun) == 3
    assert store.get_bytes(store.uri("file.bin")) == old.read_bytes()


def test_unfinished_uploads_are_found_by_prefix_and_age(store) -> None:
    from datetime import timedelta

    client = store.connection.client
    client.begin_upload(store.bucket, "runs/a/file", {})
    client.begin_upload(store.bucket, "runs/b/file", {})
    assert store.abort_uploads(store.uri("runs"), timedelta(hours=1)) == 0
    assert store.abort_uploads(store.uri("runs/a")) == 1
    assert not list(store.list(f"s3://{store.bucket}"))  # unfinished objects are not listed
    assert store.abort_uploads(f"s3://{store.bucket}") == 1


def test_a_replaced_object_is_not_mixed_with_the_new_one(
    store, tmp_path: Path, small_parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put_bytes(store.uri("object"), b"old" * 2 * MIB)
    client = type(store.connection.client)
    read = client.read

    def read_then_replace(self, *arguments):
        found = read(self, *arguments)
        store.put_bytes(store.uri("object"), b"new" * 2 * MIB)
        return found

    monkeypatch.setattr(client, "read", read_then_replace)
    with pytest.raises(IntegrityError, match="replaced while being read"):
        store.get_file(store.uri("object"), tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == []


def test_mistakes_with_files_are_explained(store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(UserError, match="absent: cannot be read"):
        store.put_file(store.uri("x"), tmp_path / "absent")
    with pytest.raises(UserError, match="cannot be read"):
        store.put_file(store.uri("x"), tmp_path)
    with pytest.raises(IntegrityError, match="SHA-256"):
        store.put_file(store.uri("x"), tmp_path / "file", sha256="0" * 64)
    assert not store.exists(store.uri("x"))
    store.put_bytes(store.uri("x"), b"x")
    with pytest.raises(UserError, match="cannot be written"):
        store.get_file(store.uri("x"), tmp_path / "file" / "below")
    with pytest.raises(NotFound):
        store.get_file(store.uri("absent"), tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
