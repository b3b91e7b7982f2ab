"""All private interfaces of torch that this library uses, each with a public fallback.

A private name may disappear in any version of torch. Each is looked up once, here; if it is missing, the public fallback
computes the same, slower or with more memory. ``tests/test_torch_private.py`` tests both variants of each, and checks
that no other module uses private interfaces. The exception is planning, which counts operations with ``FakeTensorMode``
and similar: it has no public counterpart, and no training needs it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Value = TypeVar("Value")


def _lookup(path: str) -> Any:
    """Return the object with a dotted name below torch; None if this version has none."""
    value: Any = torch
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


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
_deregister_triton = _lookup("_native.triton_utils.deregister_op_overrides")
_foreach_norm = _lookup("_foreach_norm")
_foreach_mul_ = _lookup("_foreach_mul_")
_foreach_lerp_ = _lookup("_foreach_lerp_")
_foreach_copy_ = _lookup("_foreach_copy_")
_weight_norm = _lookup("_weight_norm")
_disable_later = _lookup("_disable_dynamo")
_DYNAMO_UTILS = "torch._dynamo.utils"


def hooks_on_saved_tensors() -> bool:
    """Return whether default hooks on saved tensors are set, as in a block with activation checkpointing.

    Without the private function the answer is True; callers then save tensors that could be recomputed.
    """
    return _top_hooks is None or _top_hooks(False) is not None


def storage_key(tensor: Tensor) -> int:
    """Return a key shared by tensors that share memory, valid while the memory lives; works for fake tensors too."""
    storage = tensor.untyped_storage()
    key = getattr(storage, "_cdata", None)
    return storage.data_ptr() if key is None else int(key)


def has_onednn_linear() -> bool:
    """Return whether :func:`onednn_linear` calls oneDNN and not the fallback."""
    return _onednn_linear is not None


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute ``x @ weight.T + bias`` in float32 on a CPU with oneDNN, without gradient; x (..., D), weight (K, D)."""
    if _onednn_linear is None:
        return F.linear(x, weight, bias)
    out: Tensor = _onednn_linear(x, weight, bias, "none", [], "")
    return out


def outside_modes(cached: Callable[..., Value], *arguments: Any) -> Value:
    """Call a :func:`functools.lru_cache` function such that no mode of the caller affects the cached value.

    Under a mode of fake tensors, whose device need not exist on this machine, the call is not cached. Without the
    private function other modes see the function's operations.
    """
    if not _tensors_have_values():
        return cached.__wrapped__(*arguments)  # type: ignore[attr-defined]
    if _without_modes is None:
        return cached(*arguments)
    with _without_modes():
        return cached(*arguments)


def draw_below(limit: int) -> int:
    """Draw a random number from 0 to limit - 1 with torch's CPU generator, even under a mode of fake tensors.

    Without the private function it is 0 under such a mode, where only shapes matter.
    """
    if _without_modes is not None:
        with _without_modes():
            return int(torch.randint(limit, (), device="cpu"))  # whatever the default device is
    return int(torch.randint(limit, (), device="cpu")) if _tensors_have_values() else 0


def _tensors_have_values() -> bool:
    probe = torch.empty(0)
    return type(probe) is Tensor and not probe.is_meta


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the 2-norm of each tensor as scalar tensors."""
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
    """Interpolate each tensor linearly towards its target by ``weight``, in place."""
    if _foreach_lerp_ is not None:
        _foreach_lerp_(tensors, targets, weight)
        return
    for tensor, target in zip(tensors, targets, strict=True):
        tensor.lerp_(target, weight)


def convert_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target, whose dtype may differ."""
    if _foreach_copy_ is not None:
        _foreach_copy_(targets, sources)
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def weight_norm(v: Tensor, g: Tensor) -> Tensor:
    """Return the rows ``g * v / |v|``; v (K, D), g (K, 1)."""
    if _weight_norm is None:
        return v * (g / torch.linalg.vector_norm(v, dim=1, keepdim=True))
    out: Tensor = _weight_norm(v, g, 0)
    return out


def supports_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the optimizer skips a step if its attribute ``found_inf`` is set."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def deregister_triton_kernels() -> None:
    """Make torch use its kernels in CUDA where it has others in Triton, for a machine on which Triton cannot compile.

    Without the private function nothing changes.
    """
    if _deregister_triton is not None:
        _deregister_triton()


def watch_failures(give_up: Callable[[dict[int, Any], int], bool]) -> bool:
    """Make torchrun's agent call ``give_up`` before it restarts failed processes.

    Args:
        give_up: takes the failures by rank and the number of restarts left; returns whether to stop restarting.

    Returns:
        Whether this version of torch allows it. Otherwise the agent restarts after any failure, up to its limit.
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


def import_timm_without_dynamo() -> None:
    """Import timm and torchvision without ``torch._dynamo``, and make optimizers work without it.

    Dynamo takes as long to import as torch, and this library compiles nothing. But torchvision imports a function of the
    compiler, timm excludes functions from compilation while it is imported, and optimizers do so in every step. Compiling
    remains possible. Without the private names, dynamo is imported as usual. Only a program may call this, as its first
    import of networks.
    """
    if "torch._dynamo" in sys.modules or _disable_later is None:
        return
    with _dynamo_on_demand():
        import timm  # noqa: F401 (imports torchvision)
    for method in vars(torch.optim.Optimizer).values():
        if (function := getattr(method, "__wrapped__", None)) is not None:
            function.__dynamo_disable = function
    for optimizer in (torch.optim.AdamW, torch.optim.SGD):
        if (step := getattr(optimizer.step, "__wrapped__", None)) is not None:
            optimizer.step = torch.no_grad()(step)  # type: ignore[method-assign]


@contextmanager
def _dynamo_on_demand() -> Iterator[None]:
    """Let modules that are imported meanwhile refer to the compiler without importing it."""
    disable, utils = torch.compiler.disable, ModuleType(_DYNAMO_UTILS)
    utils.is_compile_supported = lambda device: _import_dynamo("is_compile_supported")(device)  # type: ignore[attr-defined]
    utils.__getattr__ = _import_dynamo  # type: ignore[method-assign]
    sys.modules[_DYNAMO_UTILS] = utils
    torch.compiler.disable = lambda fn=None, recursive=True, **_: _disable_later(fn, recursive)
    try:
        yield
    finally:
        torch.compiler.disable = disable
        if sys.modules.get(_DYNAMO_UTILS) is utils:
            del sys.modules[_DYNAMO_UTILS]


def _import_dynamo(name: str) -> Any:
    """Import the compiler after all, and return the object of this name."""
    if name.startswith("__"):  # of the module itself
        raise AttributeError(name)
    utils = sys.modules.get(_DYNAMO_UTILS)
    if utils is not None and utils.__spec__ is None:  # the one that stands in for it
        del sys.modules[_DYNAMO_UTILS]
    return getattr(importlib.import_module(_DYNAMO_UTILS), name)
