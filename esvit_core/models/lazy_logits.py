"""Lazy logits: logits of many prototypes that are computed where they are used and never stored as a whole.

With K = 65,536 a row of float32 logits takes 256 kB, and an image of the published recipe has 280 rows, student and
teacher together. The embedding from which a matrix product computes the row takes 1 kB.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from esvit_core.kernels.onednn_linear import linear

WEIGHT_CHUNK_ROWS = 2048  # prototypes that are converted at a time: 2 MB of float32 stay in the cache
MIN_LAZY_PROTOTYPES = 16384  # from this K on a CPU uses lazy logits; with fewer prototypes stored logits are small


@dataclass(frozen=True, eq=False)
class LazyLogits:
    """The product ``embeddings @ weight.T`` (rows, K), with the part of a tensor's interface that the training uses.

    Attributes:
        embeddings: (rows, D), in the dtype of the product.
        weight: the prototypes, (K, D).
    """

    embeddings: Tensor
    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.embeddings), len(self.weight)

    @property
    def dtype(self) -> torch.dtype:
        return self.embeddings.dtype

    @property
    def device(self) -> torch.device:
        return self.embeddings.device

    @property
    def requires_grad(self) -> bool:
        return self.embeddings.requires_grad

    def __len__(self) -> int:
        return len(self.embeddings)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """Compute the logits of some rows."""
        return linear(self.embeddings[rows], self.weight.to(self.dtype))

    def detach(self) -> LazyLogits:
        """Return the logits without gradient; the weight is converted once, which takes longer than a few rows."""
        return LazyLogits(self.embeddings.detach(), self.weight.detach().to(self.dtype))

    def register_hook(self, hook: Callable[[Tensor], Any]) -> Any:
        """Register a hook for the gradient of the embeddings, which replaces that of the logits."""
        return self.embeddings.register_hook(hook)

    def sum(self, dim: Literal[0], *, keepdim: Literal[True], dtype: torch.dtype) -> Tensor:
        """Sum over the rows, (1, K): the product of the summed embeddings."""
        total = self.embeddings.sum(dim, keepdim=keepdim, dtype=dtype)
        return torch.cat([total @ part.to(dtype).T for part in self.weight.split(chunk_rows(self.weight))], -1)

    def materialize(self) -> Tensor:
        """Compute all logits, (rows, K)."""
        return self[slice(None)]


Logits = Tensor | LazyLogits


def chunk_rows(weight: Tensor) -> int:
    """Return how many prototypes to convert at a time: on a GPU all, because each chunk is a launch."""
    return WEIGHT_CHUNK_ROWS if weight.device.type == "cpu" else len(weight)


def materialize(logits: Logits) -> Tensor:
    """Return the logits as a tensor, (rows, K)."""
    return logits.materialize() if isinstance(logits, LazyLogits) else logits


def lazy_on_cpu(setting: bool | Literal["auto"], prototypes: int) -> bool:
    """Return whether a CPU computes the logits of K prototypes lazily, given ``training.lazy_logits``."""
    return prototypes >= MIN_LAZY_PROTOTYPES if setting == "auto" else setting
