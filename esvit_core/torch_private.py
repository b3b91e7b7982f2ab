"""All that this library uses of torch's private interfaces, each with the public way that replaces it.

A private name may be gone in any version of torch. It is looked up once, here, and where it is missing the public way
computes the same, slower or with more memory. ``tests/test_torch_private.py`` tries both ways of each, and holds that no
other module reaches into torch; the planning's counters (``FakeTensorMode`` and its like) are the exception, for they
have no public counterpart and no training needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Value = TypeVar("Value")


def _lookup(path: str) -> Any:
    """The object below torch with a dotted name; None: this torch has none."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _disable_modes() -> Any:
    try:
        from torch.utils._python_dispatch import _disable_current_modes
    except ImportError:
        return None
    return _disable_current_modes


def _linear_pointwise() -> Any:
    try:
        return torch.ops.mkldnn._linear_pointwise
    except AttributeError:
        return None


_top_hooks = _lookup("_C._autograd._top_saved_tensors_default_hooks")
_onednn_linear = _linear_pointwise()
_without_modes = _disable_modes()
_foreach_norm = _lookup("_foreach_norm")
_foreach_mul_ = _lookup("_foreach_mul_")
_foreach_lerp_ = _lookup("_foreach_lerp_")
_weight_norm = _lookup("_weight_norm")


def hooks_on_saved_tensors() -> bool:
    """Whether somebody has set default hooks on what autograd keeps, as a checkpointed block does.

    Without the private function the answer is True, and nothing is recomputed that could be kept: more memory.
    """
    return _top_hooks is None or _top_hooks(False) is not None


def storage_key(tensor: Tensor) -> int:
    """A number that tensors have in common which share memory, while it lives; of fake tensors, too."""
    storage = tensor.untyped_storage()
    key = getattr(storage, "_cdata", None)
    return storage.data_ptr() if key is None else int(key)


def has_onednn_linear() -> bool:
    """Whether :func:`onednn_linear` is oneDNN's product, and not torch's own choice."""
    return _onednn_linear is not None


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` in float32 on a CPU by oneDNN, without a gradient; x (..., D), weight (K, D)."""
    if _onednn_linear is None:
        return F.linear(x, weight, bias)
    out: Tensor = _onednn_linear(x, weight, bias, "none", [], "")
    return out


def outside_modes(cached: Callable[..., Value], *arguments: Any) -> Value:
    """Call a function of :func:`functools.lru_cache` so that no fake tensor of the caller's mode gets into the cache.

    Without the private function a call under such a mode is computed anew and not cached.
    """
    if _without_modes is not None:
        with _without_modes():
            return cached(*arguments)
    return cached(*arguments) if _tensors_have_values() else cached.__wrapped__(*arguments)  # type: ignore[attr-defined]


def draw_below(limit: int) -> int:
    """A random number from 0 to limit - 1 by torch's CPU generator, under a mode of fake tensors, too.

    Without the private function it is 0 there, where only shapes matter.
    """
    if _without_modes is not None:
        with _without_modes():
            return int(torch.randint(limit, ()))
    return int(torch.randint(limit, ())) if _tensors_have_values() else 0


def _tensors_have_values() -> bool:
    made = torch.empty(0)
    return type(made) is Tensor and not made.is_meta


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The 2-norm of each tensor, scalar tensors."""
    if _foreach_norm is None:
        return [torch.linalg.vector_norm(tensor) for tensor in tensors]
    return list(_foreach_norm(tensors))


def multiply_(tensors: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    """Multiply each tensor by its factor, in place."""
    if _foreach_mul_ is not None:
        _foreach_mul_(tensors, factors)
        return
    for tensor, factor in zip(tensors, factors, strict=True):
        tensor.mul_(factor)


def lerp_(tensors: Sequence[Tensor], targets: Sequence[Tensor], weight: float) -> None:
    """Move each tensor towards its target by a share of the way, in place."""
    if _foreach_lerp_ is not None:
        _foreach_lerp_(tensors, targets, weight)
        return
    for tensor, target in zip(tensors, targets, strict=True):
        tensor.lerp_(target, weight)


def weight_norm(v: Tensor, g: Tensor) -> Tensor:
    """Rows ``g * v / |v|``; v (K, D), g (K, 1)."""
    if _weight_norm is None:
        return v * (g / torch.linalg.vector_norm(v, dim=1, keepdim=True))
    out: Tensor = _weight_norm(v, g, 0)
    return out


def looks_for_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer passes a step over where its attribute ``found_inf`` says so."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def watch_failures(give_up: Callable[[dict[int, Any], int], bool]) -> bool:
    """Have torchrun's agent ask before it starts failed processes again.

    Args:
        give_up: from the failures by rank and the restarts that are left, whether the agent is to stop trying.

    Returns:
        Whether it will ask. Else it starts them again whatever they failed of, as often as it may.
    """
    from torch.distributed.elastic.agent.server.api import WorkerState
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.launcher import api as launcher

    if not _agent_can_be_watched(LocalElasticAgent, launcher):
        return False

    class WatchedAgent(LocalElasticAgent):
        def _monitor_workers(self, worker_group: Any) -> Any:
            result = super()._monitor_workers(worker_group)
            if result.state == WorkerState.FAILED and give_up(result.failures, self._remaining_restarts):
                self._remaining_restarts = 0
            return result

    launcher.LocalElasticAgent = WatchedAgent  # type: ignore[misc]
    return True


def _agent_can_be_watched(agent: type, launcher: Any) -> bool:
    return hasattr(agent, "_monitor_workers") and getattr(launcher, "LocalElasticAgent", None) is agent
