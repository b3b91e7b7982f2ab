"""Nothing in a step waits for the device: it asks for no tensor's value.

On a processor every value is there at once, so what is looked for is the asking: the operators that a GPU would have
to be waited for. Where there is a GPU, torch itself reports every wait.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from esvit_core.data.loading.loader import Batch
from esvit_core.kernels import choose
from esvit_core.losses import cross_entropy
from esvit_core.losses.strategy import LAZY_TRITON
from esvit_core.training import nonfinite
from esvit_core.training.loop import training_step
from esvit_core.training.optim.optimizer import restore_after_step_where_
from esvit_core.training.state import TrainState, make_deterministic

aten = torch.ops.aten
# Their result, or the shape of it, depends on values.
WAITING = {aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten._unique2}


class WaitedError(AssertionError):
    pass


class WithoutWaiting(TorchDispatchMode):
    """Refuses what a GPU would have to be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in tree_leaves(args[1:2])
        )
        # `x[:, index] = 0` makes its value on the host and copies it to the device.
        from_host = func.overloadpacket in (aten.index_put, aten.index_put_) and args[2].ndim == 0
        if func.overloadpacket in WAITING or by_mask or from_host:
            raise WaitedError(str(func))
        return func(*args, **(kwargs or {}))


def step(state: TrainState, images: int = 16) -> None:
    augment = state.config.augment
    sizes = [kind.size for kind in (augment.global_crops, *augment.local_kinds) for _ in range(kind.number)]
    crops = [torch.randn(images, 3, size, size) for size in sizes]
    if state.world.device.type == "cuda":
        crops = [crop.pin_memory() for crop in crops]
    training_step(state, Batch(crops, np.arange(images), 0.0), state.schedule_values())


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two places where a processor asks for a value to spare itself a pass, and a GPU does not."""

    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer, *(None for _ in ctx.needs_input_grad[1:])

    monkeypatch.setattr(cross_entropy.MatchedCrossEntropy, "backward", staticmethod(backward))
    monkeypatch.setattr(choose, "StochasticDepth", ())  # no layer is one


# torch's own kernels need Triton's compiler, too.
on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
    reason="no GPU, or Triton's interpreter instead of its compiler (set TRITON_INTERPRET=0)",
)
settings = pytest.mark.parametrize(
    "sections",
    [
        {},
        {"training": {"on_nonfinite": "skip"}},
        {"training": {"max_images_per_process": 8}},
        {"objective": {"region": False}, "mixup": {"use": True}},
        {"optimizer": {"name": "sgd"}},
        {"optimizer": {"name": "lars"}},
    ],
    ids=["as published", "skip", "micro-batches", "mixup", "sgd", "lars"],
)
# With the crops below, every attention in windows pads the map.
architectures = pytest.mark.parametrize(
    "model",
    [
        {"window_size": 3},
        {"window_size": 9, "patch_size": 2},
        {"arch": "vil", "stages": "l1,h2,d8,n1,s1,g1,p2,f3,a0_l2,h2,d16,n2,s0,g0,p2,f3,a0"},
        {"arch": "cvt_tiny"},
        {"arch": "deit_tiny", "patch_size": 4},
        {"arch": "resnet18"},
    ],
    ids=["swin", "swin with large windows", "vil", "cvt", "vit", "resnet"],
)


@settings
def test_a_step_waits_for_nothing(assembled: Callable[..., TrainState], sections: dict[str, Any]) -> None:
    training = {"precision": "bfloat16"} | sections.get("training", {})
    optimizer = {"freeze_last_layer_epochs": 0} | sections.get("optimizer", {})
    state = assembled(**{**sections, "training": training, "optimizer": optimizer})
    step(state)  # makes the optimizer's state
    with WithoutWaiting():
        step(state)


@architectures
def test_a_step_of_every_architecture_waits_for_nothing(
    assembled: Callable[..., TrainState], model: dict[str, Any]
) -> None:
    state = with_network(assembled, model)
    with WithoutWaiting():
        step(state, images=4)


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_a_skipped_step_is_undone_without_waiting(
    assembled: Callable[..., TrainState], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(nonfinite, "skip_step_where_", restore_after_step_where_)
    state = assembled(optimizer={"name": name}, training={"on_nonfinite": "skip"})
    with WithoutWaiting():
        step(state)


@on_gpu
def test_lazy_logits_on_a_gpu_wait_for_nothing(assembled: Callable[..., TrainState], torch_settings: None) -> None:
    changes = {"training": {"lazy_logits": True}, "optimizer": {"freeze_last_layer_epochs": 0}}
    state = assembled(torch.device("cuda", 0), **changes)
    assert state.objective.strategy is LAZY_TRITON
    step_twice_on_a_gpu(state)


@on_gpu
@settings
def test_a_step_on_a_gpu_waits_for_nothing(
    assembled: Callable[..., TrainState], sections: dict[str, Any], torch_settings: None
) -> None:
    optimizer = {"freeze_last_layer_epochs": 0} | sections.get("optimizer", {})
    state = assembled(torch.device("cuda", 0), **{**sections, "optimizer": optimizer})
    step_twice_on_a_gpu(state)


@on_gpu
@architectures
def test_a_step_of_every_architecture_on_a_gpu_waits_for_nothing(
    assembled: Callable[..., TrainState], model: dict[str, Any], torch_settings: None
) -> None:
    step_twice_on_a_gpu(with_network(assembled, model, torch.device("cuda", 0)))


@on_gpu
@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_a_skipped_step_on_a_gpu_waits_for_nothing(
    assembled: Callable[..., TrainState], name: str, torch_settings: None
) -> None:
    changes = {"optimizer": {"name": name}, "training": {"on_nonfinite": "skip"}}
    step_twice_on_a_gpu(assembled(torch.device("cuda", 0), **changes))


def with_network(assembled: Callable[..., TrainState], model: dict[str, Any], *device: torch.device) -> TrainState:
    if "arch" in model:
        others = dict.fromkeys(("patch_size", "embed_dim", "depths", "num_heads", "window_size"))
        model = others | {"drop_path": 0.0} | model
    kinds = ({"size": 32, "number": 2, "scale": (0.4, 1.0)}, {"size": 16, "number": 2, "scale": (0.05, 0.4)})
    augment = dict(zip(("global_crops", "local_crops"), kinds, strict=True))
    return assembled(*device, model=model, augment=augment, training={"precision": "bfloat16", "batch_size": 4})


def step_twice_on_a_gpu(state: TrainState) -> None:
    """The first step makes layouts and the optimizer's state, for which it may wait."""
    images = state.config.training.batch_size
    make_deterministic()
    step(state, images)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(state, images)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_synchronizing_step_is_detected(assembled: Callable[..., TrainState]) -> None:
    """On a processor, SGD with ``skip`` asks, which costs nothing there."""
    state = assembled(optimizer={"name": "sgd"}, training={"on_nonfinite": "skip"})
    with pytest.raises(WaitedError), WithoutWaiting():
        step(state)
