"""Measure the time of weighted k-NN: ours, and the same classification computed as in the published code.

    python benchmarks/knn.py [--bank 300000] [--queries 600] [--width 768] [--classes 1000] [--runs 3]

Features are random. The plain form compares a hundredth of the queries with the whole bank at once, votes with one-hot
vectors, and does it again for every k. Both take turns in this process. The last line is JSON: the ratio of the times,
plain / ours, once for all of the published k and once for 20 alone, and the share of equal predictions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
import torch.nn.functional as F
from machine import describe

from esvit_core.evaluation.knn import rank_classes

TEMPERATURE, KS = 0.07, (10, 20, 100, 200)


def plain_knn(
    bank: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor, ks: tuple[int, ...], classes: int
) -> dict[int, torch.Tensor]:
    """Rank the five classes with the most votes for each query, (M, 5), one k after the other."""
    bank, queries = F.normalize(bank), F.normalize(queries)
    found = {}
    for k in ks:
        parts = []
        for part in queries.split(max(1, len(queries) // 100)):
            cosines, neighbors = (part @ bank.T).topk(k)
            votes = F.one_hot(labels[neighbors], classes) * (cosines / TEMPERATURE).exp()[:, :, None]  # (M', k, C)
            parts.append(votes.sum(1).argsort(dim=1, descending=True)[:, :5])
        found[k] = torch.cat(parts)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=int, default=300_000, help="training features")
    parser.add_argument("--queries", type=int, default=600, help="features to classify")
    parser.add_argument("--width", type=int, default=768, help="values of a feature")
    parser.add_argument("--classes", type=int, default=1_000)
    parser.add_argument("--runs", type=int, default=3, help="runs of each, after one to warm up")
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(arguments.bank, arguments.width, generator=generator)
    queries = torch.randn(arguments.queries, arguments.width, generator=generator)
    labels = torch.randint(arguments.classes, (arguments.bank,), generator=generator)
    print(describe(torch.device("cpu")), flush=True)
    result: dict[str, float] = {}
    for name, ks in (("20", (20,)), ("all", KS)):
        times: dict[str, list[float]] = {"plain": [], "ours": []}
        for run in range(arguments.runs + 1):
            start = time.perf_counter()
            expected = plain_knn(bank, labels, queries, ks, arguments.classes)
            middle = time.perf_counter()
            ranking = rank_classes(bank, labels, queries, ks, TEMPERATURE, arguments.classes)
            if run:
                times["plain"].append(middle - start)
                times["ours"].append(time.perf_counter() - middle)
        plain, ours = (statistics.median(times[form]) for form in ("plain", "ours"))
        equal = sum(float((ranking[k][:, 0] == expected[k][:, 0]).float().mean()) for k in ks) / len(ks)
        print(f"k {', '.join(map(str, ks)):<18} plain {plain:6.2f} s   ours {ours:6.2f} s   equal {100 * equal:.2f} %")
        result |= {f"time_{name}": plain / ours, f"equal_{name}": equal}
    print(json.dumps({key: round(value, 4) for key, value in result.items()}))


if __name__ == "__main__":
    main()
