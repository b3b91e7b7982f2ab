"""Operations and bytes of a training step, counted on tensors without data.

The networks are run once on fake tensors, which have shapes and no values: that takes a second and no memory,
whatever their size. What the objective keeps follows from the number of rows and prototypes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from esvit_core.config import Config
from esvit_core.losses.blockwise import ROWS_OF_PRODUCTS
from esvit_core.models.lazy_logits import LazyLogits
from esvit_core.models.multicrop import MultiCropNetwork, NetworkOutput, build_network

# float32: the student, its gradient, the two averages of AdamW, the teacher.
BYTES_A_PARAMETER = {"adamw": 20, "sgd": 16, "lars": 16}


@dataclass(frozen=True)
class Demand:
    """What a step asks of each device.

    Attributes:
        parameters: of the student with its heads.
        flops: operations for each image, a multiplication and its addition counted as two.
        fixed_bytes: held whatever the batch.
        image_bytes: more for each image that is worked off at a time.
        checkpoint_bytes: of a checkpoint: both networks and the optimizer's averages.
    """

    parameters: int
    flops: float
    fixed_bytes: float
    image_bytes: float
    checkpoint_bytes: float

    def bytes(self, images: int) -> float:
        """Most memory held in a step on ``images`` at a time."""
        return self.fixed_bytes + images * self.image_bytes

    def most_images(self, memory: float) -> int:
        """How many images at a time fit into ``memory`` bytes; 0: not one."""
        return max(0, int((memory - self.fixed_bytes) // self.image_bytes))


def count_demand(config: Config, dtype: torch.dtype, device_type: str = "cuda") -> Demand:
    """Count a step of ``config``.

    Args:
        config: of the run; ``launch.activation_checkpointing`` counts too.
        dtype: of the networks' arithmetic.
        device_type: ``cpu`` makes the logits of many prototypes where they are compared; a GPU stores them. The
            attention's weights are counted in either case, though a GPU's kernels do not keep them: there the memory
            is an upper bound.

    Raises:
        UserError: no such backbone, or one that does not take the recipe's crops.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        student = build_network(config).train()
        kinds = (config.augment.global_crops, *config.augment.local_kinds)
        sizes = [kind.size for kind in kinds for _ in range(kind.number)]
        forward = _count(lambda: student(_crops(2, sizes)))
        teacher = _count(lambda: student(_crops(2, sizes[:2])))
        checkpointing = config.launch.activation_checkpointing
        again = _count(lambda: [student.backbone(crop) for crop in _crops(2, sizes)]) if checkpointing else 0.0
        student.backbone.set_grad_checkpointing(checkpointing)
        kept = [_kept(student, _crops(n, sizes), dtype) for n in (2, 4)]
        output: NetworkOutput = student(_crops(2, sizes))
    parameters = sum(p.numel() for p in student.parameters())
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    optimizer = BYTES_A_PARAMETER[config.optimizer.name]
    fixed, each = _objective_bytes(config, output, dtype, device_type)
    image = (kept[1] - kept[0]) / 2
    products = _product_flops(config, output)  # of student and teacher, for one image
    return Demand(
        parameters=parameters,
        # A backward pass is two products for each of the forward pass.
        flops=(3 * forward + teacher) / 2 + again / 2 + products,
        fixed_bytes=8 * parameters + (optimizer - 8) * trained + (kept[0] - 2 * image) + fixed,
        image_bytes=image + each + 4 * 3 * sum(size**2 for size in sizes),
        checkpoint_bytes=8 * parameters + (optimizer - 12) * trained,
    )


def count_parameters(config: Config) -> int:
    """Parameters of the student with its heads.

    Raises:
        UserError: no such backbone, or one that does not take the recipe's crops.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        return sum(p.numel() for p in build_network(config).parameters())


def shares(config: Config, processes: int) -> tuple[int, int]:
    """Images of the process with most of them, and how many it works off at a time."""
    images = -(-config.training.batch_size // processes)
    most = config.training.max_images_per_process or images
    return images, -(-images // -(-images // most))


def _crops(images: int, sizes: Sequence[int]) -> list[torch.Tensor]:
    return [torch.empty(images, 3, size, size) for size in sizes]


def _count(forward: Callable[[], Any]) -> float:
    """Operations of a forward pass."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward()
    return float(counter.get_total_flops())


def _kept(student: MultiCropNetwork, crops: list[torch.Tensor], dtype: torch.dtype) -> float:
    """Bytes that a forward pass leaves behind for the backward pass."""
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype=dtype)
    with LiveBytes() as live, autocast:
        output = student(crops)
        held = live.bytes
    del output
    return held


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is entered, and still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._storages: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage(), given)
        return result

    def _note(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = storage._cdata
        if key in given or key in self._storages:  # a view of what was there
            return
        self._storages[key] = storage.nbytes()
        self.bytes += storage.nbytes()
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.bytes -= self._storages.pop(key)


def _rows(config: Config, output: NetworkOutput) -> tuple[int, int]:
    """Rows of logits of an image: the student's, and the teacher's of the two global crops."""
    regions = output.regions_per_crop if config.objective.region else []
    return len(output.regions_per_crop) + sum(regions), 2 + sum(regions[:2])


def _product_flops(config: Config, output: NetworkOutput) -> float:
    """Operations of the prototypes' products where the networks leave them to the objective."""
    if not isinstance(output.view_logits, LazyLogits):
        return 0.0
    student, teacher = _rows(config, output)
    return 2.0 * config.head.out_dim * config.head.bottleneck_dim * (3 * student + teacher)


def _objective_bytes(
    config: Config, output: NetworkOutput, dtype: torch.dtype, device_type: str
) -> tuple[float, float]:
    """Bytes of the logits, their gradients and the teacher's distributions: whatever the batch, and for each image."""
    student, teacher = _rows(config, output)
    K, width = config.head.out_dim, dtype.itemsize
    if device_type == "cpu" and isinstance(output.view_logits, LazyLogits):
        # Of a few images at a time; and the gradient of a head's prototypes, with a product to be added to it.
        few = max(1, ROWS_OF_PRODUCTS // student)
        return (few * (student * width + teacher * 4) + 2 * config.head.bottleneck_dim * 4) * float(K), 0.0
    dense = not isinstance(output.view_logits, LazyLogits)  # then the student's logits are counted already
    return 0.0, (student * width * (1 if dense else 2) + teacher * (width + 4)) * float(K)
