"""Compare `esvit evaluate` on a network of timm with a plain script: figures, time and memory.

    python benchmarks/evaluate.py DIR --weights resnet18.pth [--network resnet18] [--model MODEL] [--out DIR]

DIR holds ``train/<class>/*.jpg`` and ``val/<class>/*.jpg``. The plain script computes the features of the images with stock
timm and its transform, batch by batch, and classifies them by 20-NN, weighted as in the published code, and by scikit-learn's
logistic regression. `esvit evaluate` measures the same network and, as its baseline, the same network with other random
weights; with ``--model`` it also measures that model, and compares the two. Without ``--weights`` the weights are random, the
same ones for the plain script and for `esvit evaluate`. Times are of the clock and of the processors; memory is that of the
largest process. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from machine import describe
from PIL import Image
from sklearn.linear_model import LogisticRegression

BATCH, K, TEMPERATURE = 64, 20, 0.07


def features(network: torch.nn.Module, files: list[Path]) -> np.ndarray:
    """Compute the features of image files with stock timm, (N, D)."""
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network, use_test_size=True))
    found = []
    with torch.inference_mode():
        for first in range(0, len(files), BATCH):
            batch = [transform(Image.open(file).convert("RGB")) for file in files[first : first + BATCH]]
            found.append(network(torch.stack(batch)).numpy())
    return np.concatenate(found)


def weighted_knn(bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, truth: np.ndarray) -> float:
    """Return the accuracy of the votes of the nearest features of the bank, percent."""
    bank, queries = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (bank, queries))
    cosines = queries @ bank.T
    nearest = np.argsort(-cosines, axis=1)[:, :K]
    votes = np.zeros((len(queries), int(labels.max()) + 1))
    for row, positions in enumerate(nearest):
        np.add.at(votes[row], labels[positions], np.exp(cosines[row, positions] / TEMPERATURE))
    return 100 * float((votes.argmax(1) == truth).mean())


def plain(folder: Path, name: str, weights: Path) -> dict[str, float]:
    """Evaluate a network without this project."""
    start = time.perf_counter()
    network = timm.create_model(name, num_classes=0).eval()
    network.load_state_dict(torch.load(weights, weights_only=True), strict=False)
    classes = sorted(path.name for path in (folder / "train").iterdir())
    views, labels = {}, {}
    for split in ("train", "val"):
        files = [file for one in classes for file in sorted((folder / split / one).iterdir())]
        labels[split] = np.array([classes.index(file.parent.name) for file in files])
        views[split] = features(network, files)
    computed = time.perf_counter()
    mean, spread = views["train"].mean(0), views["train"].std(0) + 1e-6
    probe = LogisticRegression(max_iter=1000).fit((views["train"] - mean) / spread, labels["train"])
    return {
        "knn/20": weighted_knn(views["train"], labels["train"], views["val"], labels["val"]),
        "linear": 100 * float(probe.score((views["val"] - mean) / spread, labels["val"])),
        "feature_seconds": computed - start,
        "seconds": time.perf_counter() - start,
        **spent(resource.RUSAGE_SELF),
    }


def spent(who: int) -> dict[str, float]:
    """Return the processor time so far, and the memory of the largest process."""
    usage = resource.getrusage(who)
    return {"processor_seconds": usage.ru_utime + usage.ru_stime, "megabytes": usage.ru_maxrss / 1024}


def esvit(arguments: list[str], out: Path) -> dict[str, Any]:
    """Run `esvit evaluate` in a folder of its own; return time and memory."""
    start, before = time.perf_counter(), spent(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "esvit_pipelines", "evaluate", *arguments, "--out", str(out)]
    subprocess.run(command, check=True)
    after = spent(resource.RUSAGE_CHILDREN)
    after["processor_seconds"] -= before["processor_seconds"]
    return {"seconds": time.perf_counter() - start, **after}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--network", default="resnet18", help="network of timm")
    parser.add_argument("--weights", type=Path, help="its weights; default: random ones")
    parser.add_argument("--model", help="model that is compared with the network")
    parser.add_argument("--out", type=Path, default=Path("evaluate-runs"), help="folder of the runs")
    parser.add_argument("--plain", action="store_true", help="print the figures of the plain script as JSON, and end")
    arguments = parser.parse_args()
    if arguments.plain:
        print(json.dumps(plain(arguments.folder, arguments.network, arguments.weights)))
        return
    print(describe(torch.device("cpu")), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        weights = arguments.weights or Path(folder) / "weights.pth"
        if arguments.weights is None:
            torch.manual_seed(0)
            torch.save(timm.create_model(arguments.network).state_dict(), weights)
        own = [str(arguments.folder), "--network", arguments.network, "--weights", str(weights), "--plain"]
        done = subprocess.run([sys.executable, __file__, *own], check=True, stdout=subprocess.PIPE, text=True)
        result = {"plain": json.loads(done.stdout)}
        print(f"plain script: {result['plain']}", flush=True)
        network = f"timm:{arguments.network}:{weights}"
        data = ["--data", str(arguments.folder)]
        models = ["--model", arguments.model, "--baseline", network] if arguments.model else ["--model", network]
        result["esvit"] = esvit([*models, *data], arguments.out)
        (report,) = arguments.out.glob("evaluate-imported-*/report.json")
        rows = json.loads(report.read_text(encoding="utf-8"))["results"]
        result["esvit"] |= {row["figure"]: row.get("trained") for row in rows if row["figure"] in ("knn/20", "linear")}
    print(json.dumps({key: {name: round(v, 2) for name, v in part.items()} for key, part in result.items()}))


if __name__ == "__main__":
    main()
