"""The embedded object store: one SeaweedFS server per data directory, started on demand."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from esvit_core.errors import UserError
from esvit_core.storage import weed
from esvit_core.storage.address import StoreAddress
from esvit_core.storage.connection import Connection
from esvit_core.storage.disk import disk_error_class, is_full, require_room
from esvit_core.storage.marker import mark
from esvit_core.storage.retry import RetryPolicy
from esvit_core.storage.store import ObjectStore
from esvit_core.storage.store_errors import PathError, StoreError, StoreFull, StoreUnavailable

PORT_VARIABLE = "ESVIT_STORE_PORT"
LOG = "server.log"
_STATE = "server.json"
_LOCK = "server.lock"
_START_SECONDS = 60.0
_START_ATTEMPTS = 3
# The server's orderly shutdown waits 15 s for streams between its parts that never finish. It keeps no acknowledged
# data in memory only, so it may be killed after a short time for pending requests.
_STOP_SECONDS = 0.5
_KILL_SECONDS = 30.0
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class StoreStatus:
    """Status of a running server.

    Args:
        pid: its process.
        address: its address and credentials.
        directory: its data directory.
        keep: whether it runs until it is stopped explicitly; otherwise the last session that uses it stops it.
    """

    pid: int
    address: StoreAddress
    directory: Path
    keep: bool


class EmbeddedStore:
    """The object store with its data in ``directory``. All users of the directory share one server.

    The server has its own session: Ctrl-C does not reach it, and it outlives the process that started it. It listens only
    on the loopback interface; its credentials are stored in the directory, readable only by the user.

    Example:
        >>> embedded = EmbeddedStore(Path("esvit-runs/store"))
        >>> store = ObjectStore(embedded.start())
        >>> embedded.stop()
        True

    Args:
        directory: data directory; created if necessary.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory).resolve()  # every path to the directory means the same server
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, keep: bool = True) -> StoreAddress:
        """Start the server, or find the running one.

        Args:
            keep: keep the server running until :meth:`stop`; False: the last session that uses it may stop it.

        Raises:
            UserError: the directory cannot be used, its disk is full, or the port in ``ESVIT_STORE_PORT`` is in use.
        """
        self.make_directory()
        with self._locked():
            running = self.status()
            if running is None:
                return self._launch(keep)
            if keep and not running.keep:
                self._write_state({**self._read_state(), "keep": True})
            return running.address

    def stop(self) -> bool:
        """Stop the server and wait until it has ended; return False if none ran. Acknowledged data are kept."""
        if not self.directory.is_dir():
            return self._stop_orphans()  # the directory was deleted while the server ran
        with self._locked():
            running = self.status()
            if running is None:
                # Without a state file, the directory was deleted while its server ran, and was created again.
                return False if (self.directory / _STATE).exists() else self._stop_orphans()
            self._end(running.pid)
            self._remove_sockets()
            return True

    def status(self) -> StoreStatus | None:
        """Return the status of the server of this directory; None if none runs. It may be starting or stopping."""
        state, ports = self._read_state(), self._last_ports()
        pid = state.get("pid")
        if ports is None or not isinstance(pid, int) or not self._serves(pid):
            return None
        return StoreStatus(pid, self._address(ports.s3), self.directory, bool(state.get("keep")))

    def environment(self) -> dict[str, str]:
        """Return the ``ESVIT_S3_*`` variables for processes that use the running server.

        Raises:
            UserError: no server is running.
        """
        running = self.status()
        if running is None:
            raise UserError(f"{self.directory}: no object store is running for this directory; start it first")
        return running.address.environment()

    def make_directory(self) -> None:
        """Create the data directory if necessary.

        Raises:
            UserError: the directory cannot be used.
        """
        if problem := weed.path_problem(self.directory):
            raise PathError(f"{self.directory}: {problem}; choose another folder")
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            mark(self.directory)
            data = self.directory / "data"
            data.mkdir(mode=0o700, exist_ok=True)
            data.chmod(0o700)
        except OSError as error:
            raise _unusable(self.directory, error) from None

    def _launch(self, keep: bool) -> StoreAddress:
        require_room(self.directory)
        self._stop_orphans()
        self._remove_sockets()
        weed.write_configuration(self.directory)
        shutil.rmtree(self.directory / weed.MASTER, ignore_errors=True)  # stale state, see weed.py
        (self.directory / weed.MASTER).mkdir(mode=0o700)
        reason = ""
        for attempt in range(_START_ATTEMPTS):
            ports = self._choose_ports(again=attempt > 0)
            process = self._process = self._spawn(ports)
            self._write_state({"pid": process.pid, "keep": keep, "ports": asdict(ports)})
            address = self._address(ports.s3)
            try:
                if self._wait_until_ready(process, address):
                    self._abort_unfinished_uploads(address)
                    return address
            except BaseException:  # Ctrl-C, or no answer in time
                self._end(process.pid)
                raise
            self._remove_sockets()
            reason = self._exit_reason()
            require_room(self.directory)
            # Another program may have taken one of the ports: try others.
        raise StoreUnavailable(
            f"{self.directory}: the object store does not start ({reason}); see {self.directory / LOG} for details"
        )

    def _spawn(self, ports: weed.Ports) -> subprocess.Popen[bytes]:
        log = self.directory / LOG
        if log.exists():  # keep the previous server's log
            log.replace(log.with_suffix(".log.1"))
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            return subprocess.Popen(
                weed.command(self.directory, ports),
                cwd=self.directory,
                env=weed.environment(self.directory),
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=descriptor,
                start_new_session=True,
            )
        finally:
            os.close(descriptor)

    def _wait_until_ready(self, process: subprocess.Popen[bytes], address: StoreAddress) -> bool:
        """Wait until the server is ready; return False if it exited instead."""
        # Another program on the port that does not answer, or answers wrongly, must not block this: the server then exits by
        # itself.
        connection = Connection(address, RetryPolicy(attempts=1), read_seconds=1.0)
        deadline = time.monotonic() + _START_SECONDS
        while process.poll() is None:
            try:
                connection.call("starting", lambda client: client.list_buckets())
                return process.poll() is None
            except StoreFull:
                raise
            except StoreError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(_POLL_SECONDS)
        return False

    def _abort_unfinished_uploads(self, address: StoreAddress) -> None:
        """Abort the unfinished uploads of killed writers; a writer that still runs starts its upload again."""
        store = ObjectStore(address)
        for bucket in store.buckets():
            store.abort_uploads(f"s3://{bucket}")

    def _choose_ports(self, again: bool) -> weed.Ports:
        """Return the previous ports, so that clients find the server again, or other ports if they are in use."""
        wanted, last = _wanted_port(), self._last_ports()
        if last is None or again or wanted not in (None, last.s3):
            return weed.free_ports(wanted)
        if any(weed.port_error(port) for port in asdict(last).values()):
            return weed.free_ports(wanted)
        return last

    def _end(self, pid: int) -> None:
        for number, seconds in ((signal.SIGTERM, _STOP_SECONDS), (signal.SIGKILL, _KILL_SECONDS)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                if self._process is not None:
                    self._process.poll()  # reap our own child
                if _ended(pid):
                    return
                time.sleep(_POLL_SECONDS)
        raise StoreUnavailable(f"{self.directory}: the object store (process {pid}) does not exit; kill it")

    def _stop_orphans(self) -> bool:
        """Stop a server of this directory that has no state file; return whether there was one.

        The process that started it was killed, or the directory was deleted.
        """
        strays = [pid for pid in psutil.pids() if self._serves(pid)]
        for pid in strays:
            self._end(pid)
        return bool(strays)

    def _serves(self, pid: int) -> bool:
        """Return whether the process is the server of this directory, and not another process with a reused pid."""
        try:
            # A zombie process has an empty command line.
            return weed.data_argument(self.directory) in psutil.Process(pid).cmdline()
        except psutil.Error:
            return False

    def _address(self, port: int) -> StoreAddress:
        access_key, secret_key = weed.read_credentials(self.directory)
        return StoreAddress(
            endpoint=f"{weed.LOOPBACK}:{port}",
            access_key=access_key,
            secret_key=secret_key,
            secure=False,
            region="us-east-1",
            directory=self.directory,
        )

    def _exit_reason(self) -> str:
        """Return the reason why the server exited: the last fatal line of its log, or else the last line."""
        text = (self.directory / LOG).read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        fatal = [line.split("] ", 1)[-1] for line in lines if line.startswith("F")]
        return (fatal or lines or ["its log is empty"])[-1][:300]

    def _remove_sockets(self) -> None:
        ports = self._last_ports()
        for path in weed.sockets(ports) if ports is not None else ():
            with contextlib.suppress(OSError):
                path.unlink()

    def _last_ports(self) -> weed.Ports | None:
        """Return the ports of the server that is running or ran last."""
        try:
            return weed.Ports(**{name: int(port) for name, port in self._read_state()["ports"].items()})
        except (LookupError, AttributeError, TypeError, ValueError):
            return None

    def _read_state(self) -> dict[str, Any]:
        try:
            state = json.loads((self.directory / _STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}

    def _write_state(self, state: dict[str, Any]) -> None:
        weed.write_private(self.directory / _STATE, json.dumps(state, indent=1))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock for starting or stopping the server."""
        try:
            file = (self.directory / _LOCK).open("w")
        except OSError as error:
            raise _unusable(self.directory, error) from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                raise _unusable(self.directory, error) from None
            try:
                yield
            except OSError as error:
                raise _unusable(self.directory, error) from error


def _ended(pid: int) -> bool:
    """Return whether the process has ended and closed its files."""
    try:
        process = psutil.Process(pid)
        # A zombie may still have running threads.
        return process.status() == psutil.STATUS_ZOMBIE and process.num_threads() <= 1
    except psutil.NoSuchProcess:
        return True


def _unusable(directory: Path, error: OSError) -> StoreError:
    if is_full(error):
        require_room(directory)
    return disk_error_class(error)(
        f"{directory}: cannot store the object store's data ({error.strerror or error}); choose a writable directory"
    )


def _wanted_port() -> int | None:
    """Return the port that the user requests.

    Raises:
        UserError: the value is not a port, or the port is in use.
    """
    text = os.environ.get(PORT_VARIABLE, "").strip()
    if not text:
        return None
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise UserError(f"{PORT_VARIABLE}={text}: expected a port between 1 and 65535; unset it to take any free one")
    error = weed.port_error(int(text))
    if error is not None:
        reason = "in use by another program" if error.errno == errno.EADDRINUSE else (error.strerror or str(error))
        raise UserError(f"{PORT_VARIABLE}={text}: {reason}; choose another port, or unset it to take any free one")
    return int(text)
