"""Measure the rate of feature extraction: ours, and the same features computed as in the published code.

    python benchmarks/features.py --arch swin_tiny_w7 --batch 16

Both compute the view features for k-NN and transfer, and the features of the last blocks for the linear probe: ours in
one pass by :func:`esvit_core.evaluation.features.compute_features`, the plain implementation in one pass for each, in
float32, with the networks of :mod:`plain_networks`. They take turns in this process on the same decoded images. The last
line is JSON: ratios of time, plain / ours, and the largest difference of ours in bfloat16, as a share of the spread.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from machine import describe
from plain_networks import plainly
from torch import nn

from esvit_core.config import Config
from esvit_core.evaluation.features import Features, compute_features, eval_transform
from esvit_core.models.factory import create_backbone

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class Noise:
    """Decoded images of noise, (H, W, 3) uint8."""

    def __init__(self, count: int, side: int) -> None:
        self.labels = np.zeros(count, np.int64)
        self._pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)

    def __len__(self) -> int:
        return len(self._pixels)

    def image(self, index: int) -> np.ndarray:
        return self._pixels[index]


@torch.no_grad()
def plain_features(
    backbone: nn.Module, images: Noise, transform: Callable[[np.ndarray], torch.Tensor], batch: int
) -> Features:
    """Extract features with one pass over the images for k-NN and another for the linear probe."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone.to(device)
    passes: list[list[np.ndarray]] = []
    for feature in (backbone, functools.partial(backbone.last_blocks, n=4)):  # type: ignore[arg-type]
        found = []
        for start in range(0, len(images), batch):
            rows = range(start, min(start + batch, len(images)))
            x = torch.stack([transform(images.image(i)) for i in rows]).to(device)
            found.append(feature(x).cpu().numpy())
        passes.append(found)
    return Features(*map(np.concatenate, passes), images.labels)


def quietly(function: Callable[[], Features]) -> Features:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        return function()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="swin_tiny_w7")
    parser.add_argument("--batch", type=int, default=16, help="images per batch")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    arguments = parser.parse_args()
    config = Config.from_mapping({"model": {"arch": arguments.arch, "drop_path": 0.0}})
    images, transform = Noise(arguments.images, config.evaluation.crop), eval_transform(config)

    def backbone() -> nn.Module:
        torch.manual_seed(0)
        return create_backbone(config.model, config.evaluation.crop).eval()

    ours = functools.partial(compute_features, backbone(), images, transform, arguments.batch)
    ways: dict[str, Callable[[], Features]] = {
        "plain-float32": functools.partial(plain_features, plainly(backbone()), images, transform, arguments.batch),
        "ours-float32": functools.partial(ours, precision="float32"),
        "ours-bfloat16": functools.partial(ours, precision="bfloat16"),
    }
    device, now = torch.device("cuda" if torch.cuda.is_available() else "cpu"), CLOCKS[arguments.clock]
    print(
        f"{arguments.arch}, {arguments.images} images, batch {arguments.batch}, {describe(device)}, "
        f"{arguments.rounds} rounds, {arguments.clock} time",
        flush=True,
    )
    results = {name: quietly(way) for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            start = now()
            quietly(way)
            seconds[name].append(now() - start)
    result = {}
    for name, values in seconds.items():
        plain = zip(seconds["plain-float32"], values, strict=True)
        ratio = statistics.median(a / b for a, b in plain)
        rate = arguments.images / statistics.median(values)
        differences = [difference(results[name], results["plain-float32"], kind) for kind in ("view", "blocks")]
        print(f"{name:14} {rate:8.2f} images/s, {ratio:5.2f} times as fast, differs by {max(differences):.1e}")
        if name != "plain-float32":
            result[name.replace("ours", "features").replace("-", "_")] = ratio
    result["bfloat16_difference"] = max(differences)
    print(json.dumps({name: round(value, 4) for name, value in result.items()}))


def difference(features: Features, of: Features, kind: str) -> float:
    """Largest difference as a share of the standard deviation over images and dimensions."""
    a, b = getattr(features, kind), getattr(of, kind)
    return float(np.abs(a - b).max() / b.std())


if __name__ == "__main__":
    main()
