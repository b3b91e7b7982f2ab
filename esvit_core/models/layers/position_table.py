"""Look up rows of a table of learned position biases, with a gradient that is summed in a fixed order on a GPU, too.

torch sums the gradients of a row that is used several times either in a random order or, where results must be the same in
every run, after sorting the index in some fifty kernels. Here the places of each row are known when the layer is made.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def places_of_rows(index: np.ndarray, rows: int) -> np.ndarray:
    """Return where each row of a table occurs.

    Args:
        index: rows, (n, L).
        rows: number of rows of the table.

    Returns:
        Positions within L, (n, rows, most); L where a row occurs less often than the most frequent one.
    """
    n, length = index.shape
    parts = np.arange(n)[:, None]
    counts = np.zeros((n, rows), dtype=np.int64)
    np.add.at(counts, (parts, index), 1)
    order = index.argsort(1, kind="stable")
    by_row = index[parts, order]
    rank = np.arange(length) - (counts.cumsum(1) - counts)[parts, by_row]  # among the places of its row
    places = np.full((n, rows, counts.max()), length)
    places[parts, by_row, rank] = order
    return places


def look_up(table: Tensor, index: Tensor, places: Tensor) -> Tensor:
    """Return ``table[index]``.

    Args:
        table: (rows, D).
        index: (n, L).
        places: :func:`places_of_rows` of the index.

    Returns:
        (n, L, D).
    """
    if not table.is_cuda:
        return table[index.reshape(-1)].view(*index.shape, -1)
    out: Tensor = LookUp.apply(table, index, places)
    return out


class LookUp(torch.autograd.Function):
    """``table[index]``; the gradient of a row is the sum over its places."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return table[index]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        padded = F.pad(gradient, (0, 0, 0, 1))  # (n, L + 1, D); the last row is zero
        at = places.flatten(1)[..., None].expand(-1, -1, gradient.shape[-1])
        of_places = padded.gather(1, at).unflatten(1, places.shape[1:])  # (n, rows, most, D)
        return of_places.sum((0, 2)), None, None
