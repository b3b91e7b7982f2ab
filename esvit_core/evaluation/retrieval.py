"""Image retrieval with frozen features: the held-out images are queries, the training images the gallery.

Images are ranked by cosine similarity, and those of the query's class are relevant. mAP is the mean over the queries of the
average precision of the whole ranking; R@k is the share of queries with a relevant image among the first k.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from esvit_core.config import Config
from esvit_core.evaluation.labels import Task, run_task
from esvit_core.evaluation.outcomes import keep_outcomes, pack_outcomes
from esvit_core.evaluation.results import Result, left_out, measure_once, measured
from esvit_core.runs.gpus import computing_device
from esvit_core.storage import ObjectStore

NAME, HEADLINE = "retrieval", "retrieval/map"
RANKS = (1, 5, 10)
_BLOCK_VALUES = 1 << 24  # similarities at a time: 64 MB


def evaluate_retrieval(run_uri: str, store: ObjectStore, config: Config) -> Result:
    """Evaluate retrieval for both backbones; the result is written once to ``evaluation/retrieval.json``."""
    return measure_once(store, run_uri, NAME, lambda: measure_retrieval(run_task(run_uri, store)))


def measure_retrieval(task: Task | str) -> Result:
    """Measure the task for every model in it."""
    if isinstance(task, str):
        return left_out(HEADLINE, task)
    figures, correct, values = {}, {}, {}
    for model, (train, val) in task.splits.items():
        precision, first = rank_gallery(train.view, train.labels, val.view, val.labels)
        hits = {f"retrieval/r@{k}": first < k for k in RANKS}
        figures[model] = {HEADLINE: 100 * float(precision.mean())}
        figures[model] |= {key: 100 * float(values.mean()) for key, values in hits.items()}
        correct[model], values[model] = hits, {HEADLINE: precision}
    result = measured(HEADLINE, figures, task.classes, notes=task.notes)
    return keep_outcomes(result, pack_outcomes(task.held_out, correct, values=values))


def rank_gallery(
    gallery: np.ndarray, gallery_labels: np.ndarray, queries: np.ndarray, query_labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rank the gallery for each query by cosine similarity.

    Args:
        gallery, queries: features, (N, D) and (M, D).
        gallery_labels, query_labels: classes, (N,) and (M,); the gallery has every class of the queries.

    Returns:
        The average precision of each query, (M,) from 0 to 1, and the rank of its first relevant image from 0, (M,).
    """
    device = computing_device()
    bank = F.normalize(torch.as_tensor(gallery).float(), dim=1).to(device)
    labels = torch.as_tensor(gallery_labels).to(device)
    ranks = torch.arange(1, len(bank) + 1, device=device)
    precision, first = [], []
    for part, truth in zip(
        F.normalize(torch.as_tensor(queries).float(), dim=1).split(max(1, _BLOCK_VALUES // len(bank))),
        torch.as_tensor(query_labels).split(max(1, _BLOCK_VALUES // len(bank))),
        strict=True,
    ):
        order = (part.to(device) @ bank.T).argsort(dim=1, descending=True, stable=True)
        relevant = labels[order] == truth.to(device)[:, None]  # (M', N)
        at_rank = relevant.cumsum(1) / ranks
        precision.append(((at_rank * relevant).sum(1) / relevant.sum(1)).cpu())
        first.append(relevant.int().argmax(1).cpu())
    return torch.cat(precision).numpy(), torch.cat(first).numpy()
