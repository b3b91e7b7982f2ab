"""Measure the gain from pre-training on photographs, and from the region task: 20-NN and linear probe on CIFAR-10.

    python benchmarks/cifar10.py DIR --results docs/cifar10.jsonl [--seeds 0 1 2] [--epochs 20] [--set key=value ...]
    python benchmarks/cifar10.py DIR --results docs/cifar10.jsonl --after-view 40 --epochs 10
    python benchmarks/cifar10.py --results docs/cifar10.jsonl --plot docs/cifar10.png

DIR holds CIFAR-10 as ``train/<class>/*.jpg`` and ``test/<class>/*.jpg``. Each seed is trained on 500 images per class,
once view only and once with both tasks, and evaluated on the whole test set together with the baseline, the network with
its initial weights. Results that are already in the file are not measured again, so the command can be interrupted. With
``--after-view N`` both tasks continue from a view-only run of N epochs, as most of the published runs did. The last line
is JSON: mean and standard deviation over the seeds, percent.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import tarfile
import textwrap
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from esvit_core.config import Config
from esvit_core.evaluation.results import read_result
from esvit_core.evaluation.visualize import INDEX
from esvit_core.runs.run import identify_run, run_uri
from esvit_core.runs.training_summary import read_summary
from esvit_core.storage import join_uri
from esvit_core.storage.session import open_store
from esvit_core.weights.weight_source import pin_source

RECIPE, RECIPE_NAME = Path(__file__).with_suffix(".yaml"), "cifar10-micro"
PER_CLASS = 500
EPOCHS = 20
TASKS = {"view": "view only", "view + region": "view + region"}
MEASURES = {
    "knn/20": "20-NN top-1, %",
    "linear": "linear probe top-1, %",
    "correspondence": "correspondence, %",
}
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="?", type=Path, metavar="DIR")
    parser.add_argument(
        "--results", type=Path, required=True, help="file of JSON lines, one per run; results are appended"
    )
    parser.add_argument("--work", type=Path, default=Path("cifar10-runs"), help="folder of the runs")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument(
        "--after-view", type=int, default=0, metavar="EPOCHS", help="epochs of a view-only run before this one"
    )
    parser.add_argument("--recipe", default=str(RECIPE), help="recipe: a file, or the name of a preset")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--plot", type=Path, help="file to which the results are plotted")
    arguments = parser.parse_args()
    rows = read(arguments.results)
    if arguments.images:
        arguments.work.mkdir(parents=True, exist_ok=True)
        data = subset(arguments.images, arguments.work / "cifar10.tar")
        name = Config.load(arguments.recipe).recipe
        for seed in arguments.seeds:
            for task in arguments.tasks:
                settings = [f"training.epochs={arguments.epochs}", *arguments.settings]
                wanted = {"task": task, "seed": seed, "settings": settings, "after_view": arguments.after_view}
                wanted["recipe"] = name
                if any(all(row[key] == value for key, value in wanted.items()) for row in rows):
                    continue
                rows.append(measure(data, wanted, arguments.recipe, arguments.work))
                with arguments.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    figures = summarise(rows)
    if arguments.plot:
        plot(rows, arguments.plot)
    for (settings, task), measured in figures.items():
        text = ", ".join(f"{name} {mean:.1f} ± {spread:.1f}" for name, (mean, spread) in measured.items())
        print(f"{task:14} {text}  ({settings})")
    print(json.dumps([{"settings": s, "task": t, **measured} for (s, t), measured in figures.items()]))


def subset(images: Path, archive: Path, per_class: int = PER_CLASS) -> Path:
    """Write the first images of each training class by name, and the whole test set, to a tar."""
    if archive.exists():
        return archive
    part = archive.with_suffix(".part")
    with tarfile.open(part, "w") as tar:
        for split, most in (("train", per_class), ("test", None)):
            for folder in sorted(path for path in (images / split).iterdir() if path.is_dir()):
                for image in sorted(folder.iterdir())[:most]:
                    tar.add(image, str(image.relative_to(images)))
    part.rename(archive)
    return archive


def measure(data: Path, wanted: Row, recipe: str, work: Path) -> Row:
    """Run the pipeline and read its evaluation results.

    Args:
        data: the tar of :func:`subset`.
        wanted: the row's ``task``, ``seed``, ``settings``, ``after_view`` and the recipe's name.
        recipe: file or name of the recipe.
        work: folder of the runs.
    """
    print(f"== {wanted['task']}, seed {wanted['seed']}", flush=True)
    settings = list(wanted["settings"])
    if wanted["after_view"]:
        others = [setting for setting in settings if not setting.startswith("training.epochs=")]
        before = [f"training.epochs={wanted['after_view']}", *others]
        first = run_pipeline(data, recipe, "view", wanted["seed"], before, work)
        settings += [f"init.source={first}", "init.load=heads"]
    start = time.monotonic()
    uri = run_pipeline(data, recipe, wanted["task"], wanted["seed"], settings, work)
    with open_store(work / "store") as store:
        results = {name: read_result(store, uri, name) for name in ("knn", "linear")}
        summary = read_summary(store, uri)
        drawn = store.get_json(join_uri(uri, "visualization", INDEX))
    assert summary is not None
    figures = {
        model: {key: value for result in results.values() if result for key, value in result["results"][model].items()}
        | {"correspondence": drawn["figures"]["correspondence"][model]}
        for model in ("trained", "baseline")
    }
    return {
        **wanted,
        "trained": {key: round(figures["trained"][key], 2) for key in MEASURES},
        "baseline": {key: round(figures["baseline"][key], 2) for key in MEASURES},
        "steps": summary.steps,
        "train_seconds": summary.seconds,
        "wall_seconds": round(time.monotonic() - start, 1),
        "hardware": summary.hardware,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def run_pipeline(data: Path, recipe: str, task: str, seed: int, settings: Sequence[str], work: Path) -> str:
    """Run the pipeline unless the run is already finished, and return the run's address."""
    chosen = [f"objective.region={task != 'view'}".lower(), f"seed={seed}", *settings]
    arguments = [argument for setting in chosen for argument in ("--set", setting)]
    command = ["-m", "esvit_pipelines", "run", "--recipe", recipe, "--data", str(data), "--out", str(work)]
    subprocess.run([sys.executable, *command, *arguments], check=True)
    with open_store(work / "store") as store:
        config = pin_source(Config.load(recipe, chosen), store)
    return run_uri(config.bucket, identify_run(config, str(data)))


