"""Compare the search of lambda with scikit-learn's sweep over all 97 values, on five sets.

    python benchmarks/transfer.py [--cifar cifar-10-python.tar.gz] [--images 5000] [--sets digits samples ...] [--every 1]

The features are the pixels of the images, resized to 12 x 12 in colour (digits: scikit-learn's 8 x 8), and two made sets
whose classes overlap. For each set, scikit-learn's L-BFGS fits every lambda on every validation fold, and so does the batched
solver for those of the parametric binary search, both until no gradient is above 1e-5. After 1,000 iterations scikit-learn
gives up, which it does for weak regularization; therefore, and because a fit at 1e-5 can differ from the optimum by an image
or two, it fits the lambdas whose scores are within a point of its best again, to 1e-7 and up to 20,000 iterations, and their
scores are those of these fits. The time of the second fits does not count. The table gives the best validation
score of both, scikit-learn's at the lambda that the search chose, the p-value of the difference of its two (McNemar's test on
the same images), the number of lambdas, and the times. The last line is JSON: on how many of the sets the best scores are
equal, on how many no difference is shown, and the smallest ratios of fits and of time.

With ``--every N`` the sweep fits every Nth lambda only, and its time is multiplied: an estimate for a busy machine, in which a
score is the same if no lambda that was fitted is better.

CIFAR-10 is read from the archive that its authors distribute, or from a tar of ``train/<class>/*.jpg``.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import tarfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from machine import describe
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from esvit_core.data.ingest.layout import detect_layout
from esvit_core.data.ingest.sources import open_source
from esvit_core.evaluation.significance import accuracy_difference
from esvit_core.evaluation.transfer import LAMBDAS, logistic_transfer
from esvit_core.evaluation.validation import folds_to_use, validation_folds

SIDE = 12
SAMPLES = Path(__file__).parent.parent / "samples" / "clipart.zip"
Labelled = tuple[np.ndarray, np.ndarray]


def pixels(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.float32).ravel() / 255


def samples() -> Labelled:
    with open_source(str(SAMPLES)) as opened:
        places = detect_layout([entry.name for entry in opened.entries], str(SAMPLES)).assignments
        return np.stack([pixels(opened.read(entry)) for entry in opened.entries]), np.array([p.label for p in places])


def cifar(path: Path, images: int) -> Labelled:
    """Read the first training images of CIFAR-10, in equal numbers per class."""
    found: dict[str, list[np.ndarray]] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            name = member.name
            content = archive.extractfile(member) if member.isfile() else None
            if content is None:
                continue
            if "/data_batch_" in name:
                batch = pickle.load(content, encoding="bytes")
                for row, label in zip(batch[b"data"], batch[b"labels"], strict=True):
                    image = Image.fromarray(row.reshape(3, 32, 32).transpose(1, 2, 0))
                    small = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
                    found.setdefault(str(label), []).append(np.asarray(small, dtype=np.float32).ravel() / 255)
            elif "train/" in name and name.endswith((".jpg", ".png")):
                of_class = found.setdefault(name.split("/")[-2], [])
                if len(of_class) < images:
                    of_class.append(pixels(content.read()))
    each = images // len(found)
    x = np.concatenate([np.stack(values[:each]) for _, values in sorted(found.items())])
    return x, np.repeat(np.arange(len(found)), [len(values[:each]) for _, values in sorted(found.items())])


def made(seed: int, classes: int, width: int, count: int, spread: float) -> Labelled:
    """Draw Gaussian classes whose features differ in scale by a factor of up to ten."""
    rng = np.random.default_rng(seed)
    scales = 10.0 ** rng.uniform(-0.5, 0.5, width)
    labels = np.arange(count) % classes
    x = rng.standard_normal((classes, width))[labels] + spread * rng.standard_normal((count, width))
    return (x * scales).astype(np.float32), labels


def sweep(
    x: np.ndarray, y: np.ndarray, seed: int, strengths: np.ndarray, tolerance: float = 1e-5, iterations: int = 1_000
) -> dict[float, np.ndarray]:
    """Return which images of the folds scikit-learn classifies correctly with each of these lambdas, (n,) bool."""
    folds = folds_to_use(validation_folds(y, seed))
    truth = np.concatenate([y[held_out] for held_out in folds])
    correct, wide = {}, x.astype(np.float64)
    for strength in strengths.tolist():
        predicted = []
        for held_out in folds:
            model = LogisticRegression(C=1 / strength, solver="lbfgs", tol=tolerance, max_iter=iterations)
            predicted.append(model.fit(wide[~held_out], y[~held_out]).predict(wide[held_out]))
        correct[strength] = np.concatenate(predicted) == truth
    return correct


def near_best(correct: dict[float, np.ndarray], chosen: float) -> np.ndarray:
    """Return the lambdas whose scores are within a point of the best, and the one that the search chose."""
    scores = {strength: float(values.mean()) for strength, values in correct.items()}
    return np.array(sorted({chosen} | {s for s, score in scores.items() if score > max(scores.values()) - 0.01}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, help="archive of CIFAR-10; without it, the set is left out")
    parser.add_argument("--images", type=int, default=5_000, help="largest number of images of a set")
    parser.add_argument("--sets", nargs="+", help="names of the sets to measure; default: all")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="sweep every Nth lambda")
    parser.add_argument("--seed", type=int, default=0, help="seed of the folds")
    arguments = parser.parse_args()
    loaders: dict[str, Callable[[], Labelled]] = {
        "digits": lambda: load_digits(return_X_y=True),
        "samples": samples,
        "made, 10 classes": lambda: made(1, 10, 128, 2_000, 5.0),
        "made, 50 classes": lambda: made(2, 50, 64, 3_000, 3.0),
    }
    if arguments.cifar is not None:
        loaders["cifar-10"] = lambda: cifar(arguments.cifar, arguments.images)
    chosen = arguments.sets or list(loaders)
    warnings.simplefilter("ignore", ConvergenceWarning)
    print(describe(torch.device("cuda" if torch.cuda.is_available() else "cpu")), flush=True)
    print(
        f"{'set':<18}{'images':>8}{'sweep':>9}{'search':>9}{'there':>9}{'p':>7}{'fits':>6}{'sweep, s':>10}{'search, s':>10}"
    )
    same, alike, fits, times = 0, 0, [], []
    for name in chosen:
        x, y = loaders[name]()
        keep = np.random.default_rng(0).permutation(len(x))[: arguments.images]
        x, y = x[keep].astype(np.float32), np.unique(y, return_inverse=True)[1][keep]
        start = time.perf_counter()
        found = logistic_transfer(x, y, x[:1], y[:1], seed=arguments.seed, label=name)
        middle = time.perf_counter()
        strengths = LAMBDAS[:: arguments.every]
        correct = sweep(x, y, arguments.seed, strengths)
        swept = (time.perf_counter() - middle) * len(LAMBDAS) / len(strengths)
        correct |= sweep(x, y, arguments.seed, near_best(correct, found.strength), 1e-7, 20_000)
        best = max(found.validation.values())
        first = max(correct, key=lambda strength: int(correct[strength].sum()))
        expected, there = (100 * float(correct[strength].mean()) for strength in (first, found.strength))
        difference = accuracy_difference(correct[first], correct[found.strength])
        same += bool(abs(best - expected) < 1e-9 if arguments.every == 1 else best > expected - 1e-9)
        alike += difference.decision == "no difference shown"
        fits.append(len(LAMBDAS) / len(found.validation))
        times.append(swept / (middle - start))
        print(
            f"{name:<18}{len(x):>8,}{expected:>9.2f}{best:>9.2f}{there:>9.2f}{difference.p:>7.2f}{len(found.validation):>6}"
            f"{swept:>10.1f}{middle - start:>10.1f}",
            flush=True,
        )
    result = {
        "sets": len(chosen),
        "same_validation_score": same,
        "no_difference_shown": alike,
        "fits": min(fits),
        "time": min(times),
    }
    print(json.dumps({key: round(value, 2) for key, value in result.items()}))


if __name__ == "__main__":
    main()
