"""Record the passes of a training's networks as CUDA graphs, before the first step."""

from __future__ import annotations

import torch

from esvit_core.errors import UserError
from esvit_core.models.graphed_passes import GraphedPasses
from esvit_core.training.compilation import blank_batches, compile_networks_, describe_failure, unchanged
from esvit_core.training.state import TrainState


def compile_and_graph_networks_(state: TrainState) -> str:
    """Compile student and teacher and record their graphs, as the settings ask; return what was done, for the log.

    Raises:
        UserError: a setting does not fit the training or this machine.
    """
    return "; ".join(filter(None, (compile_networks_(state), graph_networks_(state))))


def graph_networks_(state: TrainState) -> str:
    """Let student and teacher replay CUDA graphs if ``training.cuda_graphs`` is set; after they were compiled.

    If recording fails, the networks compute without graphs.

    Returns:
        What was done, as part of a line for the log; "" if the setting is off.

    Raises:
        UserError: the setting does not fit the training.
    """
    if not state.config.training.cuda_graphs:
        return ""
    if problem := _why_not(state):
        raise UserError(f"training.cuda_graphs: true, but {problem}; expected false")
    networks = (state.student, state.teacher)
    before = [network.passes for network in networks]
    batches = blank_batches(state)
    try:
        # Weights that autocast converts for one graph do not exist in another.
        with unchanged(state), state.precision.autocast(cache=False):
            with torch.no_grad():
                state.teacher.passes = GraphedPasses(state.teacher, batches[:1])
            state.student.passes = GraphedPasses(state.student, batches)
        # Recording has its own stream, on which autograd then accumulates the gradients; it lets the current one wait.
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    except Exception as error:  # of the driver or torch
        for network, passes in zip(networks, before, strict=True):
            network.passes = passes
        return f"no CUDA graphs ({describe_failure(error)})"
    return "passes replayed as CUDA graphs"


def _why_not(state: TrainState) -> str:
    """Return why the passes cannot be graphs; "" if they can."""
    config, world = state.config, state.world
    if world.device.type != "cuda":
        return "only a GPU has them"
    if world.size > 1:
        return f"the training has {world.size} processes, and gradients are averaged during the backward pass"
    if state.micro_batches > 1:
        return f"training.max_images_per_process makes {state.micro_batches} micro-batches"
    if config.model.mode_switch < 1:
        return "model.mode_switch changes the network during the training"
    if config.launch.activation_checkpointing:
        return "launch.activation_checkpointing computes blocks again"
    return ""
