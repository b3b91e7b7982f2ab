"""LARS: layer-wise learning rates from the norms of weights and gradients (You, Gitman and Ginsburg, 2017)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling as in the published code, which has it from Barlow Twins.

    For a parameter p of two dimensions or more with gradient g:

        g <- g + weight_decay * p
        g <- g * eta * |p| / |g|        (unchanged if either norm is 0)
        m <- momentum * m + g
        p <- p - lr * m

    One-dimensional parameters (biases and norms) take the last two lines only. timm's ``Lars`` differs: it decays and
    adapts them too, adds eps to the norm, and applies the learning rate before the momentum.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        weight_decay: of parameters with two dimensions or more.
        momentum: of the update.
        eta: trust coefficient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        eta: float = 0.001,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; gradients are not changed."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad if p.ndim == 1 else self._adapted(p, group["weight_decay"], group["eta"])
                state = self.state[p]
                if "mu" not in state:
                    state["mu"] = torch.zeros_like(p)
                p.add_(state["mu"].mul_(group["momentum"]).add_(update), alpha=-group["lr"])

    @staticmethod
    def _adapted(p: torch.Tensor, weight_decay: float, eta: float) -> torch.Tensor:
        """Return the decayed gradient, scaled to ``eta`` times the norm of the parameter, without waiting for the device."""
        assert p.grad is not None
        update = p.grad.add(p, alpha=weight_decay)
        weight, length = torch.linalg.vector_norm(p), torch.linalg.vector_norm(update)
        ratio = torch.where((weight > 0) & (length > 0), eta * weight / length, 1.0)
        return update.mul_(ratio)
