"""Mistakes in a configuration that would show only after hours, found before anything is prepared."""

from __future__ import annotations

import difflib

from esvit_core.config import Config
from esvit_core.errors import UserError


def require_possible(config: Config) -> None:
    """Return if a run of ``config`` can train its network and can measure the metric that decides on promotion.

    The network is made, and fed with crops of every size, on tensors without data.

    Raises:
        UserError: it cannot; the message names the setting.
    """
    require_metric(config)
    _require_batch(config)
    _require_network(config)


def require_metric(config: Config) -> None:
    """Return if a run of ``config`` measures ``promotion.metric``.

    Raises:
        UserError: it does not.
    """
    evaluation, metric = config.evaluation, config.promotion.metric
    measured = [f"knn/{k}" for k in evaluation.knn_k] + ["linear"] + [f"transfer/{s.name}" for s in evaluation.transfer]
    if metric in measured:
        return
    near = difflib.get_close_matches(metric, measured, n=1)
    meant = f", did you mean {near[0]!r}?" if near else ""
    raise UserError(
        f"promotion.metric {metric}: the run does not measure it{meant}; expected one of {', '.join(measured)}, or "
        "change evaluation.knn_k or the transfer sets"
    )


def _require_batch(config: Config) -> None:
    batch_size, processes = config.training.batch_size, config.training.processes
    if processes != "auto" and batch_size < processes:
        raise UserError(
            f"training.batch_size {batch_size}: expected at least training.processes, {processes}; change one"
        )


def _require_network(config: Config) -> None:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from esvit_core.models.multicrop import build_network

    augment = config.augment
    sizes = [
        ("augment.global_crops.size", augment.global_crops.size),
        *(("augment.local_crops.size", kind.size) for kind in augment.local_kinds if kind.number),
        ("evaluation.crop", config.evaluation.crop),
    ]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        try:
            network = build_network(config).train()
        except (RuntimeError, AssertionError, ValueError, ZeroDivisionError, IndexError) as error:
            raise UserError(f"model {config.model.arch}: {error}; change the recipe's `model` section") from None
        for setting, size in sizes:
            try:
                network.backbone.views_and_regions(torch.empty(2, 3, size, size))
            except (RuntimeError, AssertionError, ValueError, ZeroDivisionError, IndexError) as error:
                raise UserError(
                    f"{setting} {size}: {config.model.arch} does not take crops of {size} pixels ({error}); change "
                    "the size or the recipe's `model` section"
                ) from None
