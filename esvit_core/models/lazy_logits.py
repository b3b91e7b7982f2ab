"""Logits of many prototypes that are computed where they are needed, and nowhere stored.

With K = 65,536 a row of float32 logits takes 256 kB, and an image of the published recipe has 280 of them, student and
teacher together. Its embedding, from which a matrix product makes the row, takes one kB.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from esvit_core.kernels.onednn_linear import linear

WEIGHT_ROWS = 2048  # prototypes that are converted at a time: 2 MB of float32 stay in the cache
FEWEST_PROTOTYPES = 16384  # from this K on, on a processor; with fewer the logits are small and are simply there


@dataclass(frozen=True, eq=False)
class LazyLogits:
    """The product ``embeddings @ weight.T`` (rows, K), in place of a tensor.

    Attributes:
        embeddings: (rows, D), in the dtype that the product is computed in.
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

    def __len__(self) -> int:
        return len(self.embeddings)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """The logits of some rows."""
        return linear(self.embeddings[rows], self.weight.to(self.dtype))

    def converted(self) -> LazyLogits:
        """The same, with the prototypes in the dtype of the products: what takes longer than the product of few rows."""
        return LazyLogits(self.embeddings, self.weight.detach().to(self.dtype))

    def sum(self, dtype: torch.dtype) -> Tensor:
        """Sum over the rows, (1, K): the product of the sum."""
        total = self.embeddings.sum(0, keepdim=True, dtype=dtype)
        return torch.cat([total @ part.to(dtype).T for part in self.weight.split(WEIGHT_ROWS)], -1)

    def dense(self) -> Tensor:
        """All of them, as a tensor."""
        return self[slice(None)]


def are_many(rows: Tensor, prototypes: int) -> bool:
    """Whether the logits of ``prototypes`` are to be computed where they are needed. A GPU has kernels of its own."""
    return rows.device.type == "cpu" and prototypes >= FEWEST_PROTOTYPES
