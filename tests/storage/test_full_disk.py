from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from esvit_core.errors import InfrastructureError
from esvit_core.storage import ObjectStore, StoreError, StoreFull, disk
from esvit_core.storage.embedded import EmbeddedStore
from esvit_core.storage.marker import mark

MIB = 2**20
SIZE = 120 * MIB


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A disk of 120 MiB: a real one if this process may mount it, otherwise this disk with a simulated limit."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = (
        os.geteuid() == 0
        and shutil.which("mount")
        and (
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", place], capture_output=True
            ).returncode
            == 0
        )
    )
    if not mounted:

        def free(directory: Path) -> int:
            used = 0
            for path in place.rglob("*"):
                with contextlib.suppress(OSError):
                    used += path.stat().st_blocks * 512
            return max(0, SIZE - used)

        monkeypatch.setattr(disk, "free_bytes", free)
    yield place
    EmbeddedStore(place / "store").stop()
    if mounted:
        subprocess.run(["umount", place], check=True)


def test_a_full_disk_is_a_one_line_error_and_stored_data_are_kept(small_disk: Path, tmp_path: Path) -> None:
    embedded = EmbeddedStore(small_disk / "store")
    store = ObjectStore(embedded.start())
    store.ensure_bucket("bucket")
    data = os.urandom(10 * MIB)
    stored = 0
    with pytest.raises(StoreFull) as caught:
        while True:
            began = time.monotonic()
            store.put_bytes(f"s3://bucket/{stored}", data)
            stored += 1
    assert time.monotonic() - began < 2
    assert 3 <= stored <= 6
    message = str(caught.value)
    assert isinstance(caught.value, InfrastructureError) and "\n" not in message
    assert message.startswith(f"{small_disk / 'store'}: the disk of the object store is full: 74 MiB needed, ")
    assert "MiB free" in message

    big = tmp_path / "big"
    big.write_bytes(data * 2)
    for write in (
        lambda: store.put_file("s3://bucket/big", big),
        lambda: store.publish("s3://bucket/set", {"big": big}, "thing"),
        lambda: store.put_if_absent("s3://bucket/big", data * 2),
    ):
        with pytest.raises(StoreFull):
            write()

    (small_disk / "others").write_bytes(b"\1" * (disk.free_bytes(small_disk) - 20 * MIB))
    with pytest.raises(StoreFull):
        store.put_bytes("s3://bucket/small", b"x")
    assert [item.uri for item in store.list("s3://bucket")] == [f"s3://bucket/{number}" for number in range(stored)]
    embedded.stop()
    with pytest.raises(
        StoreFull, match=r"store: the disk of the object store is full: 64 MiB needed, (19|20) MiB free"
    ):
        embedded.start()
    assert embedded.status() is None

    (small_disk / "others").unlink()
    with pytest.raises(StoreFull):
        store.put_bytes("s3://bucket/large", data * 3)
    embedded.start()
    assert [store.get_bytes(f"s3://bucket/{number}") == data for number in range(stored)] == [True] * stored


def test_failures_of_a_full_server_are_not_retried(scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server only reports an internal error."""
    server = scripted((500, "InternalError"))
    checks = iter([1000 * MIB, 5 * MIB])  # before the put, and after it failed
    monkeypatch.setattr(disk, "free_bytes", lambda directory: next(checks))
    mark(tmp_path)
    store = ObjectStore(dataclasses.replace(server.store().address, directory=tmp_path))
    with pytest.raises(StoreFull, match="64 MiB needed, 5 MiB free"):
        store.put_bytes("s3://bucket/object", b"data")
    assert server.requests == ["PUT /bucket/object"]


def test_a_download_to_a_full_disk_is_a_one_line_error_and_leaves_nothing(
    store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store.put_bytes(store.uri("object"), b"data")
    monkeypatch.setattr(os, "pwrite", no_room)
    with pytest.raises(StoreFull, match="copy: the disk is full, 4 bytes needed"):
        store.get_file(store.uri("object"), tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == []


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positional reads and writes transfer at most 1,000 bytes, as the system may do at any time."""
    pread, pwrite = os.pread, os.pwrite
    monkeypatch.setattr(os, "pread", lambda descriptor, length, offset: pread(descriptor, min(length, 1000), offset))
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: pwrite(descriptor, data[:1000], offset))