def read(results: Path) -> list[Row]:
    if not results.exists():
        return []
    return [
        {"after_view": 0, "recipe": RECIPE_NAME, **json.loads(line)}
        for line in results.read_text(encoding="utf-8").splitlines()
    ]


def grouped(rows: Iterable[Row]) -> dict[tuple[str, str], list[dict[str, float]]]:
    """Group the figures of the seeds by settings and task; the baseline counts as a task."""
    groups: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    baselines: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        other = [] if row["recipe"] == RECIPE_NAME else [f"recipe={row['recipe']}"]
        settings = " ".join([*row["settings"], *other])
        if row["after_view"]:  # its baseline is that of the run before
            settings += f" after_view={row['after_view']}"
        else:
            network = " ".join([*(setting for setting in row["settings"] if setting.startswith("model.")), *other])
            baselines[network or "every other run", row["seed"]] = row["baseline"]
        groups[settings, TASKS[row["task"]]].append(row["trained"])
    for (settings, _), figures in baselines.items():
        groups[settings, "baseline"].append(figures)
    return groups


def summarise(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, tuple[float, float]]]:
    """Compute mean and standard deviation (0 for one seed) of each measure."""
    out = {}
    for key, runs in sorted(grouped(rows).items()):
        columns = {name: [run[name] for run in runs] for name in MEASURES}
        out[key] = {
            name: (statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
            for name, values in columns.items()
        }
    return out


COLOURS = {"baseline": "#777777", "view only": "#1f77b4", "view + region": "#d95f02"}


def plot(rows: Sequence[Row], path: Path) -> None:
    """Plot one panel per measure and one row per setting: a colour per task, a dot per seed, a line at their mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = grouped(rows)
    settings = sorted({setting for setting, _ in groups}, key=lambda s: ((s, "baseline") not in groups, s))
    labels = [_short(setting) for setting in settings]
    heights = [0.8 + 0.5 * label.count("\n") for label in labels]
    positions = [sum(heights[:i]) + height / 2 for i, height in enumerate(heights)]
    figure, axes = plt.subplots(1, len(MEASURES), figsize=(12, 1.2 + 0.42 * sum(heights)), sharey=True)
    for axis, (name, title) in zip(axes, MEASURES.items(), strict=True):
        for (setting, task), runs in groups.items():
            y = positions[settings.index(setting)] + {"view only": -0.17, "view + region": 0.17}.get(task, 0.0)
            values = [run[name] for run in runs]
            mean, colour = statistics.mean(values), COLOURS[task]
            axis.plot([mean, mean], [y - 0.13, y + 0.13], color=colour, linewidth=2)
            axis.plot(values, [y] * len(values), "o", color=colour, alpha=0.6, markersize=5)
            beside = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
            axis.annotate(f"{mean:.1f}", (max(values), y), color=colour, **beside)
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
        axis.margins(x=0.12)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    axes[0].set_yticks(positions, labels, fontsize=9)
    axes[0].set_ylim(sum(heights), 0)
    marks = [plt.Line2D([], [], color=colour, marker="o", linestyle="", label=task) for task, colour in COLOURS.items()]
    axes[0].legend(handles=marks, frameon=False, fontsize=9, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _short(settings: str) -> str:
    """Shorten settings to keys without sections, leave out the recipe's number of epochs, and wrap the lines."""
    if "=" not in settings:
        return f"baseline, {settings}"
    changed = [re.sub(r"^\w+\.", "", setting) for setting in settings.split() if setting != f"training.epochs={EPOCHS}"]
    return textwrap.fill(", ".join(changed), 36, break_on_hyphens=False) or "the recipe"


if __name__ == "__main__":
    main()
