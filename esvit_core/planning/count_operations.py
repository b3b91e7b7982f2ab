"""FLOPs and bytes of a training step, counted by running the networks once on fake tensors.

The bytes that the objective keeps follow from the number of rows and prototypes.
"""

from __future__ import annotations

import importlib.util
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from esvit_core.config import Config
from esvit_core.kernels.choose import select_triton_kernels_
from esvit_core.kernels.half_linear import HalfWeights
from esvit_core.losses.blockwise import LAZY_BLOCK_ROWS
from esvit_core.losses.lazy_triton import CHUNK_ROWS
from esvit_core.losses.strategy import logit_bytes
from esvit_core.models.lazy_logits import LazyLogits, lazy_on_cpu
from esvit_core.models.multicrop import MultiCropNetwork, NetworkOutput
from esvit_core.planning.fake_network import fake_crops, fake_network, naming_refused_sizes

# In float32: the student, its gradient, the optimizer's averages (AdamW: two), the teacher.
BYTES_A_PARAMETER = {"adamw": 20, "sgd": 16, "lars": 16}


@dataclass(frozen=True)
class Memory:
    """What a training step takes of each device's memory.

    Attributes:
        parameters: number of parameters of the student with its heads.
        fixed_bytes: memory that does not depend on the batch.
        image_bytes: additional memory per image of a micro-batch.
        checkpoint_bytes: size of a checkpoint: both networks and the optimizer's averages.
        logit_bytes: size of the logits of an image, their gradient, and the teacher's, if they are stored.
    """

    parameters: int
    fixed_bytes: float
    image_bytes: float
    checkpoint_bytes: float
    logit_bytes: float

    def bytes(self, images: int) -> float:
        """Peak memory of a step with micro-batches of ``images``."""
        return self.fixed_bytes + images * self.image_bytes

    def most_images(self, memory: float) -> int:
        """Largest micro-batch that fits into ``memory`` bytes; 0: not even one image fits."""
        return max(0, int((memory - self.fixed_bytes) // self.image_bytes))


@dataclass(frozen=True)
class Demand(Memory):
    """What a training step requires of each device.

    Attributes:
        flops: floating-point operations per image; a multiply-add counts as two.
    """

    flops: float


def count_demand(config: Config, dtype: torch.dtype, device_type: str = "cuda") -> Demand:
    """Count the FLOPs and bytes of a training step.

    Args:
        config: configuration of the run, including ``launch.activation_checkpointing``.
        dtype: dtype in which the networks compute.
        device_type: ``cpu`` computes the logits of many prototypes blockwise and keeps attention weights; a GPU (``cuda``)
            stores the logits unless ``training.lazy_logits`` is true, keeps no attention weights, and casts other operations
            under autocast.

    Raises:
        UserError: the backbone does not exist or does not take the recipe's crops.
    """
    with fake_network(config, device_type) as student, naming_refused_sizes(student, config):
        flops = _flops(student, config)
        memory = _memory(student, config, dtype, device_type)
    return Demand(**vars(memory), flops=flops)


def count_memory(config: Config, dtype: torch.dtype, device_type: str = "cuda") -> Memory:
    """Count the bytes of a training step only, in half the time. See :func:`count_demand`."""
    with fake_network(config, device_type) as student, naming_refused_sizes(student, config):
        return _memory(student, config, dtype, device_type)


def _flops(student: MultiCropNetwork, config: Config) -> float:
    """FLOPs per image of forward and backward pass, of the teacher, and of the products with the prototypes."""
    sizes = config.augment.crop_sizes
    student.set_lazy_logits(lazy_on_cpu(config.training.lazy_logits, config.head.out_dim))
    output, forward = _count(lambda: student(fake_crops(2, sizes)))
    teacher = _count(lambda: student(fake_crops(2, sizes[:2])))[1]
    again = 0.0
    if config.launch.activation_checkpointing:
        again = _count(lambda: [student.backbone(crop) for crop in fake_crops(2, sizes)])[1]
    # The backward pass has two matrix products for each one of the forward pass.
    return (3 * forward + teacher + again) / 2 + _product_flops(config, output)


def _memory(student: MultiCropNetwork, config: Config, dtype: torch.dtype, device_type: str) -> Memory:
    sizes = config.augment.crop_sizes
    student.set_lazy_logits(lazy_on_cpu(config.training.lazy_logits, config.head.out_dim))
    student.backbone.set_grad_checkpointing(config.launch.activation_checkpointing)
    halves = _select_gpu_kernels_(student, dtype) if device_type == "cuda" and dtype != torch.float32 else 0
    (kept, _), (more, output) = (_kept(student, fake_crops(n, sizes), dtype, device_type) for n in (2, 4))
    parameters = sum(p.numel() for p in student.parameters())
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    optimizer = BYTES_A_PARAMETER[config.optimizer.name]
    fixed, each = _objective_bytes(config, output, dtype, device_type)
    image = (more - kept) / 2
    return Memory(
        parameters=parameters,
        # Student and teacher have copies of weights in half precision.
        fixed_bytes=8 * parameters + (optimizer - 8) * trained + 2 * halves + (kept - 2 * image) + fixed,
        image_bytes=image + each + 4 * 3 * sum(size**2 for size in sizes),
        checkpoint_bytes=8 * parameters + (optimizer - 12) * trained,
        logit_bytes=logit_bytes(config, student.backbone, 1, dtype),
    )


def _select_gpu_kernels_(student: MultiCropNetwork, dtype: torch.dtype) -> int:
    """Select what a training on a GPU uses, as far as it is installed here; return the bytes of the weights' copies."""
    if importlib.util.find_spec("triton") is not None:
        select_triton_kernels_(student)
    return HalfWeights([student], dtype).bytes


def count_parameters(config: Config) -> int:
    """Count the parameters of the student with its heads.

    Raises:
        UserError: the backbone does not exist.
    """
    with fake_network(config) as network:
        return sum(p.numel() for p in network.parameters())


def _count(forward: Callable[[], Any]) -> tuple[Any, float]:
    """Output and FLOPs of a forward pass."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = forward()
    return output, float(counter.get_total_flops())


def _kept(
    student: MultiCropNetwork, crops: list[torch.Tensor], dtype: torch.dtype, device_type: str
) -> tuple[float, NetworkOutput]:
    """Bytes that a forward pass saves for the backward pass, and its output."""
    attention = nullcontext() if device_type == "cpu" else _FusedAttention()
    with LiveBytes() as live, _autocast(dtype, device_type), attention:
        output = student(crops)
        return live.bytes, output


@contextmanager
def _autocast(dtype: torch.dtype, device_type: str) -> Iterator[None]:
    """Do the same as ``torch.autocast``, which refuses ``cuda`` on a machine without a GPU."""
    torch.autocast_increment_nesting()
    torch.set_autocast_enabled(device_type, dtype != torch.float32)
    torch.set_autocast_dtype(device_type, dtype if dtype != torch.float32 else torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device_type, False)
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()


class _FusedAttention(TorchFunctionMode):
    """Selects the attention kernel that a GPU uses with a bias. On fake tensors torch asks a real GPU, or selects none.

    The kernel takes (B, heads, N, d) only; with more dimensions torch keeps the attention weights on a GPU, too.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or args[0].ndim != 4:
            return func(*args, **kwargs)
        q, k, v, bias = (*args, kwargs.get("attn_mask"))[:4]
        if bias is not None:
            bias = bias.expand(*q.shape[:3], k.shape[2])
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        return kernel(q, k, v, bias, True, scale=kwargs.get("scale"))[0]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the live tensors that were made in its context."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._storages: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage(), given)
        return result

    def _add(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = storage._cdata
        if key in given or key in self._storages:  # a view of an existing tensor
            return
        self._storages[key] = storage.nbytes()
        self.bytes += storage.nbytes()
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.bytes -= self._storages.pop(key)


def _rows(config: Config, output: NetworkOutput) -> tuple[int, int]:
    """Rows of logits per image: the student's, and the teacher's for the two global crops."""
    regions = output.regions_per_crop if config.objective.region else []
    return len(output.regions_per_crop) + sum(regions), 2 + sum(regions[:2])


def _product_flops(config: Config, output: NetworkOutput) -> float:
    """FLOPs per image of the products with the prototypes, of student and teacher, where the objective computes them."""
    if not isinstance(output.view_logits, LazyLogits):
        return 0.0
    student, teacher = _rows(config, output)
    return 2.0 * config.head.out_dim * config.head.bottleneck_dim * (3 * student + teacher)


def _objective_bytes(
    config: Config, output: NetworkOutput, dtype: torch.dtype, device_type: str
) -> tuple[float, float]:
    """Bytes of the logits, their gradients and the teacher's distributions: fixed, and per image."""
    student, teacher = _rows(config, output)
    K, width = config.head.out_dim, dtype.itemsize
    if device_type == "cpu" and isinstance(output.view_logits, LazyLogits):
        # Logits of a few images, the gradient of a head's prototypes, and a product to add to it.
        few = max(1, LAZY_BLOCK_ROWS // student)
        return (few * (student * width + teacher * 4) + 2 * config.head.bottleneck_dim * 4) * float(K), 0.0
    if device_type == "cuda" and config.training.lazy_logits is True:
        # Logits of a few images, the gradients of both heads' prototypes, and a product to add to one of them.
        few = max(1, CHUNK_ROWS // student)
        return (few * (student + teacher) * width + 3 * config.head.bottleneck_dim * 4) * float(K), 0.0
    dense = not isinstance(output.view_logits, LazyLogits)  # in which case the student's logits are counted already
    distribution = 0 if device_type == "cuda" else 4  # a GPU's kernels compute it where they use it
    return 0.0, (student * width * (1 if dense else 2) + teacher * (width + distribution)) * float(K)
