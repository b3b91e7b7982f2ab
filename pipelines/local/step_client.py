"""Run a step of a local run in a fork of the step server, or in a process of its own if there is no server.

This program is started without ``site``, in milliseconds, and imports the standard library only.

    python -IS step_client.py SOCKET PYTHON -m kfp.dsl.executor_main ...
"""

import json
import os
import signal
import socket
import sys

EXECUTOR = ["-m", "kfp.dsl.executor_main"]
STOPPED = "stopped"  # file beside the socket: the run was asked to stop, and no step may start any more
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(address: str, python: str, *arguments: str) -> int:
    if os.path.exists(os.path.join(os.path.dirname(address), STOPPED)):  # noqa: PTH110, PTH118, PTH120
        return 1  # the signal came before this process, between two steps
    server = _connect(address) if list(arguments[:2]) == EXECUTOR else None
    if server is None or not _begin(server, list(arguments[2:])):
        os.execv(python, [python, *arguments])
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # from now on the step gets them too, and this process ends after it
    return int(server.recv(16) or 1)


def _begin(server: socket.socket, arguments: "list[str]") -> bool:
    """Send what the step has of this process; returns whether a fork has begun with it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    folder = os.getcwd()  # noqa: PTH109 (pathlib takes time to import)
    content = json.dumps({"arguments": arguments, "environment": dict(os.environ), "folder": folder}).encode()
    try:
        socket.send_fds(server, [len(content).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(content)
        return server.recv(1) == b"+"
    except OSError:  # the server has ended
        return False


def _connect(address: str) -> "socket.socket | None":
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        server.connect(address)
    except OSError:
        return None
    return server


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
