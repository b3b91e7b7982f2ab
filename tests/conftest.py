"""Fixtures for all tests."""

from __future__ import annotations

import fcntl
import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from esvit_core.storage import ObjectStore, StoreAddress
from esvit_core.storage.address import VARIABLES
from esvit_core.storage.embedded import EmbeddedStore

_numbers = itertools.count(1)
BUCKETS_AT_ONCE = 16


class BucketStore(ObjectStore):
    """A store with the name of a bucket that belongs to one test."""

    def __init__(self, address: StoreAddress, bucket: str) -> None:
        super().__init__(address)
        self.bucket = bucket

    def uri(self, key: str) -> str:
        return f"s3://{self.bucket}/{key}"


@pytest.fixture
def torch_settings() -> Iterator[None]:
    """Restore torch's settings, because a training makes torch deterministic for the whole process."""
    import torch  # not by every test

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def store_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedStore]:
    """A real S3 server, one for all tests."""
    server = EmbeddedStore(tmp_path_factory.mktemp("store"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def fresh_buckets() -> list[str]:
    """Buckets of the session's server that no test has used."""
    return []


@pytest.fixture
def store(store_server: EmbeddedStore, fresh_buckets: list[str]) -> BucketStore:
    """The session's server with a fresh bucket: ``store.bucket``, ``store.uri("runs/a/x")``."""
    address = store_server.start()
    if not fresh_buckets:  # the first object of a bucket takes 0.2 s, those of several at the same time as well
        with ThreadPoolExecutor(BUCKETS_AT_ONCE) as pool:
            fresh_buckets += pool.map(_make_bucket, itertools.repeat(address, BUCKETS_AT_ONCE))
    return BucketStore(address, fresh_buckets.pop(0))


def _make_bucket(address: StoreAddress) -> str:
    store = BucketStore(address, f"test-{next(_numbers)}")
    store.ensure_bucket(store.bucket)
    store.put_bytes(store.uri("first"), b"")
    store.remove(store.uri("first"))
    return store.bucket


@pytest.fixture
def store_env(store: BucketStore, monkeypatch: pytest.MonkeyPatch) -> BucketStore:
    """The same store, with the ``ESVIT_S3_*`` variables set for this process and its children."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in store.address.environment().items():
        monkeypatch.setenv(name, value)
    return store


@pytest.fixture(scope="session")
def prometheus_programs() -> Path:
    """The folder with ``prometheus`` and ``promtool``: installed ones, or Debian's, downloaded once into the environment.

    If neither is available, the tests that need them fail rather than being skipped.
    """
    if shutil.which("prometheus") and (installed := shutil.which("promtool")):
        return Path(installed).parent
    folder = Path(sys.prefix) / "prometheus"
    folder.mkdir(exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "promtool").exists():
            script = Path(__file__).parent / "monitoring" / "get-prometheus"
            done = subprocess.run([script, folder], capture_output=True, text=True, timeout=240)
            if done.returncode:
                pytest.fail(
                    "prometheus and promtool are not installed and could not be downloaded "
                    f"({' '.join(done.stderr.split())}); install them (apt install prometheus, brew install prometheus)"
                )
    return folder
