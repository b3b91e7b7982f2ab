"""Collective operations between three real processes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked
from torch import nn

from esvit_core.training.distributed.processes import GradientReducer, World

# Networks with batch norms, by name, and six images for each: a part of the program, and of the test.
BATCH_NORMED = """
import torch
from timm.layers import BatchNormAct2d
from torch import nn

def batch_normed():
    torch.manual_seed(0)
    yield "head", nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.GELU(), nn.Linear(3, 2)), torch.randn(6, 4)
    timm = nn.Sequential(nn.Conv2d(2, 3, 3), BatchNormAct2d(3), nn.Conv2d(3, 2, 2), nn.BatchNorm2d(2))
    yield "convolution", timm, torch.randn(6, 2, 5, 5)
"""

PROGRAM = """
import json, sys
import torch
from torch import nn
from esvit_core.training import distributed
from esvit_core.training.distributed.batch_norm import synchronize_batch_norms_
from esvit_core.training.distributed.processes import GradientReducer, StopSaveConsensus, init_world

distributed.BUCKET_BYTES = 40  # several buckets
world = init_world()
torch.manual_seed(0)
network = nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 2), nn.Linear(2, 2))
network[3].weight.requires_grad_(False)
unused = nn.Linear(2, 2)
reducer = GradientReducer([*network.parameters(), *unused.parameters()], world)
x = torch.arange(12.0).reshape(3, 4)[world.rank]
result = {"grads": []}
for scale in (1.0, 2.0):
    reducer.zero()
    (scale * network(x)).sum().backward()
    reducer.finish()
    result["grads"].append([p.grad.tolist() for p in network.parameters() if p.requires_grad])
    network[2].bias.grad = None  # as a frozen layer's is
reducer.zero(passes=2)
for _ in range(2):  # two micro-batches
    network(x).sum().backward()
reducer.finish()
result["accumulated"] = [p.grad.tolist() for p in network.parameters() if p.requires_grad]
result["norm"] = {}
for name, network, images in batch_normed():
    synchronize_batch_norms_(network, world)
    reducer = GradientReducer(network.parameters(), world)
    reducer.zero()
    output = network(images[2 * world.rank : 2 * world.rank + 2])
    output.square().sum().backward()
    reducer.finish()
    network.eval()
    state = {key: value.tolist() for key, value in network.state_dict().items()}
    grads = [p.grad.tolist() for p in network.parameters()]
    result["norm"][name] = [output.tolist(), grads, state, network(images).tolist()]
votes = StopSaveConsensus(world)
result["stops"] = []
for step in range(3):
    votes.begin(stop=(step == 1 and world.rank == 2), save=(step == 2 and world.rank == 0))
    result["stops"].append(votes.result())
result["mean"] = world.all_reduce_mean_(torch.tensor([float(world.rank)])).item()
result["rows"] = world.all_gather_rows(torch.tensor([[float(world.rank)], [10.0]])).tolist()
result["word"] = world.broadcast_object({"a": 1} if world.is_main else None)
world.barrier()
world.close()
if world.rank == 1:
    print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def message(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What rank 1 of three reports."""
    folder = tmp_path_factory.mktemp("rendezvous")
    processes = []
    for rank in range(3):
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": "3",
            "OMP_NUM_THREADS": "1",
            "ESVIT_RENDEZVOUS_DIR": str(folder),
        }
        processes.append(Forked(BATCH_NORMED + PROGRAM, environment=environment))
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    return json.loads(outputs[1])


def expected(scale: float) -> list[Any]:
    """Gradients of the mean over the three images, by one process."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 2), nn.Linear(2, 2))
    network[3].weight.requires_grad_(False)
    reducer = GradientReducer(network.parameters(), World(0, 1, torch.device("cpu"), None))
    reducer.zero()
    (scale * network(torch.arange(12.0).reshape(3, 4))).sum(1).mean().backward()
    reducer.finish()
    return [p.grad.tolist() for p in network.parameters() if p.grad is not None]


def test_batch_norms_use_the_global_batch(message: dict[str, Any]) -> None:
    names: dict[str, Any] = {}
    exec(BATCH_NORMED, names)
    for name, network, images in names["batch_normed"]():
        output = network(images)
        (output.square().sum() / 3).backward()
        network.eval()
        grads = [p.grad for p in network.parameters()]
        wanted = [output[2:4], grads, dict(network.state_dict()), network(images)]
        for found, expected in zip(message["norm"][name], wanted, strict=True):
            torch.testing.assert_close(_tensors(found, expected), expected, rtol=1e-4, atol=1e-5)


def _tensors(found: Any, like: Any) -> Any:
    if isinstance(like, dict):
        return {key: _tensors(found[key], value) for key, value in like.items()}
    if isinstance(like, list):
        return [_tensors(f, each) for f, each in zip(found, like, strict=True)]
    return torch.tensor(found, dtype=like.dtype)


def test_gradients_are_the_mean_over_the_processes(message: dict[str, Any]) -> None:
    for scale, grads in zip((1.0, 2.0), message["grads"], strict=True):
        for found, wanted in zip(grads, expected(scale), strict=True):
            torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted))


def test_gradients_of_micro_batches_add_up(message: dict[str, Any]) -> None:
    for found, wanted in zip(message["accumulated"], expected(2.0), strict=True):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted))


def test_one_request_makes_all_processes_stop_or_save_after_the_same_step(message: dict[str, Any]) -> None:
    assert message["stops"] == [[False, False], [True, False], [False, True]]


def test_tensors_are_averaged_and_objects_broadcast(message: dict[str, Any]) -> None:
    assert message["mean"] == 1.0
    assert message["rows"] == [[0.0], [10.0], [1.0], [10.0], [2.0], [10.0]]
    assert message["word"] == {"a": 1}


LOST = """
import os, signal, sys
import torch
from esvit_core.errors import LostPeerError
from esvit_core.training.distributed.processes import init_world

world = init_world()
world.broadcast_object("here")  # all have come
if world.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
for operation in sys.argv[1:]:
    value = torch.ones(2)
    try:
        {"mean": lambda: world.all_reduce_mean_(value), "gather": lambda: world.gather_object(1)}[operation]()
    except LostPeerError:
        print("lost")
"""


def test_losing_another_process_raises_lost_peer_error(tmp_path: Path) -> None:
    processes = []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "OMP_NUM_THREADS": "1",
            "ESVIT_RENDEZVOUS_DIR": str(tmp_path),
        }
        processes.append(Forked(LOST, "mean", "gather", environment=environment))
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert processes[0].returncode == 0 and outputs[0].split() == ["lost", "lost"]