def test_transfers_are_complete_despite_short_reads_and_writes(store, small_pieces: None, tmp_path: Path) -> None:
    original = tmp_path / "original"
    original.write_bytes(os.urandom(17 * MIB // 1000))
    store.put_file(store.uri("object"), original)
    store.get_file(store.uri("object"), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == original.read_bytes()


def test_a_disk_that_becomes_full_during_a_download_is_an_error_and_leaves_nothing(
    store, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first write that does not fit is shortened; only the next one fails."""
    pwrite, size = os.pwrite, 3 * MIB

    def write(descriptor: int, data: bytes, offset: int) -> int:
        room = size - offset
        if room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data[:room], offset)

    if os.path.ismount(small_disk):  # a real disk needs no simulation
        (small_disk / "others").write_bytes(b"\1" * (disk.free_bytes(small_disk) - size))
    else:
        monkeypatch.setattr(os, "pwrite", write)
    store.put_bytes(store.uri("object"), b"x" * 5 * MIB)
    with pytest.raises(StoreFull, match="copy: the disk is full, 5242880 bytes needed"):
        store.get_file(store.uri("object"), small_disk / "copy")
    assert {path.name for path in small_disk.iterdir()} <= {"others"}


def test_features_that_do_not_fit_on_the_temporary_disk_are_a_one_line_error(small_disk: Path) -> None:
    import numpy as np

    from esvit_core.evaluation.features import Features
    from esvit_core.evaluation.stored_features import _save

    rows = 2 * SIZE // 4
    features = Features(view=np.zeros((rows, 1), "f4"), blocks=np.zeros((0, 1), "f4"), labels=np.zeros(0, "i8"))
    if not os.path.ismount(small_disk):
        pytest.skip("no disk of 120 MiB can be mounted here")
    with pytest.raises(StoreError, match=r"features.safetensors: cannot be written .*No space left.*TMPDIR"):
        _save(features, small_disk, "features", blocks=False)


@pytest.mark.parametrize("short_by", [2048, 200 * 1024])
def test_an_archive_that_does_not_fit_decompressed_is_not_reported_as_damaged(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_by: int
) -> None:
    """This also holds if only the last part of the buffer does not fit."""
    from esvit_core.data.ingest.sources import open_source

    if not os.path.ismount(small_disk):
        pytest.skip("no disk of 120 MiB can be mounted here")
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        entry = tarfile.TarInfo("a.png")
        entry.size = 1_050_000
        tar.addfile(entry, io.BytesIO(os.urandom(entry.size)))
    needed = 103 * tarfile.RECORDSIZE  # 6 KiB more than a MiB, in which pieces it is written
    (small_disk / "others").write_bytes(b"\1" * (disk.free_bytes(small_disk) - needed + short_by))
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    with pytest.raises(InfrastructureError, match="to decompress it"), open_source(str(tmp_path / "x.tar.gz")):
        pass


def test_a_listing_that_does_not_fit_on_the_temporary_disk_is_a_one_line_error(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from esvit_core.data.ingest.sources import open_source

    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number in range(6000):
            tar.addfile(tarfile.TarInfo(f"a rather long name of a file {number}.png"))
    if os.path.ismount(small_disk):
        (small_disk / "others").write_bytes(b"\1" * (disk.free_bytes(small_disk) - 100 * 1024))
    else:

        def write(*_: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "pwrite", write)
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    with pytest.raises(StoreFull, match=r"the disk is full; a list of files needs space there: .*TMPDIR"):
        open_source(str(tmp_path / "x.tar")).__enter__()
