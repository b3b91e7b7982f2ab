"""Misbehaving servers: a proxy that cuts connections to the real server, and a server with scripted responses."""

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

# Several attempts with short waits: the tests are about which failures are retried, not about waiting.
QUICK = RetryPolicy(attempts=4, base=0.01, cap=0.02)


class CuttingProxy:
    """A TCP proxy that closes connections according to a plan, and otherwise forwards everything.

    ``plan`` holds the actions for the next connections, in order:

    - a number: close after that many bytes of the server's responses;
    - a method, such as ``"PUT"``: close when the server responds to such a request, and drop the response;
    - ``"refuse"``: close immediately.
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
                action = self.plan.pop(0) if self.plan else "pass"
                if action == "refuse":
                    self.cuts += 1
                    client.close()
                    continue
                threading.Thread(target=self._serve, args=(client, action), daemon=True).start()

    def _serve(self, client: socket.socket, action: int | str) -> None:
        left = action if isinstance(action, int) else float("inf")
        method_seen = ""
        with client, socket.create_connection(self.target) as server, contextlib.suppress(OSError):
            while True:
                for source in select.select([client, server], [], [])[0]:
                    data = source.recv(65536)
                    if not data:
                        return
                    if source is client:
                        method = data.partition(b" ")[0].decode(errors="replace")
                        method_seen = method if method in ("GET", "HEAD", "PUT", "POST", "DELETE") else method_seen
                        server.sendall(data)
                    elif method_seen == action or len(data) > left:
                        self.cuts += 1
                        client.sendall(b"" if method_seen == action else data[: int(left)])
                        return
                    else:
                        left -= len(data)
                        client.sendall(data)


@pytest.fixture
def cutting_proxy() -> Iterator[Callable[[int], CuttingProxy]]:
    """Start a proxy for a port of this machine: ``cutting_proxy(9000)``."""
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
    """The test's store, accessed through the proxy."""
    return ObjectStore(dataclasses.replace(store.address, endpoint=f"127.0.0.1:{proxy.port}"), QUICK)


class ScriptedServer(http.server.ThreadingHTTPServer):
    """An S3 server that returns scripted responses in order, and repeats the last one forever."""

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
