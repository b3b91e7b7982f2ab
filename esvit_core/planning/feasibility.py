"""Checks, before anything is prepared, for mistakes in a configuration that would otherwise fail after hours."""

from __future__ import annotations

import difflib

from esvit_core.config import Config
from esvit_core.errors import UserError


def require_possible(config: Config) -> None:
    """Return if a run of ``config`` can train its network and measure ``promotion.metric``.

    Builds the network on fake tensors, feeds it crops of every size, and fits the initial weights that are on this machine.

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
    from esvit_core.planning.fake_network import fake_network, require_crop_sizes  # imports torch

    with fake_network(config) as network:
        require_crop_sizes(network, config)
    if config.init.source is not None:
        from esvit_core.training.initial_weights import require_fitting

        require_fitting(config, network)
