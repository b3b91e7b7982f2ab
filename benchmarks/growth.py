"""Measure how time and memory of a step grow with the batch, the number of prototypes, and the number of crops.

    python benchmarks/growth.py --plot docs/growth.png

Each point is measured in its own process: our step in the chosen precision, and with ``--plain`` also the plain
step. Time is processor time of one thread, which other load affects least. The last line is JSON: for each
quantity the exponents of the power laws of time and of memory; 1 is linear.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from machine import describe

STEP = Path(__file__).with_name("step.py")
POINTS: dict[str, tuple[int, ...]] = {
    "batch": (2, 4, 8, 16),
    "prototypes": (16384, 32768, 65536, 131072),
    "local-crops": (2, 4, 8, 16),
}
CHOSEN = {"batch": 4, "prototypes": 65536, "local-crops": 8}  # values of the quantities that are not varied
NAMES = {"batch": "images", "prototypes": "prototypes K", "local-crops": "local crops"}
Point = tuple[float, float]  # seconds, GiB


def measure(who: str, arch: str, rounds: int, quantity: str, value: int) -> Point:
    """Measure the median seconds of a step, and its peak memory."""
    options = {**CHOSEN, quantity: value}
    command = [sys.executable, str(STEP), "--worker", who, "--arch", arch, "--clock", "cpu", "--device", "cpu"]
    command += [word for name, number in options.items() for word in (f"--{name}", str(number))]
    words = ["memory", "memory", *["run"] * rounds]
    done = subprocess.run(
        command,
        input="".join(f"{word}\n" for word in words),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    _, memory, *seconds = map(json.loads, done.stdout.splitlines())
    return float(np.median(seconds)), memory / 2**30


def exponent(values: Sequence[int], amounts: Sequence[float]) -> float:
    """Exponent of the power law that fits the points best in logarithms."""
    return float(np.polyfit(np.log(values), np.log(amounts), 1)[0])


def plot(found: dict[str, dict[str, list[Point]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(POINTS), figsize=(8.4, 4.2), sharex="col")
    for column, (quantity, implementations) in enumerate(found.items()):
        for row, label in enumerate(("seconds per step", "memory, GiB")):
            axis = axes[row][column]
            for who, points in implementations.items():
                amounts = [point[row] for point in points]
                axis.plot(POINTS[quantity][: len(amounts)], amounts, "o-", markersize=4, label=who)
            axis.set_ylim(bottom=0)
            axis.set_xlim(left=0)
            axis.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axis.set_ylabel(label)
        axes[1][column].set_xlabel(NAMES[quantity])
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="swin_tiny_w7")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--points", type=int, default=4, help="number of values of each quantity, from the smallest")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--plain", action="store_true", help="also measure the plain step")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    print(f"{arguments.arch}, one thread, processor time, {describe(torch.device('cpu'))}")
    whos = [f"ours-{arguments.dtype}", *(["plain-float32"] if arguments.plain else [])]
    found: dict[str, dict[str, list[Point]]] = {}
    exponents: dict[str, dict[str, float]] = {}
    for quantity, all_values in POINTS.items():
        values = all_values[: arguments.points]
        found[quantity] = {who: [] for who in whos}
        for value in values:
            for who in whos:
                point = measure(who, arguments.arch, arguments.rounds, quantity, value)
                found[quantity][who].append(point)
                print(f"{quantity:12} {value:7} {who:14} {point[0]:8.2f} s {point[1]:6.2f} GiB", flush=True)
        seconds, memory = zip(*found[quantity][whos[0]], strict=True)
        exponents[quantity] = {
            "time": round(exponent(values, seconds), 2),
            "memory": round(exponent(values, memory), 2),
        }
    if arguments.plot:
        plot(found, arguments.plot)
    print(json.dumps(exponents))


if __name__ == "__main__":
    main()
