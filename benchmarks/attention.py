"""Compare torch's fused attention with the plain formula on this processor.

    python benchmarks/attention.py

Shapes are those of the networks here. Forward and backward pass together, processor time of one thread. The two forms
take turns, and each ratio is the median over the rounds, fused / plain: above 1 the plain formula is faster. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from machine import describe
from torch import Tensor

from esvit_core.models.layers.attention import attend_plainly

# (images and windows), heads, queries, keys, width of a head, and whether there is a learned bias
SHAPES: dict[str, tuple[tuple[int, ...], int, int, int, int, bool]] = {
    "swin, window 7": ((4, 16), 6, 49, 49, 32, True),
    "vil, sparse": ((4, 16), 6, 49, 99, 32, True),
    "vil, full": ((4,), 12, 197, 197, 32, True),
    "cvt, window 7": ((64,), 3, 49, 49, 64, False),
    "deit, 224 pixels": ((4,), 6, 197, 197, 64, False),
    "deit, 96 pixels": ((16,), 6, 37, 37, 64, False),
}


def fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def inputs_of(name: str, dtype: torch.dtype) -> list[Tensor | None]:
    """Queries, keys and values in the layout of a linear layer's output, with adjacent heads; and the bias."""
    before, heads, queries, keys, width, biased = SHAPES[name]

    def draw(tokens: int) -> Tensor:
        return torch.randn(*before, tokens, heads, width).to(dtype).transpose(-2, -3).requires_grad_()

    bias = torch.randn(*before[1:], heads, queries, keys).to(dtype).requires_grad_() if biased else None
    return [draw(queries), draw(keys), draw(keys), bias]


def seconds(form: Callable[..., Tensor], inputs: list[Tensor | None], scale: float) -> float:
    start = time.process_time()
    for _ in range(3):
        out = form(*inputs, scale)
        torch.autograd.grad(out.sum(), [t for t in inputs if t is not None])
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(f"{describe(torch.device('cpu'))}, {rounds} rounds")
    found: dict[str, dict[str, float]] = {}
    for name in SHAPES:
        found[name] = {}
        for dtype in (torch.float32, torch.bfloat16):
            given = inputs_of(name, dtype), SHAPES[name][4] ** -0.5
            for form in (fused, attend_plainly):
                seconds(form, *given)  # warm
            ratios = [seconds(fused, *given) / seconds(attend_plainly, *given) for _ in range(rounds)]
            found[name][str(dtype).removeprefix("torch.")] = round(statistics.median(ratios), 2)
        print(f"{name:20} " + "  ".join(f"{key} {value:5.2f}" for key, value in found[name].items()), flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
