"""The update of student and teacher: the optimizer, clipping, the frozen last layer, the moving average.

Nothing here waits for the device: figures stay tensors until someone reads them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from esvit_core.config import Config
from esvit_core.torch_private import lerp_, looks_for_inf, multiply_, norms
from esvit_core.training.optim.lars import LARS

MOMENTUM = 0.9  # of SGD and LARS, as published


def parameter_groups(student: nn.Module) -> list[dict[str, Any]]:
    """Two groups: the parameters that decay, and biases and one-dimensional ones (norms), which do not."""
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            (spared if name.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
    return [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]


def build_optimizer(student: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW with PyTorch's betas and eps, SGD or LARS; learning rate and weight decay are set anew each step.

    Args:
        student: the network, wrapped or not.
        config: the run's configuration.
    """
    groups = parameter_groups(student)
    match config.optimizer.name:
        case "adamw":
            return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=True)
        case "sgd":
            # Not fused: that one cannot take in the prototypes, which come without momentum when they thaw.
            return torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM, foreach=True)
        case "lars":
            return LARS(groups, momentum=MOMENTUM)


def set_hyperparameters_(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """The schedules' values of a step: the learning rate for all groups, the weight decay for the first."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.param_groups[0]["weight_decay"] = weight_decay


@torch.no_grad()
def clip_gradients_(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale each parameter's gradient down to ``max_norm``, each by itself; 0: leave them.

    Returns:
        The norm of all gradients together before clipping, scalar tensor.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    stacked = torch.stack(norms(gradients))
    if max_norm > 0:
        factors = (max_norm / (stacked + 1e-6)).clamp_(max=1.0)
        multiply_(gradients, list(factors.unbind()))
    return torch.linalg.vector_norm(stacked)


def skip_step_where_(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    """Let the next ``optimizer.step()`` change nothing where ``bad``, scalar of booleans, is true.

    Fused optimizers look at it on the device, as they do for loss scaling. The others cannot: for them this waits.
    """
    if looks_for_inf(optimizer):
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
    elif bad.item():
        optimizer.zero_grad(set_to_none=True)


def freeze_last_layer_(student: nn.Module) -> None:
    """Drop the gradients of the prototypes, so that the optimizer passes them over (first epochs of a run)."""
    for name, parameter in student.named_parameters():
        if "last_layer" in name:
            parameter.grad = None


@torch.no_grad()
def update_teacher_(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """Move the teacher's parameters to ``momentum * teacher + (1 - momentum) * student``."""
    lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
