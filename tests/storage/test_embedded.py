"""The life cycle of the embedded server. Most of these tests share one server and leave it running."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from esvit_core.errors import UserError
from esvit_core.storage import ObjectStore, StoreError, weed
from esvit_core.storage.embedded import EmbeddedStore, StoreStatus


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedStore]:
    made = EmbeddedStore(tmp_path_factory.mktemp("embedded") / "with space" / "store")
    made.start()
    yield made
    made.stop()
    assert made.status() is None


@pytest.fixture
def running(server: EmbeddedStore) -> StoreStatus:
    server.start()
    found = server.status()
    assert found is not None
    ObjectStore(found.address).ensure_bucket("bucket")
    return found


def kill(status: StoreStatus) -> None:
    os.kill(status.pid, signal.SIGKILL)
    with contextlib.suppress(psutil.Error):
        psutil.wait_procs([psutil.Process(status.pid)], timeout=5)


def test_a_second_start_finds_the_running_server(server: EmbeddedStore, running: StoreStatus, tmp_path: Path) -> None:
    by_another_name = tmp_path / "link"
    by_another_name.symlink_to(server.directory)
    other = EmbeddedStore(by_another_name)
    assert other.start() == running.address
    assert other.status() == running
    assert other.environment()["ESVIT_S3_ENDPOINT"] == running.address.endpoint
    assert ObjectStore.from_env(other.environment()).buckets() == ("bucket",)


def test_the_credentials_are_for_the_user_only(server: EmbeddedStore, running: StoreStatus) -> None:
    secrets = [running.address.access_key, running.address.secret_key]
    assert len(running.address.secret_key) >= 40
    for path in server.directory.iterdir():
        if path.is_file() and path.name.startswith(("identities", "security", "private", "server.json", "server.log")):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE((server.directory / "data").stat().st_mode) == 0o700
    process = psutil.Process(running.pid)
    shown = [*process.cmdline(), *process.environ().values(), (server.directory / "server.log").read_text()]
    assert not [text for text in shown for secret in secrets if secret in text]


def test_it_listens_on_the_loopback_interface_only(running: StoreStatus) -> None:
    listening = [c for c in psutil.Process(running.pid).net_connections() if c.status == psutil.CONN_LISTEN]
    assert len(listening) == 8
    assert {c.laddr.ip for c in listening} == {"127.0.0.1"}


def test_no_interface_is_open_without_the_key(server: EmbeddedStore, running: StoreStatus) -> None:
    """Neither the filer, which holds the names, nor the volume server, which holds the bytes, is accessible."""
    ObjectStore(running.address).put_bytes("s3://bucket/secret", b"hush")
    ports = json.loads((server.directory / "server.json").read_text())["ports"]
    for port, path in (
        (ports["s3"], "/bucket/secret"),
        (ports["filer"], "/buckets/bucket/secret"),
        (ports["filer"], "/buckets/?pretty=y"),
        (ports["master"], "/dir/assign"),
        (ports["master"], "/dir/lookup?volumeId=1"),
        (ports["volume"], "/1,01"),
    ):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5)
        assert caught.value.code in (401, 403, 404)
    for role in ("s3", "master", "volume", "filer"):  # gRPC does not answer without a certificate
        with socket.create_connection(("127.0.0.1", ports[f"{role}_grpc"]), timeout=5) as plain:
            plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
            with contextlib.suppress(ConnectionError):
                assert plain.recv(1000)[:1] != b"\0"  # the first byte of a SETTINGS frame


def test_interrupting_the_terminal_does_not_reach_it(tmp_path: Path, server: EmbeddedStore) -> None:
    server.stop()
    script = (
        "import sys; from esvit_core.storage.embedded import *;"
        "EmbeddedStore(sys.argv[1]).start(); print('started', flush=True); input()"
    )
    starter = subprocess.Popen(
        [sys.executable, "-c", script, str(server.directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        assert starter.stdout is not None and starter.stdout.readline() == b"started\n"
        status = server.status()
        assert status is not None
        os.killpg(starter.pid, signal.SIGINT)  # what the terminal does on Ctrl-C
        starter.communicate(timeout=30)
        assert server.status() == status
        assert os.getsid(status.pid) == status.pid
        ObjectStore(status.address).check()
    finally:
        starter.kill()
        starter.wait()


def test_acknowledged_data_survive_a_killed_server(server: EmbeddedStore, running: StoreStatus) -> None:
    """A client continues by itself once the server is back on the same port."""
    store = ObjectStore(running.address)
    acknowledged: list[int] = []
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            number = len(acknowledged)
            store.put_bytes(f"s3://bucket/kept/{number}", number.to_bytes(4) * 50_000)
            acknowledged.append(number)

    writer = threading.Thread(target=write)
    writer.start()
    while len(acknowledged) < 10:
        assert writer.is_alive()
    kill(running)
    before = len(acknowledged)
    assert server.status() is None
    assert server.start() == running.address
    while len(acknowledged) < before + 5:
        assert writer.is_alive()
    stop.set()
    writer.join()
    for number in acknowledged:
        assert store.get_bytes(f"s3://bucket/kept/{number}") == number.to_bytes(4) * 50_000


def test_stopping_keeps_the_data_and_leaves_nothing_running(server: EmbeddedStore, running: StoreStatus) -> None:
    store = ObjectStore(running.address)
    store.put_bytes("s3://bucket/kept", b"data" * 500_000)
    store.connection.client.begin_upload("bucket", "unfinished", {})
    ports = json.loads((server.directory / "server.json").read_text())["ports"]
    sockets = weed.sockets(weed.Ports(**ports))
    assert any(path.exists() for path in sockets)
    assert EmbeddedStore(server.directory).stop()  # by another instance
    assert not server.stop()
    assert server.status() is None
    assert not [path for path in sockets if path.exists()]
    with pytest.raises(UserError, match="no object store is running for this directory"):
        server.environment()
    address = server.start()
    assert address == running.address
    assert store.get_bytes("s3://bucket/kept") == b"data" * 500_000
    assert not store.connection.client.pending_uploads("bucket", "")


def test_damaged_or_stale_state_files_are_ignored(server: EmbeddedStore, running: StoreStatus) -> None:
    ObjectStore(running.address).put_bytes("s3://bucket/kept", b"data")
    notes = server.directory / "server.json"
    of_another = notes.read_text().replace(str(running.pid), str(os.getpid()), 1)
    for text in ("", "[]", '{"pid": 1, "ports": {"s3": 1}}', '{"pid": "x", "ports": [1]}', of_another):
        notes.write_text(text)
        assert server.status() is None
        assert not server.stop()
    # The running server is found and replaced: there must not be two on one directory.
    address = server.start()
    status = server.status()
    assert status is not None and status.pid not in (running.pid, os.getpid())
    assert not psutil.pid_exists(running.pid) or psutil.Process(running.pid).status() == psutil.STATUS_ZOMBIE
    assert ObjectStore(address).get_bytes("s3://bucket/kept") == b"data"


def test_concurrent_starts_share_one_server(tmp_path: Path) -> None:
    script = (
        "import sys; from esvit_core.storage.embedded import *; e = EmbeddedStore(sys.argv[1]);"
        "print(e.start().endpoint, e.status().pid)"
    )
    starters = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "store")], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    addresses = {starter.communicate(timeout=120)[0] for starter in starters}
    try:
        assert len(addresses) == 1 and [starter.returncode for starter in starters] == [0, 0, 0]
        argument = weed.data_argument(tmp_path / "store")
        assert len([p for p in psutil.process_iter(["cmdline"]) if argument in (p.info["cmdline"] or [])]) == 1
    finally:
        assert EmbeddedStore(tmp_path / "store").stop()


def test_the_requested_port_is_used(
    server: EmbeddedStore, running: StoreStatus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = weed.free_ports().s3
    monkeypatch.setenv("ESVIT_STORE_PORT", str(port))
    assert server.start() == running.address  # a running server is found
    server.stop()
    assert server.start().endpoint == f"127.0.0.1:{port}"
    with pytest.raises(UserError, match=rf"ESVIT_STORE_PORT={port}: in use by another program; choose another"):
        EmbeddedStore(tmp_path / "other").start()


@pytest.mark.parametrize("text", ["http", "0", "-1", "65536", "9000.0"])
def test_an_invalid_port_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("ESVIT_STORE_PORT", text)
    with pytest.raises(UserError, match=f"ESVIT_STORE_PORT={text}: expected a port"):
        EmbeddedStore(tmp_path / "store").start()


def test_a_port_taken_at_the_last_moment_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free_ports, given = weed.free_ports, []
    with socket.create_server(("127.0.0.1", 0)) as taken:

        def first_taken(s3: int | None = None) -> weed.Ports:
            given.append(free_ports(taken.getsockname()[1] if not given else s3))
            return given[-1]

        monkeypatch.setattr(weed, "free_ports", first_taken)
        server = EmbeddedStore(tmp_path / "store")
        try:
            assert server.start().endpoint == f"127.0.0.1:{given[1].s3}"
        finally:
            assert server.stop()


def test_an_unusable_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "store"):
        with pytest.raises(StoreError, match=r"file.*: cannot store the object store's data"):
            EmbeddedStore(place).start()
    assert EmbeddedStore(tmp_path / "absent").status() is None
    assert not EmbeddedStore(tmp_path / "absent").stop()


def test_the_error_of_a_failed_start_has_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weed, "command", lambda directory, ports: [sys.executable, "-c", "exit('no luck today')"])
    with pytest.raises(StoreError, match=r"does not start \(no luck today\); see .*server\.log"):
        EmbeddedStore(tmp_path / "store").start()
    monkeypatch.setattr(weed, "command", lambda directory, ports: [str(weed.binary()), "server", "-no-such-flag"])
    with pytest.raises(StoreError, match="does not start"):
        EmbeddedStore(tmp_path / "store").start()


def test_settings_of_the_user_do_not_affect_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("WEED_JWT_SIGNING_KEY", "x")
    monkeypatch.setenv("ESVIT_S3_SECRET_KEY", "x")
    assert "x" not in weed.environment(tmp_path).values()


@pytest.mark.parametrize(("name", "problem"), [("a,b", "has a comma"), (os.fsdecode(b"a\xff"), "is not UTF-8")])
def test_an_unsupported_path_is_a_one_line_error(tmp_path: Path, name: str, problem: str) -> None:
    with pytest.raises(UserError, match=f"{problem}.*choose another folder"):
        EmbeddedStore(tmp_path / name).start()
    assert not list(tmp_path.iterdir())
