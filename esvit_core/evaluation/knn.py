"""Weighted k-nearest-neighbor classification on frozen features (EsViT, section 4; Wu et al., 2018)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from esvit_core.config import Config
from esvit_core.evaluation.labels import Task, run_task
from esvit_core.evaluation.outcomes import keep_outcomes, pack_outcomes
from esvit_core.evaluation.results import Result, left_out, measure_once, measured
from esvit_core.runs.gpus import computing_device
from esvit_core.storage import ObjectStore

# Queries and features of the bank that are compared at once: 2 M similarities in float32 take 8 MB.
_QUERIES, _BANK = 128, 16_384
# Values per chunk of votes: 16 M float32 take 64 MB.
_CHUNK_VALUES = 1 << 24

Array = np.ndarray | torch.Tensor


def weighted_knn(
    train: Array,
    train_labels: Array,
    test: Array,
    test_labels: Array,
    k: int,
    temperature: float = 0.07,
) -> tuple[float, float]:
    """Compute the accuracy of classifying each test feature by its ``k`` nearest training features.

    Args:
        train: features of the bank, (N, D); the function normalizes them.
        train_labels: classes of the bank, (N,), from 0.
        test: features to classify, (M, D).
        test_labels: true classes, (M,).
        k: number of neighbors; at most the size of the bank.
        temperature: temperature of the votes ``exp(cosine / temperature)``.

    Returns:
        Top-1 and top-5 accuracy in percent (top-C if there are C < 5 classes).

    Raises:
        ValueError: the bank or the test set is empty.

    Source: ``eval_knn.py`` of the published code.
    """
    ranking = rank_classes(train, train_labels, test, (k,), temperature, classes=_count(train_labels, test_labels))[k]
    return ranking_accuracy(ranking, test_labels)


def rank_classes(
    train: Array,
    train_labels: Array,
    test: Array,
    ks: Sequence[int],
    temperature: float,
    classes: int,
) -> dict[int, torch.Tensor]:
    """Rank the five classes with the most votes for each test feature, for several ``k`` at once.

    Classes without votes follow in numerical order, so that top-5 with a small ``k`` includes them, as in the published
    code.

    Returns:
        For each ``k`` the classes, most votes first, (M, min(5, classes)).
    """
    device = computing_device()
    bank, queries, labels = _normalised(train, device), _normalised(test, device), _labels(train_labels).to(device)
    if not len(bank) or not len(queries):
        raise ValueError(f"k-NN needs at least one training and one test feature, got {len(bank)} and {len(queries)}")
    rankings: dict[int, list[torch.Tensor]] = {k: [] for k in ks}
    for part in queries.split(max(1, min(_QUERIES, _CHUNK_VALUES // classes))):
        cosines, neighbors = nearest(part, bank, min(max(ks), len(bank)))  # (M', k)
        # The common factor exp(-largest cosine / temperature) changes no rank and avoids overflow at low temperatures.
        weights = ((cosines - cosines[:, :1]) / temperature).exp()  # (M', k)
        neighbor_labels = labels[neighbors]  # (M', k)
        for k in ks:
            votes = torch.zeros(len(part), classes, device=device)
            votes.scatter_add_(1, neighbor_labels[:, :k], weights[:, :k])  # (M', C)
            rankings[k].append(votes.argsort(dim=1, descending=True, stable=True)[:, :5].cpu())
    return {k: torch.cat(parts) for k, parts in rankings.items()}


def nearest(queries: torch.Tensor, bank: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and position of the k features of the bank that are nearest to each query, (M, k) each.

    Args:
        queries: normalized features, (M, D).
        bank: normalized features, (N, D).
        k: number of neighbors, at most N.
    """
    best: tuple[torch.Tensor, torch.Tensor] | None = None
    for number, block in enumerate(bank.split(_BANK)):
        cosines, positions = (queries @ block.T).topk(min(k, len(block)))
        positions += number * _BANK
        if best is not None:
            both = torch.cat([best[0], cosines], dim=1)
            cosines, order = both.topk(min(k, both.shape[1]))
            positions = torch.cat([best[1], positions], dim=1).gather(1, order)
        best = cosines, positions
    assert best is not None
    return best


def ranking_accuracy(ranking: torch.Tensor, test_labels: Array) -> tuple[float, float]:
    """Return top-1 and top-5 accuracy in percent of ranked classes (M, <= 5) for true classes (M,)."""
    hits = ranking == _labels(test_labels)[:, None]
    return int(hits[:, 0].sum()) * 100 / len(hits), int(hits.any(1).sum()) * 100 / len(hits)


def evaluate_knn(run_uri: str, store: ObjectStore, config: Config) -> Result:
    """Evaluate weighted k-NN on the view features of both backbones, for every ``k`` of the configuration.

    The training images form the bank, and the held-out images are classified. The result is written once to
    ``evaluation/knn.json``: top-1 in ``results``, top-5 in ``top5``.
    """
    return measure_once(store, run_uri, "knn", lambda: measure_knn(run_task(run_uri, store), config))


def measure_knn(task: Task | str, config: Config) -> Result:
    """Measure the task for every model in it."""
    ks, temperature = config.evaluation.knn_k, config.evaluation.knn_temperature
    headline = f"knn/{20 if 20 in ks else ks[0]}" if ks else "knn"
    if not ks:
        return left_out(headline, "evaluation.knn_k is empty")
    if isinstance(task, str):
        return left_out(headline, task)
    top1: dict[str, dict[str, float]] = {}
    top5: dict[str, dict[str, float]] = {}
    correct: dict[str, dict[str, np.ndarray]] = {}
    for model, (train, val) in task.splits.items():
        rankings = rank_classes(train.view, train.labels, val.view, ks, temperature, len(task.classes))
        figures = {f"knn/{k}": ranking_accuracy(ranking, val.labels) for k, ranking in rankings.items()}
        top1[model] = {key: first for key, (first, _) in figures.items()}
        top5[model] = {key: round(fifth, 4) for key, (_, fifth) in figures.items()}
        correct[model] = {f"knn/{k}": ranking[:, 0].numpy() == val.labels for k, ranking in rankings.items()}
    bank = len(next(iter(task.splits.values()))[0])
    notes = [f"knn/{k}: there are only {bank:,} training images, all of which vote" for k in ks if k > bank]
    result = measured(headline, top1, task.classes, notes=notes + task.notes, top5=top5)
    return keep_outcomes(result, pack_outcomes(task.held_out, correct))


def _normalised(features: Array, device: torch.device) -> torch.Tensor:
    return F.normalize(torch.as_tensor(features).float().to(device), dim=1)


def _labels(labels: Array) -> torch.Tensor:
    return torch.as_tensor(labels).long()


def _count(*labels: Array) -> int:
    return max(int(_labels(part).max()) for part in labels if len(part)) + 1
