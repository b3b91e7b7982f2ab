"""Nothing in a step waits for the device: it asks for no tensor's value.

On a processor every value is there at once, so what is looked for is the asking: the operators that a GPU would have
to be waited for.
"""

from __future__ import annotations

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
from esvit_core.training.loop import training_step
from esvit_core.training.state import TrainState

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
        if func.overloadpacket in WAITING or by_mask:
            raise WaitedError(str(func))
        return func(*args, **(kwargs or {}))


def step(state: TrainState) -> None:
    batch = Batch([torch.randn(16, 3, size, size) for size in (16, 16, 8, 8)], np.arange(16), 0.0)
    training_step(state, batch, state.schedule_values())


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two places where a processor asks for a value to spare itself a pass, and a GPU does not."""

    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer, *(None for _ in ctx.needs_input_grad[1:])

    monkeypatch.setattr(cross_entropy.MatchedCrossEntropy, "backward", staticmethod(backward))
    monkeypatch.setattr(choose, "StochasticDepth", ())  # no layer is one


@pytest.mark.parametrize(
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
def test_a_step_waits_for_nothing(assembled: Callable[..., TrainState], sections: dict[str, Any]) -> None:
    training = {"precision": "bfloat16"} | sections.get("training", {})
    optimizer = {"freeze_last_layer_epochs": 0} | sections.get("optimizer", {})
    state = assembled(**{**sections, "training": training, "optimizer": optimizer})
    step(state)  # makes the optimizer's state
    with WithoutWaiting():
        step(state)


def test_a_synchronizing_step_is_detected(assembled: Callable[..., TrainState]) -> None:
    """SGD has no switch on the device that leaves its step out: with ``skip`` it asks."""
    state = assembled(optimizer={"name": "sgd"}, training={"on_nonfinite": "skip"})
    with pytest.raises(WaitedError), WithoutWaiting():
        step(state)
