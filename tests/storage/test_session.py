from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from esvit_core.errors import UserError
from esvit_core.storage import StoreRefused
from esvit_core.storage.address import VARIABLES
from esvit_core.storage.embedded import EmbeddedStore
from esvit_core.storage.session import open_store
from esvit_core.storage.store_errors import PathError
from esvit_core.storage.upload_queue import UploadQueue
from esvit_core.storage.weed import data_argument


@pytest.fixture(autouse=True)
def no_store_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_sessions_share_a_server_and_one_started_explicitly_outlives_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESVIT_S3_REGION", "mars")
    embedded = EmbeddedStore(tmp_path)
    with open_store(tmp_path) as first:
        assert os.environ["ESVIT_S3_ENDPOINT"] == first.address.endpoint
        assert os.environ["ESVIT_S3_REGION"] == "us-east-1"
        del os.environ["ESVIT_S3_ENDPOINT"]  # as in another terminal
        with open_store(tmp_path) as second:
            assert second.address == first.address
        status = embedded.status()
        assert status is not None and not status.keep  # not stopped: the first session is still open
        first.check()
        embedded.start()
    assert {name: os.environ.get(name) for name in VARIABLES} == {**dict.fromkeys(VARIABLES), "ESVIT_S3_REGION": "mars"}
    kept = embedded.status()
    assert kept is not None and kept.pid == status.pid and kept.keep
    with open_store(tmp_path):
        pass
    assert embedded.status() == kept
    assert embedded.stop()


def test_a_killed_session_leaves_a_server_that_the_next_one_uses_and_the_last_one_stops(tmp_path: Path) -> None:
    script = """
import os, signal, sys
from pathlib import Path
from esvit_core.storage.upload_queue import UploadQueue
from esvit_core.storage.session import open_store
from esvit_core.storage.weed import data_argument
with open_store(Path(sys.argv[1])) as store:
    store.ensure_bucket("bucket")
    store.put_bytes("s3://bucket/kept", b"data")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=120)
    assert ended.returncode == -signal.SIGKILL
    left = EmbeddedStore(tmp_path).status()
    assert left is not None
    with pytest.raises(ZeroDivisionError), open_store(tmp_path) as store:
        assert store.address == left.address
        assert store.get_bytes("s3://bucket/kept") == b"data"
        raise ZeroDivisionError
    assert EmbeddedStore(tmp_path).status() is None


def test_a_configured_store_is_used_and_checked(store_env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(tmp_path / "unused") as opened:
        assert opened.address.endpoint == store_env.address.endpoint
    assert not (tmp_path / "unused").exists()
    monkeypatch.setenv("ESVIT_S3_SECRET_KEY", "wrong")
    with pytest.raises(StoreRefused, match="refuses the key"), open_store(None):
        pass


def test_a_missing_store_is_a_user_error() -> None:
    with pytest.raises(UserError, match="ESVIT_S3_ENDPOINT: not set"), open_store(None):
        pass


@pytest.mark.parametrize("remade", [False, True])
def test_a_deleted_store_folder_is_an_error_at_the_next_write_and_the_server_is_stopped(
    tmp_path: Path, remade: bool
) -> None:
    place = tmp_path / "store"
    with open_store(place) as store:
        store.ensure_bucket("bucket")
        box = UploadQueue(store, "s3://bucket/run")
        argument = data_argument(place.resolve())
        assert serving(argument)
        shutil.rmtree(place, ignore_errors=True)
        if remade:  # as the cache of shards does
            (place / "cache").mkdir(parents=True)
        for write in (store.put_bytes, box.put):
            with pytest.raises(PathError, match="store: the folder of the object store was deleted while in use"):
                write("s3://bucket/x", b"1")
    assert not serving(argument)


def serving(argument: str) -> list[int]:
    """Return the servers with an argument."""
    return [process.pid for process in psutil.process_iter(["cmdline"]) if argument in (process.info["cmdline"] or [])]
