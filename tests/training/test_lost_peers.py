"""A training process whose main thread is blocked ends in bounded time, on a signal and when another process is lost."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import Forked

from esvit_core.launch import signals
from esvit_core.launch.signals import STOPPED_EXIT_CODE
from esvit_core.training.distributed import lost_peers
from esvit_core.training.distributed.lost_peers import PeerWatch, detect_lost_nodes, tcp_connections

# What a launch on a GPU does when its queue is full: it blocks in C, without Python's lock, and for ever.
BLOCK = """
import ctypes

def block():
    mutex = ctypes.create_string_buffer(64)
    libc = ctypes.CDLL(None)
    libc.pthread_mutex_lock(mutex)
    print("blocked", flush=True)
    libc.pthread_mutex_lock(mutex)
"""

SIGNALLED = f"""{BLOCK}
import sys
from esvit_core.launch.signals import StopRequest

stop = StopRequest()
stop.install()
if "armed" in sys.argv:
    stop.arm(lambda: print("saved", flush=True))
block()
"""

ENTER = """
import ctypes, sys

with open(f"/proc/{sys.argv[1]}/ns/net") as namespace:
    assert ctypes.CDLL(None).setns(namespace.fileno(), 0) == 0
"""

PEERS = f"""{BLOCK}
import os, sys
from esvit_core.launch.outcome import report_blocked
from esvit_core.launch.signals import StopRequest
from esvit_core.training.distributed import lost_peers

if "quick" in sys.argv:
    lost_peers.LOST_NODE_SECONDS, lost_peers._PROBE_AFTER_SECONDS, lost_peers._PROBE_INTERVAL_SECONDS = 3, 1, 1
from esvit_core.training.distributed.processes import init_world

stop = StopRequest()
stop.install()
world = init_world()
stop.arm()
lost_peers.PeerWatch(world.sockets, lambda: stop.lost_peer(report_blocked))
world.broadcast_object("here")  # all have come
print(len(world.sockets), flush=True)
block()
"""


@pytest.mark.parametrize(("state", "output"), [("armed", "saved"), ("loading", "")])
def test_a_signal_ends_a_process_whose_main_thread_is_blocked(state: str, output: str) -> None:
    environment = os.environ | {signals.GRACE_VARIABLE: "0.5"}
    command = [sys.executable, "-c", SIGNALLED, state]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "blocked\n"
    process.terminate()
    assert process.wait(60) == STOPPED_EXIT_CODE
    assert process.stdout.read().strip() == output


def start(rank: int, world_size: int, *arguments: str, network: int = 0, **variables: str) -> Forked:
    """Start a process of ``PEERS``, in the network of the process ``network`` unless that is 0."""
    environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(world_size), signals.GRACE_VARIABLE: "0.5"}
    return Forked((ENTER if network else "") + PEERS, str(network), *arguments, environment=environment | variables)


def wait_until_blocked(process: Forked) -> int:
    """Return the number of connections to the others."""
    assert process.stdout
    connections = int(process.stdout.readline())
    assert process.stdout.readline() == "blocked\n"
    return connections


def test_all_blocked_processes_end_when_one_of_them_dies(tmp_path: Path) -> None:
    processes = [start(rank, 3, ESVIT_RENDEZVOUS_DIR=str(tmp_path)) for rank in range(3)]
    assert [wait_until_blocked(process) for process in processes] == [2, 2, 2]
    processes[1].kill()
    for process in (processes[0], processes[2]):
        _, errors = process.communicate(timeout=60)
        assert process.returncode == STOPPED_EXIT_CODE
        assert "error: another training process was lost, and this one is blocked behind it" in errors
    processes[1].communicate()


@pytest.fixture
def two_nodes() -> Iterator[tuple[list[int], Callable[[], None]]]:
    """Processes in two network namespaces that are connected, and what takes the second off the network."""
    tools = [shutil.which(name) for name in ("ip", "nsenter", "unshare")]
    if os.geteuid() != 0 or not all(tools):
        pytest.skip("network namespaces need root, ip, nsenter and unshare")
    sleep = ["unshare", "--net", "sh", "-c", "echo ready; exec sleep 600"]
    nodes = [subprocess.Popen(sleep, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    if [node.stdout.readline() for node in nodes if node.stdout] != ["ready\n"] * 2:
        pytest.skip("network namespaces are not allowed here")

    def ip(node: int, *arguments: str) -> None:
        subprocess.run(["nsenter", "--target", str(nodes[node].pid), "--net", "ip", *arguments], check=True)

    ip(0, "link", "add", "name", "eth0", "type", "veth", "peer", "name", "eth0", "netns", str(nodes[1].pid))
    for node in (0, 1):
        ip(node, "address", "add", f"192.0.2.{node + 1}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip(node, "link", "set", device, "up")
    yield [node.pid for node in nodes], lambda: ip(1, "link", "set", "eth0", "down")
    for node in nodes:
        node.kill()
        node.wait()


def test_a_blocked_process_ends_when_another_node_disappears_without_closing_anything(
    two_nodes: tuple[list[int], Callable[[], None]],
) -> None:
    nodes, disconnect = two_nodes
    meet = {"MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "eth0"}
    processes = [start(rank, 2, "quick", network=nodes[rank], **meet) for rank in range(2)]
    assert [wait_until_blocked(process) for process in processes] == [1, 1]
    disconnect()
    assert processes[0].wait(60) == STOPPED_EXIT_CODE
    processes[1].kill()
    for process in processes:
        process.communicate()


def test_the_loss_of_a_node_is_noticed_within_two_minutes() -> None:
    assert lost_peers.LOST_NODE_SECONDS + signals.TRAINER_SECONDS + signals.AGENT_SECONDS < 120


@pytest.fixture
def connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        assert server.fileno() not in tcp_connections()
        with accepted:
            yield client, accepted


def test_the_kernel_closes_connections_to_a_lost_node(connection: tuple[socket.socket, socket.socket]) -> None:
    client, accepted = connection
    assert {client.fileno(), accepted.fileno()} <= tcp_connections()
    detect_lost_nodes([client.fileno()])
    user_timeout = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
    assert client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert user_timeout == 1000 * lost_peers.LOST_NODE_SECONDS
    assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0


@pytest.mark.parametrize("stopped", [False, True])
def test_a_closed_connection_is_reported_unless_the_watch_was_stopped(
    connection: tuple[socket.socket, socket.socket], stopped: bool
) -> None:
    client, accepted = connection
    calls: list[Any] = []
    watch = PeerWatch([client.fileno()], lambda: calls.append(1))
    accepted.sendall(b"a message is no loss")
    if stopped:
        watch.stop()
    accepted.shutdown(socket.SHUT_RDWR)
    if not stopped:
        while not calls:
            time.sleep(0.01)
    watch.stop()
    assert calls == ([] if stopped else [1])


def test_a_stopped_process_is_not_a_lost_one(tmp_path: Path) -> None:
    processes = [start(rank, 2, "quick", ESVIT_RENDEZVOUS_DIR=str(tmp_path)) for rank in range(2)]
    for process in processes:
        wait_until_blocked(process)
    processes[1].send_signal(signal.SIGSTOP)
    time.sleep(5)  # longer than a node may be silent here
    assert processes[0].poll() is None
    for process in processes:
        process.kill()
        process.communicate()
