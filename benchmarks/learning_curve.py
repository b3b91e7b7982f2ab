"""Measure how many images and how much training a backbone needs: 20-NN and linear probe by images and image passes.

    python benchmarks/learning_curve.py DIR --results docs/learning-curve.jsonl --plot docs/learning-curve.png
    python benchmarks/learning_curve.py DIR --results docs/learning-curve.jsonl --init RUN/backbone

DIR holds CIFAR-10 as ``train/<class>/*.jpg`` and ``test/<class>/*.jpg``. Every point is a run of the recipe `auto` on the
first images of each training class, with as many epochs as give that number of samples (images times epochs), evaluated
on the whole test set. With ``--init`` the runs start from that backbone. Points that are in the file are not measured
again, so the command can be interrupted. The last line is JSON: the points of the file.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from cifar10 import subset
from machine import describe

from esvit_core.evaluation.results import read_result
from esvit_core.runs.run import run_uri
from esvit_core.runs.training_summary import read_summary
from esvit_core.storage.session import open_store

CLASSES = 10
BUCKET = "esvit"
MEASURES = {"knn/20": "20-NN top-1, %", "linear": "linear probe top-1, %"}
Point = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, metavar="DIR")
    parser.add_argument("--results", type=Path, required=True, help="file of JSON lines, one per point")
    parser.add_argument("--work", type=Path, default=Path("learning-curve-runs"), help="folder of the runs")
    parser.add_argument("--images", type=int, nargs="+", default=[500, 2_000, 10_000, 50_000])
    parser.add_argument("--samples", type=int, nargs="+", default=[50_000, 200_000], help="images times epochs")
    parser.add_argument("--init", default="", metavar="SOURCE", help="weights to start from; default: random weights")
    parser.add_argument("--set", nargs="+", default=[], metavar="SETTING=VALUE", help="settings of all runs")
    parser.add_argument("--start", default="random weights", help="what the plot calls this start")
    parser.add_argument("--plot", type=Path, help="file to which the points are plotted")
    arguments = parser.parse_args()
    points = read(arguments.results)
    if arguments.directory:
        for samples in arguments.samples:
            for images in arguments.images:
                wanted = {"images": images, "samples": samples, "start": arguments.start}
                if images <= samples and not any(wanted.items() <= point.items() for point in points):
                    points.append(wanted | measure(arguments.directory, wanted, arguments))
                    with arguments.results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(points[-1]) + "\n")
    if arguments.plot:
        plot(points, arguments.plot)
    print(json.dumps(points))


def measure(directory: Path, wanted: Point, arguments: argparse.Namespace) -> Point:
    """Run one point, or find its run, and return its figures."""
    init, work = arguments.init, arguments.work
    work.mkdir(parents=True, exist_ok=True)
    data = subset(directory, work / f"{wanted['images']}.tar", wanted["images"] // CLASSES)
    epochs = wanted["samples"] // wanted["images"]
    command = ["run", "--data", str(data), "--out", str(work)]
    command += [word for setting in (f"training.epochs={epochs}", *arguments.set) for word in ("--set", setting)]
    command += ["--init", init] if init else []
    output = []
    with subprocess.Popen(
        [sys.executable, "-m", "esvit_pipelines", *command], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            output.append(line)
    (name,) = (found[1] for line in output if (found := re.match(r"run (\S+?)(,|\n)", line)))
    if process.returncode:
        raise SystemExit(f"the run {name} failed with exit code {process.returncode}")
    with open_store(work / "store") as store:
        uri = run_uri(BUCKET, name)
        results = [read_result(store, uri, measured) for measured in ("knn", "linear")]
        summary = read_summary(store, uri)
    assert summary is not None
    figures = {
        model: {
            key: round(result["results"][model][key], 2)
            for result in results
            for key in MEASURES
            if result and key in result["results"][model]
        }
        for model in ("trained", "baseline")
    }
    return {
        "epochs": epochs,
        **figures,
        "steps": summary.steps,
        "train_seconds": summary.seconds,
        "hardware": describe(torch.device("cpu")),
        "date": time.strftime("%Y-%m-%d"),
    }


def read(results: Path) -> list[Point]:
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()] if results.exists() else []


def plot(points: Sequence[Point], path: Path) -> None:
    """Plot one panel per measure: samples on the x-axis, a line per number of images and start, a dotted one per baseline."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    lines: dict[tuple[str, int], list[Point]] = defaultdict(list)
    for point in sorted(points, key=lambda point: point["samples"]):
        lines[point["start"], point["images"]].append(point)
    starts = sorted({start for start, _ in lines}, key=lambda start: start != "random weights")
    counts = sorted({images for _, images in lines})
    figure, axes = plt.subplots(1, len(MEASURES), figsize=(12, 4))
    for axis, (measure_name, title) in zip(axes, MEASURES.items(), strict=True):
        for (start, images), line in sorted(lines.items(), key=lambda item: (starts.index(item[0][0]), item[0][1])):
            x = [point["samples"] for point in line]
            y = [point["trained"][measure_name] for point in line]
            style = ("o-", "^--", "s-.")[starts.index(start) % 3]
            axis.plot(x, y, style, color=f"C{counts.index(images)}", label=f"{images:,} images, {start}")
        for images in counts:  # the baseline depends on the labelled images, which are those of the training
            if line := lines.get(("random weights", images)):
                height = line[0]["baseline"][measure_name]
                axis.axhline(height, color=f"C{counts.index(images)}", linewidth=1, linestyle=":")
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(FixedLocator(sorted({point["samples"] for point in points})))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:g}k"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel("images times epochs")
        axis.set_title(f"{title} (dotted: random weights, not trained)", fontsize=10)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
