"""Notice that another training process was lost, whatever the main thread is doing.

A collective of NCCL does not fail when a process dies, and the main thread may be blocked behind it for as long as the
time limit of collectives. The kernel knows earlier: it closes the connections of a process that dies, and with the
settings of :func:`detect_lost_nodes` also those to a node that has disappeared without closing anything.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

# A connection is closed if the other node's kernel has acknowledged nothing for so long. The kernel answers for a
# process that is stopped or busy, so only nodes and networks that are gone are noticed.
LOST_NODE_SECONDS = 60
_PROBE_AFTER_SECONDS, _PROBE_INTERVAL_SECONDS = 20, 10


def tcp_connections() -> set[int]:
    """Return the file descriptors of this process's TCP connections; empty on systems without ``/proc``."""
    found = set()
    folder = Path("/proc/self/fd")
    for entry in list(folder.iterdir()) if folder.is_dir() else ():
        if connection := _duplicate(descriptor := int(entry.name)):
            with connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                    try:
                        connection.getpeername()
                    except OSError:
                        continue  # it listens, or it has been closed
                    found.add(descriptor)
    return found


def detect_lost_nodes(descriptors: Iterable[int]) -> None:
    """Let the kernel close TCP connections to a node that has not answered for ``LOST_NODE_SECONDS``."""
    if sys.platform != "linux":
        return
    for descriptor in descriptors:
        if connection := _duplicate(descriptor):
            with connection:  # options belong to the connection, which both descriptors share
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_AFTER_SECONDS)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_INTERVAL_SECONDS)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * LOST_NODE_SECONDS)


class PeerWatch:
    """A thread that calls a function once, as soon as a connection to another training process is closed.

    Args:
        descriptors: of the connections; they are duplicated, because the library that owns them may close its own.
        on_lost: called in the thread.
    """

    def __init__(self, descriptors: Iterable[int], on_lost: Callable[[], None]) -> None:
        self._connections = [c for d in descriptors if (c := _duplicate(d))]
        self._on_lost, self._stopped = on_lost, False
        self._wake, self._waker = socket.socketpair()
        if self._connections:
            threading.Thread(target=self._watch, name="lost-peers", daemon=True).start()

    def stop(self) -> None:
        """Stop watching: from here on the other processes may end."""
        self._stopped = True
        self._waker.close()

    def _watch(self) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        for connection in self._connections:
            poll.register(connection, getattr(select, "POLLRDHUP", 0))  # errors are reported in any case
        poll.poll()
        for connection in self._connections:
            connection.close()
        if not self._stopped:
            self._on_lost()


def _duplicate(descriptor: int) -> socket.socket | None:
    """Return a socket of its own for the descriptor; None if it is not one of a socket."""
    try:
        copy = os.dup(descriptor)
    except OSError:
        return None
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        return None
