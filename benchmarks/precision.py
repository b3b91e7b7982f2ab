"""Compare training in bfloat16 with float32: losses of short trainings in both, with several seeds each.

    python benchmarks/precision.py --plot docs/precision.png

The recipe is the demo's, on the sample images. The losses of the float32 runs, averaged over a window of steps, form
a band over the seeds. The last line is JSON: the share of windows in which the mean of the bfloat16 runs lies within it,
and the largest distance between the two precisions of one seed, in standard deviations over the seeds.
"""

from __future__ import annotations

import argparse
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import torch
from machine import describe
from PIL import Image

from esvit_core.config import Config
from esvit_core.data.loading.loader import TrainLoader
from esvit_core.models.precision import Precision
from esvit_core.training.allocator import keep_freed_memory
from esvit_core.training.distributed.processes import World
from esvit_core.training.loop import training_step
from esvit_core.training.state import assemble_train_state

SAMPLES = Path(__file__).parent.parent / "samples" / "clipart.zip"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Samples:
    """The images of an archive, decoded, (H, W, 3) uint8, with sides of at most 64 pixels."""

    def __init__(self, archive: Path) -> None:
        self._images = []
        with zipfile.ZipFile(archive) as opened:
            for name in sorted(opened.namelist()):
                if name.lower().endswith((".png", ".jpg")):
                    with Image.open(io.BytesIO(opened.read(name))) as image:
                        flat = Image.new("RGBA", image.size, "white")
                        flat.alpha_composite(image.convert("RGBA"))
                    flat.thumbnail((64, 64))
                    self._images.append(np.asarray(flat.convert("RGB")))

    weights = None

    @property
    def shard_sizes(self) -> list[int]:
        return [len(self)]

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int) -> np.ndarray:
        return self._images[index]


def losses(images: Samples, precision: str, seed: int, steps: int, batch: int) -> list[float]:
    """Run a training and return the loss of every step."""
    per_epoch = len(images) // batch
    config = Config.load(
        "demo", [f"seed={seed}", f"training.batch_size={batch}", f"training.epochs={-(-steps // per_epoch)}"]
    )
    world = World(0, 1, torch.device("cpu"), None)
    state = assemble_train_state(config, world, TrainLoader(images, config, seed))
    state.precision = Precision(PRECISIONS[precision], "benchmark", "cpu")
    found: list[float] = []
    for loaded in state.batches():
        found.append(float(training_step(state, loaded, state.schedule_values()).terms.total))
        state.progress.step += 1
        if len(found) == steps:
            break
    return found


def smooth(curve: list[float], window: int) -> np.ndarray:
    """Average over consecutive windows."""
    return np.asarray(curve)[: len(curve) // window * window].reshape(-1, window).mean(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--window", type=int, default=10, help="number of steps to average")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    keep_freed_memory()
    images = Samples(SAMPLES)
    print(f"{len(images)} images, {arguments.steps} steps of {arguments.batch}, {describe(torch.device('cpu'))}")
    curves: dict[str, np.ndarray] = {}
    for name in PRECISIONS:
        runs = []
        for seed in range(arguments.seeds):
            runs.append(losses(images, name, seed, arguments.steps, arguments.batch))
            print(f"{name:9} seed {seed}: {runs[-1][0]:.3f} ... {np.mean(runs[-1][-20:]):.3f}", flush=True)
        curves[name] = np.stack([smooth(run, arguments.window) for run in runs])  # (seeds, windows)
    exact, rounded = curves["float32"], curves["bfloat16"]
    mean = rounded.mean(0)
    inside = (exact.min(0) <= mean) & (mean <= exact.max(0))
    distance = np.abs(rounded - exact).max(0) / exact.std(0, ddof=1)
    if arguments.plot:
        plot(exact, rounded, arguments.window, arguments.plot)
    result = {"inside": float(inside.mean()), "largest_distance": float(distance.max())}
    print(json.dumps({name: round(value, 3) for name, value in result.items()}))


def plot(exact: np.ndarray, rounded: np.ndarray, window: int, path: Path) -> None:
    """Plot the band of float32 and the runs in bfloat16."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 3.4))
    steps = (np.arange(exact.shape[1]) + 0.5) * window
    axis.fill_between(steps, exact.min(0), exact.max(0), color="#1f77b4", alpha=0.3, label="float32, all seeds")
    for number, curve in enumerate(rounded):
        axis.plot(steps, curve, color="#d95f02", linewidth=0.9, label=None if number else "bfloat16, each seed")
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
