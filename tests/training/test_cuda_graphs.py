"""Networks that replay CUDA graphs take the step of those that do not, and settings that do not fit are refused.

A CPU has no graphs: a substitute for torch's function computes its passes as torch records them, and copies inputs and outputs
as a graph does.
"""

from __future__ import annotations

import ctypes
import dataclasses

import numpy as np
import pytest
import torch

from esvit_core.data.loading.loader import Batch
from esvit_core.errors import UserError
from esvit_core.models.graphed_passes import GraphedPasses
from esvit_core.training import cuda_graphs
from esvit_core.training.cuda_graphs import graph_networks_
from esvit_core.training.loop import training_step
from esvit_core.training.state import TrainState

ON = {"training": {"cuda_graphs": True}}
RESNET = {
    "arch": "resnet18",
    "patch_size": None,
    "embed_dim": None,
    "depths": None,
    "num_heads": None,
    "window_size": None,
}


def take_step(state: TrainState, images: int = 16) -> float:
    augment, generator = state.config.augment, torch.Generator().manual_seed(0)
    sizes = [kind.size for kind in (augment.global_crops, *augment.local_kinds) for _ in range(kind.number)]
    crops = [torch.randn(images, 3, size, size, generator=generator) for size in sizes]
    return float(training_step(state, Batch(crops, np.arange(images), 0.0), state.schedule_values()).terms.total)


class Recorder:
    """Stands for ``torch.cuda.make_graphed_callables``.

    Attributes:
        replays: how often the recorded passes were computed.
    """

    def __init__(self) -> None:
        self.replays = 0

    def __call__(self, passes, inputs, allow_unused_input):
        for _ in range(3):  # as torch does
            passes(*inputs)

        def replay(*given):
            self.replays += 1
            for kept, new in zip(inputs, given, strict=True):
                kept.copy_(new)
            return passes(*inputs)

        return replay


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", recorder)
    monkeypatch.setattr(cuda_graphs, "_why_not", lambda state: "")
    return recorder


@pytest.mark.parametrize("model", [{}, RESNET])
def test_a_recorded_training_takes_the_same_step(assembled, recorder, model) -> None:
    """Recording computes the passes several times, which changes neither running statistics nor random numbers.

    In float32: for a map of one pixel, torch's convolution in bfloat16 returns uninitialized gradients on a CPU.
    """
    training = {"precision": "float32"}
    plain = assembled(model=model, training=training)
    recorded = assembled(model=model, training=training | ON["training"])
    random = torch.get_rng_state()
    assert graph_networks_(recorded) == "passes replayed as CUDA graphs"
    assert torch.equal(torch.get_rng_state(), random)
    for before, after in zip(plain.student.state_dict().values(), recorded.student.state_dict().values(), strict=True):
        assert torch.equal(before, after)
    assert take_step(recorded) == take_step(plain)
    assert recorder.replays == 2  # of teacher and student
    for before, after in zip(plain.student.state_dict().values(), recorded.student.state_dict().values(), strict=True):
        assert torch.equal(before, after)


def test_other_batches_and_an_evaluation_are_computed_without_the_graph(assembled, recorder) -> None:
    state = assembled(**ON)
    graph_networks_(state)
    size = state.config.augment.global_crops.size
    assert state.student([torch.randn(3, 3, size, size)]).view_logits.shape[0] == 3
    assert recorder.replays == 0
    batches = cuda_graphs.blank_batches(state)
    state.student.eval()
    assert len(state.student.passes(state.student.backbone, batches)) == len(batches)
    assert recorder.replays == 0


def test_a_training_goes_on_without_graphs_where_recording_fails(assembled, recorder, monkeypatch) -> None:
    def fails(*arguments, **named):
        raise RuntimeError("operation not permitted when stream is capturing\nmore\nand more")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fails)
    state, plain = assembled(**ON), assembled()
    line = graph_networks_(state)
    assert line == "no CUDA graphs (RuntimeError: operation not permitted when stream is capturing more)"
    assert not isinstance(state.student.passes, GraphedPasses) and not isinstance(state.teacher.passes, GraphedPasses)
    assert take_step(state) == take_step(plain)


def test_without_the_setting_nothing_is_recorded(assembled, recorder) -> None:
    state = assembled()
    assert graph_networks_(state) == ""
    assert not isinstance(state.student.passes, GraphedPasses)


@pytest.mark.parametrize(
    ("sections", "changes", "problem"),
    [
        ({}, {"device": torch.device("cpu")}, "only a GPU has them"),
        ({}, {"size": 2}, "the training has 2 processes"),
        ({"training": {"max_images_per_process": 4}}, {}, "makes 4 micro-batches"),
        ({"launch": {"activation_checkpointing": True}}, {}, "computes blocks again"),
        ({"model": {"mode_switch": 0.75}}, {}, "changes the network"),
    ],
)
def test_settings_that_do_not_fit_are_refused(assembled, sections, changes, problem) -> None:
    state = assembled(**(sections | {"training": {**sections.get("training", {}), **ON["training"]}}))
    world = dataclasses.replace(state.world, **({"device": torch.device("cuda", 0)} | changes))
    with pytest.raises(UserError, match=rf"training\.cuda_graphs: true, but .*{problem}.*; expected false"):
        graph_networks_(dataclasses.replace(state, world=world))


@pytest.mark.skipif(
    not torch.cuda.is_available() or hasattr(ctypes.CDLL(None), "fake_launches"), reason="no GPU that computes"
)
def test_graphs_take_the_same_steps_on_a_gpu(assembled) -> None:
    device = torch.device("cuda", 0)
    plain, graphed = assembled(device), assembled(device, **ON)
    assert graph_networks_(graphed) == "passes replayed as CUDA graphs"
    for _ in range(3):
        assert take_step(graphed) == pytest.approx(take_step(plain), rel=1e-3)
        plain.progress.step = graphed.progress.step = plain.progress.step + 1
