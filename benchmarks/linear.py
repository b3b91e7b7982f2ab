"""Compare the products of linear layers in float32 on this processor: oneDNN against torch's default.

    python benchmarks/linear.py

Shapes are those of Swin-T and its heads with eight images. For the forward pass, the gradient of the input and the
gradient of the weight, the table gives torch's time over oneDNN's, medians over the rounds, measured in turn; above 1
oneDNN is faster. The last line is JSON.
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

from esvit_core.torch_private import onednn_linear
from esvit_core.training.allocator import keep_freed_memory

# Rows, input width, output width.
SHAPES = {
    "stage 1, MLP": (50176, 96, 384),
    "stage 1, MLP, back": (50176, 384, 96),
    "stage 3, MLP": (3136, 384, 1536),
    "stage 3, MLP, back": (3136, 1536, 384),
    "stage 4, queries": (784, 768, 2304),
    "head, hidden": (1360, 2048, 2048),
    "prototypes": (510, 256, 65536),
}


def seconds(product: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    product()
    return time.perf_counter() - start


def ratios(rows: int, before: int, after: int, rounds: int) -> dict[str, float]:
    """Measure the ratios of the three products of a layer."""
    x, weight, gradient = torch.randn(rows, before), torch.randn(after, before), torch.randn(rows, after)
    pairs: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "forward": (lambda: F.linear(x, weight), lambda: onednn_linear(x, weight, None)),
        "input": (lambda: gradient @ weight, lambda: onednn_linear(gradient, weight.T, None)),
        "weight": (lambda: gradient.T @ x, lambda: onednn_linear(gradient.T, x.T, None)),
    }
    found = {}
    for what, (of_torch, of_onednn) in pairs.items():
        of_torch(), of_onednn()  # warm
        found[what] = round(statistics.median(seconds(of_torch) / seconds(of_onednn) for _ in range(rounds)), 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    keep_freed_memory()
    print(f"{describe(torch.device('cpu'))}, {rounds} rounds")
    found = {}
    for name, shape in SHAPES.items():
        found[name] = ratios(*shape, rounds)
        print(f"{name:20} " + "  ".join(f"{key} {value:5.2f}" for key, value in found[name].items()), flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
