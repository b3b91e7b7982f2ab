"""The update of student and teacher: optimizer, gradient clipping, frozen last layer, moving average.

Nothing here waits for the device: values stay tensors until they are read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from timm.models import group_parameters
from torch import Tensor, nn

from esvit_core.config import Config
from esvit_core.kernels.triton_support import triton_problem
from esvit_core.torch_private import lerp_, multiply_, norms, supports_found_inf
from esvit_core.training.optim.lars import LARS

MOMENTUM = 0.9  # of SGD and LARS, as published


def parameter_groups(student: nn.Module, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Return two groups: parameters with weight decay, and those without (biases and one-dimensional parameters).

    Args:
        student: the network.
        layer_decay: factor of the learning rate from each block to the one before it. If it is not 1, there are two groups
            per block; their entry ``lr_factor`` is the factor of the learning rate.
    """
    if layer_decay != 1:
        return _groups_by_block(student, layer_decay)
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            (undecayed if name.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
    return [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}]


def _groups_by_block(student: nn.Module, layer_decay: float) -> list[dict[str, Any]]:
    factors = _block_factors(student, layer_decay)
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        factor, decayed = factors.get(name, 1.0), not (name.endswith(".bias") or parameter.ndim == 1)
        group = {"params": [], "weight_decay": 0.0, "lr_factor": factor, "decayed": decayed}
        groups.setdefault((factor, decayed), group)["params"].append(parameter)
    return list(groups.values())


def _block_factors(student: nn.Module, layer_decay: float) -> dict[str, float]:
    """Return the factor of the learning rate of each parameter of the backbone, by name."""
    inner: Any = student.get_submodule("backbone")
    prefix = "backbone."
    if hasattr(inner, "model"):  # a network of timm
        inner, prefix = inner.model, "backbone.model."
    numbers = group_parameters(inner, inner.group_matcher(coarse=False), reverse=True)
    last = max(numbers.values())
    return {f"{prefix}{name}": layer_decay ** (last - number) for name, number in numbers.items()}


def build_optimizer(student: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Build AdamW with PyTorch's betas and eps, SGD or LARS; learning rate and weight decay are set in every step.

    Args:
        student: the network, wrapped or not.
        config: the run's configuration.
    """
    groups = parameter_groups(student, config.optimizer.layer_decay)
    match config.optimizer.name:
        case "adamw":
            return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=True)
        case "sgd":
            # Not fused: fused SGD cannot handle the prototypes, which have no momentum buffer when they are unfrozen.
            return torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM, foreach=True)
        case "lars":
            return LARS(groups, momentum=MOMENTUM)


def set_hyperparameters_(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Set the schedules' values of a step: the learning rate of all groups, the weight decay of those that decay."""
    for number, group in enumerate(optimizer.param_groups):
        group["lr"] = lr * group.get("lr_factor", 1.0)
        if group.get("decayed", number == 0):
            group["weight_decay"] = weight_decay


@torch.no_grad()
def clip_gradients_(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Clip the gradient of each parameter separately to the norm ``max_norm``; 0: no clipping.

    Returns:
        Norm of all gradients together before clipping, scalar tensor.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    stacked = torch.stack(norms(gradients))
    if max_norm > 0:
        factors = (max_norm / (stacked + 1e-6)).clamp_(max=1.0)
        if factors.is_cuda and not triton_problem(factors.device):
            from esvit_core.kernels.multi_tensor_triton import multiply_each_

            multiply_each_(gradients, factors)
        else:
            multiply_(gradients, list(factors.unbind()))
    return torch.linalg.vector_norm(stacked)


def skip_step_where_(optimizer: torch.optim.Optimizer, nonfinite: Tensor) -> None:
    """Make the next ``optimizer.step()`` change nothing if ``nonfinite``, a scalar boolean tensor, is true.

    Fused optimizers read it on the device, as for loss scaling. For the others, weights and averages are restored on the
    device after the step, so that nothing waits for it; a CPU can be asked.
    """
    if supports_found_inf(optimizer):
        optimizer.found_inf = nonfinite.float()  # type: ignore[attr-defined]
    elif nonfinite.device.type != "cpu":
        restore_after_step_where_(optimizer, nonfinite)
    elif nonfinite.item():
        optimizer.zero_grad(set_to_none=True)


def restore_after_step_where_(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """Make the next ``optimizer.step()`` restore all weights and averages if ``skip``, a scalar boolean tensor, is true.

    Averages that the step creates become zero, which has the same effect on the following step as their absence. Until
    the step is done, there is a copy of all weights and averages.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    weights = [p.detach().clone() for p in parameters]
    averages = [{name: mean.clone() for name, mean in _averages(optimizer, p).items()} for p in parameters]

    @torch.no_grad()
    def restore(*_: Any) -> None:
        handle.remove()
        for p, weight, before in zip(parameters, weights, averages, strict=True):
            torch.where(skip, weight, p, out=p)
            for name, mean in _averages(optimizer, p).items():
                torch.where(skip, before.get(name, torch.zeros_like(mean)), mean, out=mean)

    handle = optimizer.register_step_post_hook(restore)


def _averages(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return the tensors that the optimizer keeps for a parameter, by name."""
    return {name: value for name, value in optimizer.state[parameter].items() if isinstance(value, Tensor)}


def freeze_last_layer_(student: nn.Module) -> None:
    """Remove the gradients of the prototypes, so that the optimizer skips them (first epochs of a run)."""
    for name, parameter in student.named_parameters():
        if "last_layer" in name:
            parameter.grad = None


def freeze_backbone_(student: nn.Module) -> None:
    """Remove the gradients of the backbone, so that the optimizer trains the heads only."""
    for name, parameter in student.named_parameters():
        if name.startswith("backbone."):
            parameter.grad = None


@torch.no_grad()
def update_teacher_(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """Set the teacher's parameters to ``momentum * teacher + (1 - momentum) * student``."""
    lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
