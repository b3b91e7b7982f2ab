"""Every recipe that ships with the library, and its row in docs/recipes.md."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from esvit_core.config import Config
from esvit_core.config.recipes import preset_names, preset_text
from esvit_core.data.loading.loader import Batch
from esvit_core.losses import Objective
from esvit_core.models import MultiCropNetwork, build_student_teacher
from esvit_core.models.precision import choose_precision
from esvit_core.training.collapse import CollapseDetector
from esvit_core.training.distributed.processes import GradientReducer, World
from esvit_core.training.loop import training_step
from esvit_core.training.nonfinite import NonFiniteGuard
from esvit_core.training.optim.optimizer import build_optimizer
from esvit_core.training.optim.schedules import Schedules
from esvit_core.training.profiler import Profiler
from esvit_core.training.progress import Progress
from esvit_core.training.sample_trace import SampleTrace
from esvit_core.training.state import TrainState

K = 32
# The published networks as they are built for 224 px, on one image and on three crops of half the size.
REDUCED = [
    f"head.out_dim={K}",
    "training.batch_size=1",
    "model.img_size=224",
    "augment.global_crops.size=112",
    "augment.local_crops.size=48",
    "augment.local_crops.number=1",
]
PUBLISHED = [name for name in preset_names() if name != "demo"]
FIRST_LINE = re.compile(
    r"(?P<network>.+?), (?P<task>view only|view \+ region), (?P<data>.+), (?P<epochs>\d+) epochs, "
    r"batch (?P<batch>\d+); published: linear (?P<linear>\d\d\.\d), k-NN (?P<knn>\d\d\.\d)\."
)


def config(name: str) -> Config:
    return Config.load(name, REDUCED if name in PUBLISHED else [f"head.out_dim={K}", "training.batch_size=1"])


@functools.lru_cache(maxsize=1)
def networks(model: str) -> tuple[MultiCropNetwork, MultiCropNetwork]:
    """Student and teacher of a preset's `model` section; presets with the same one follow each other."""
    name = next(name for name in by_network() if repr(config(name).model) == model)
    return build_student_teacher(config(name))


def by_network() -> list[str]:
    """All presets, ordered so that those with the region task come first among those with one network."""
    return sorted(preset_names(), key=lambda name: (repr(config(name).model), not config(name).objective.region))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than they bring on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", by_network())
def test_every_preset_trains_a_step(name: str) -> None:
    recipe, world = config(name), World(0, 1, torch.device("cpu"), None)
    student, teacher = networks(repr(recipe.model))
    if not recipe.objective.region:
        student.head_dense = teacher.head_dense = None
    optimizer, progress = build_optimizer(student, recipe), Progress(step=recipe.optimizer.warmup_epochs)
    objective = Objective(recipe.objective, K)
    state = TrainState(
        config=recipe,
        world=world,
        precision=choose_precision("auto", world.device),
        loader=None,  # type: ignore[arg-type]
        schedules=Schedules(recipe, steps_per_epoch=1),
        student=student,
        teacher=teacher,
        objective=objective,
        optimizer=optimizer,
        reducer=GradientReducer(student.parameters(), world),
        collapse=CollapseDetector(recipe.diagnostics, 1, K),
        progress=progress,
        guard=NonFiniteGuard(recipe, world, progress, 1, [], optimizer),
        sample_trace=SampleTrace(world),
        profiler=Profiler(world.device, student, teacher, objective, optimizer),
    )
    generator = torch.Generator().manual_seed(0)
    kinds = (recipe.augment.global_crops, *recipe.augment.local_kinds)
    crops = [torch.randn(1, 3, k.size, k.size, generator=generator) for k in kinds for _ in range(k.number)]
    watched = [student.head.mlp[0].weight, teacher.head.mlp[0].weight, next(student.backbone.parameters())]
    before = [p.detach().clone() for p in watched]

    at = state.schedules.at(state.progress.step)
    outputs = training_step(state, Batch(crops, np.zeros(1, np.int64), 0.0), at)

    terms = outputs.terms
    assert (terms.region is None) == (not recipe.objective.region)
    assert terms.total.item() == pytest.approx(np.log(K), rel=0.5)  # nothing is known yet
    assert 0 < outputs.grad_norm.item() < np.inf
    assert not any(torch.equal(p, b) for p, b in zip(watched, before, strict=True))


def test_presets_differ_from_the_defaults_as_their_first_line_says() -> None:
    for name in PUBLISHED:
        message = FIRST_LINE.fullmatch(preset_text(name).splitlines()[0].removeprefix("# "))
        assert message, name
        recipe = Config.load(name)
        assert recipe.recipe == name
        assert recipe.objective.region == (message["task"] == "view + region")
        assert (recipe.training.epochs, recipe.training.batch_size) == (int(message["epochs"]), int(message["batch"]))
        assert "Source: microsoft/esvit" in preset_text(name)
        default = Config().model_dump()
        changed = {section for section, values in recipe.model_dump().items() if values != default[section]}
        assert changed <= {"recipe", "model", "head", "objective", "training"}


def test_the_documented_table_is_that_of_the_presets() -> None:
    text = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    rows = {cells[1].strip("` "): [c.strip() for c in cells[2:-1]] for cells in map(_cells, text.splitlines()) if cells}
    for name in PUBLISHED:
        message = FIRST_LINE.fullmatch(preset_text(name).splitlines()[0].removeprefix("# "))
        assert message and rows[name][:7] == list(message.groups()), name


def _cells(line: str) -> list[str]:
    return line.split("|") if line.startswith("| `") else []
