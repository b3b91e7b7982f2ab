"""Check the intervals and the rule of the promotion on made cases, in which the true difference is known.

    python benchmarks/significance.py

A case is a set of 50 to 2,000 images and two models that differ on 3 to 50 % of them. Coverage is the share of the 95 %
intervals that contain the true difference. In the cases without a difference, ``promoted`` is the share of the
challengers that ``promotion.rule: significant`` promotes: its type I error. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

import numpy as np
import torch
from machine import describe

from esvit_core.config import Config
from esvit_core.evaluation.outcomes import keep_outcomes, pack_outcomes
from esvit_core.evaluation.results import measured
from esvit_core.evaluation.significance import Difference, accuracy_difference, mean_per_class_difference
from esvit_core.registry.metric_figures import Figure
from esvit_core.registry.promotion_rule import judge_first

Outcomes = tuple[np.ndarray, np.ndarray]
METRIC = "knn/20"
CLASSES = 5


def draw(rng: np.random.Generator, images: int, cells: list[float]) -> Outcomes:
    """Draw whether each of two models is right on each image.

    Args:
        cells: share of the images on which only the first, only the second, and both or none are right.
    """
    kind = rng.choice(3, images, p=cells)
    both = rng.random(images) < 0.5
    return (kind == 0) | ((kind == 2) & both), (kind == 1) | ((kind == 2) & both)


def cases(rng: np.random.Generator, count: int, differ: bool) -> Iterator[tuple[Outcomes, float]]:
    """Yield outcomes, and the true difference in points."""
    for _ in range(count):
        images, discordant = int(rng.integers(50, 2001)), rng.uniform(0.03, 0.5)
        share = rng.uniform(0.2, 0.8) if differ else 0.5
        cells = [discordant * share, discordant * (1 - share), 1 - discordant]
        yield draw(rng, images, cells), 100 * (cells[0] - cells[1])


def class_cases(rng: np.random.Generator, count: int) -> Iterator[tuple[Outcomes, np.ndarray, float]]:
    """Yield outcomes, labels of classes of different sizes, and the true difference of the means over the classes."""
    for _ in range(count):
        sizes = rng.integers(10, 300, CLASSES)
        discordant, share = rng.uniform(0.03, 0.5, CLASSES), rng.uniform(0.2, 0.8, CLASSES)
        drawn = [
            draw(rng, size, [d * s, d * (1 - s), 1 - d]) for size, d, s in zip(sizes, discordant, share, strict=True)
        ]
        first, second = (np.concatenate([each[i] for each in drawn]) for i in range(2))
        yield (first, second), np.repeat(np.arange(CLASSES), sizes), 100 * float((discordant * (2 * share - 1)).mean())


def covers(found: Difference, true: float) -> bool:
    return found.low <= true <= found.high


def promoted(first: np.ndarray, second: np.ndarray, config: Config) -> bool:
    """Return whether the rule promotes the first model over the second."""
    values = {"trained": 100 * float(first.mean()), "baseline": 100 * float(second.mean())}
    result = measured(METRIC, {model: {METRIC: value} for model, value in values.items()}, ["a", "b"])
    correct = {"trained": {METRIC: first}, "baseline": {METRIC: second}}
    result = keep_outcomes(result, pack_outcomes("images", correct))
    return judge_first(
        Figure(values["trained"], values["baseline"], "task", METRIC, result, "trained"), config
    ).promoted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="number of cases of each kind")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng, count = np.random.default_rng(arguments.seed), arguments.cases
    print(describe(torch.device("cpu")), flush=True)
    covered = [covers(accuracy_difference(*pair), true) for pair, true in cases(rng, count, differ=True)]
    of_classes = [
        covers(mean_per_class_difference(*pair, labels), true) for pair, labels, true in class_cases(rng, count)
    ]
    config = Config.from_mapping({"promotion": {"metric": METRIC}})
    false = [promoted(*pair, config) for pair, _ in cases(rng, count, differ=False)]
    shares = {
        "coverage": round(float(np.mean(covered)), 4),
        "coverage_mean_per_class": round(float(np.mean(of_classes)), 4),
        "promoted": round(float(np.mean(false)), 4),
    }
    for name, share in shares.items():
        print(f"{name:<26}{100 * share:6.2f} %")
    print(json.dumps({"cases": count, **shares}))


if __name__ == "__main__":
    main()
