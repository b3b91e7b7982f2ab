"""Servers that misbehave: one that cuts connections in front of the real one, and one that reads from a script."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import select
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from esvit_core.storage import ObjectStore, StoreAddress
from esvit_core.storage.retry import RetryPolicy

# Many attempts, no patience: what is tested is which failures are repeated, not the waiting.
QUICK = RetryPolicy(attempts=4, base=0.01, cap=0.02)


class CuttingProxy:
    """A TCP proxy that ends connections as it is told; otherwise it passes everything on.

    ``plan`` holds what is to happen to the next connections, one after the other:

    - a number: it ends after so many bytes of the server's answers;
    - a method, such as ``"PUT"``: it ends when the server answers such a request, and nothing of the answer arrives;
    - ``"refuse"``: it ends at once.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.plan: list[int | str] = []
        self.cuts = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                fate = self.plan.pop(0) if self.plan else "pass"
                if fate == "refuse":
                    self.cuts += 1
                    client.close()
                    continue
                threading.Thread(target=self._serve, args=(client, fate), daemon=True).start()

    def _serve(self, client: socket.socket, fate: int | str) -> None:
        left = fate if isinstance(fate, int) else float("inf")
        asked = ""
        with client, socket.create_connection(self.target) as server, contextlib.suppress(OSError):
            while True:
                for source in select.select([client, server], [], [])[0]:
                    data = source.recv(65536)
                    if not data:
                        return
                    if source is client:
                        method = data.partition(b" ")[0].decode(errors="replace")
                        asked = method if method in ("GET", "HEAD", "PUT", "POST", "DELETE") else asked
                        server.sendall(data)
                    elif asked == fate or len(data) > left:
                        self.cuts += 1
                        client.sendall(b"" if asked == fate else data[: int(left)])
                        return
                    else:
                        left -= len(data)
                        client.sendall(data)


@pytest.fixture
def cutting_proxy() -> Iterator[Callable[[int], CuttingProxy]]:
    """Put a proxy in front of a port of this machine: ``cutting_proxy(9000)``."""
    with contextlib.ExitStack() as stack:

        def start(port: int) -> CuttingProxy:
            made = CuttingProxy(("127.0.0.1", port))
            stack.callback(made.close)
            return made

        yield start


@pytest.fixture
def proxy(store) -> Iterator[CuttingProxy]:
    host, port = store.address.endpoint.split(":")
    made = CuttingProxy((host, int(port)))
    yield made
    made.close()


@pytest.fixture
def through_proxy(store, proxy: CuttingProxy) -> ObjectStore:
    """The test's store, seen through the proxy."""
    return ObjectStore(dataclasses.replace(store.address, endpoint=f"127.0.0.1:{proxy.port}"), QUICK)


class ScriptedServer(http.server.ThreadingHTTPServer):
    """An S3 server that gives the answers it was told to give, one after the other, the last one for ever."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.answers: list[tuple[int, str]] = []
        self.requests: list[str] = []

    def store(self) -> ObjectStore:
        address = StoreAddress(
            f"127.0.0.1:{self.server_address[1]}", "key", "secret-that-nobody-sees", secure=False, region="us-east-1"
        )
        return ObjectStore(address, QUICK)


class _Answer(http.server.BaseHTTPRequestHandler):
    server: ScriptedServer
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append(f"{self.command} {self.path}")
        answers = self.server.answers
        status, code = answers.pop(0) if len(answers) > 1 else answers[0]
        body = f"<Error><Code>{code}</Code><Message>so it says</Message></Error>".encode() if code else b""
        self.send_response(status)
        self.send_header("Content-Type", "application/xml" if code else "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _answer  # noqa: N815

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def scripted() -> Iterator[Callable[..., ScriptedServer]]:
    """Start a server with a script: ``scripted((503, "SlowDown"), (200, ""))``."""
    with contextlib.ExitStack() as stack:

        def start(*answers: tuple[int, str]) -> ScriptedServer:
            server = ScriptedServer()
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            server.answers = list(answers)
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            return server

        yield start
