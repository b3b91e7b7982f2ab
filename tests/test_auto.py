"""The recipe `auto`: a sensible choice from 50 images to a million, the same for the same facts, with reasons."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from esvit_core.config import Config
from esvit_core.config.auto import MIN_PASSES, MIN_STEPS, Facts, choose, require_enough
from esvit_core.config.auto_choice import Choice
from esvit_core.config.auto_networks import NETWORKS, images_per_second
from esvit_core.data.ingest.survey import survey_source
from esvit_core.errors import UserError
from esvit_core.planning.auto_recipe import resolve_auto
from esvit_core.planning.count_operations import count_demand
from esvit_pipelines.settings import Settings, resolve_run

LAPTOP = Facts(10_000, None, True, 300, "cpu", 1, 16 * 2.0**30, 2, True)
A100 = replace(LAPTOP, device="cuda", memory=80 * 2.0**30, cores=16, multiprocessors=108, capability=80)


def config_of(choice: Choice) -> Config:
    return Config.from_mapping(choice.values)


@pytest.mark.parametrize("images", [50, 60, 600, 6_000, 60_000, 1_000_000])
@pytest.mark.parametrize("side", [28, 64, 500])
@pytest.mark.parametrize("machine", [LAPTOP, A100], ids=["CPU", "GPU"])
def test_every_choice_is_a_recipe_that_can_be_trained(images: int, side: int, machine: Facts) -> None:
    facts = replace(machine, images=images, short_side=side)
    choice = choose(facts)
    config = config_of(choice)
    trained = (config.data.max_images or images) * (1 - config.data.val_fraction)
    assert config.training.batch_size <= trained / 4, "at least four steps per epoch"
    assert config.training.epochs * trained / config.training.batch_size >= 0.9 * MIN_STEPS
    assert config.head.out_dim <= max(64, trained / 2)
    assert config.optimizer.warmup_epochs < config.training.epochs
    assert config.augment.global_crops.size <= max(64, 1.75 * side), "images are not enlarged much"
    hours = choice.seconds / 3600
    assert hours <= (1 if machine is LAPTOP else 8) * 1.01
    assert choice.memory <= machine.memory
    assert all(row.reason for row in choice.rows)
    assert Config.from_yaml(config.to_yaml()) == config


def test_the_choice_depends_on_the_facts_only() -> None:
    assert choose(LAPTOP) == choose(replace(LAPTOP))
    assert config_of(choose(LAPTOP)).digest() == config_of(choose(replace(LAPTOP, memory=12 * 2.0**30))).digest()


def test_small_images_and_an_hour_give_the_measured_network() -> None:
    config = config_of(choose(replace(LAPTOP, images=5000, short_side=32)))
    measured = Config.load(str(Path(__file__).parents[1] / "benchmarks" / "cifar10.yaml"))
    assert config.model == measured.model
    assert config.augment == measured.augment
    assert (config.optimizer.lr, config.training.batch_size) == (measured.optimizer.lr, measured.training.batch_size)


def test_more_time_gives_a_larger_network_and_a_gpu_the_published_one() -> None:
    sides = [choose(replace(LAPTOP, hours=hours)).values["augment"]["global_crops"]["size"] for hours in (1, 24, 240)]
    assert sides == [64, 96, 112]
    large = config_of(choose(replace(A100, images=100_000)))
    assert (large.model.arch, large.augment.global_crops.size) == ("swin_tiny_w7", 224)


def test_a_long_training_is_the_published_one() -> None:
    facts = replace(A100, images=1_281_167, held_out=50_000, devices=16, hours=400)
    config, published = config_of(choose(facts)), Config.load("imagenet_swin_tiny_w7")
    for section in ("augment", "model", "head", "objective"):
        same = getattr(config, section), getattr(published, section)
        if section == "objective":  # the temperature rises over a tenth of the epochs
            same = tuple(s.model_copy(update={"warmup_teacher_temp_epochs": 0}) for s in same)
        assert same[0] == same[1], section
    assert config.optimizer == published.optimizer
    assert config.training.batch_size == published.training.batch_size


def test_too_little_time_leaves_images_out_and_says_so() -> None:
    choice = choose(replace(LAPTOP, images=500_000))
    config = config_of(choice)
    assert config.training.epochs == MIN_PASSES
    assert 1000 <= (config.data.max_images or 0) < 100_000
    assert any("more hours use more images" in row.reason for row in choice.rows)


def test_few_images_say_what_cannot_be_shown() -> None:
    reasons = [[row.reason for row in choose(replace(LAPTOP, images=n)).rows][-1] for n in (60, 6000)]
    points = [float(reason.split("about ")[1].split()[0]) for reason in reasons]
    assert points[0] > 15 and points[1] < 5
    unlabelled = choose(replace(LAPTOP, labelled=False)).rows[-1].reason
    assert "no classes" in unlabelled


def test_fewer_than_50_images_are_an_error() -> None:
    with pytest.raises(UserError, match="mine: 49 images; a training needs at least 50"):
        require_enough(49, "mine")
    require_enough(50, "mine")


def test_settings_that_are_given_are_followed_by_the_others() -> None:
    config = config_of(choose(LAPTOP, epochs=4, batch_size=32))
    assert (config.training.epochs, config.training.batch_size, config.optimizer.warmup_epochs) == (4, 32, 1)


def test_weights_are_protected() -> None:
    config, fresh = config_of(choose(LAPTOP, from_weights=True)), config_of(choose(LAPTOP))
    assert config.optimizer.lr == pytest.approx(fresh.optimizer.lr / 10)
    assert config.optimizer.teacher_momentum > fresh.optimizer.teacher_momentum
    assert config.training.epochs <= 100


def test_a_batch_beyond_the_memory_is_computed_in_parts() -> None:
    facts = replace(A100, images=100_000, memory=16 * 2.0**30)
    choice = choose(facts)
    config = config_of(choice)
    assert config.training.batch_size == config_of(choose(replace(A100, images=100_000))).training.batch_size
    assert config.training.max_images_per_process is not None
    assert choice.memory <= facts.memory


@pytest.mark.parametrize("network", NETWORKS[:2], ids=["micro", "small"])
def test_operations_and_memory_are_those_that_are_counted(network: Any) -> None:
    facts = replace(LAPTOP, images=4 * network.prototypes, hours=1000)
    config = config_of(choose(facts, network))
    demand = count_demand(config, torch.bfloat16, "cpu")
    assert network.flops == pytest.approx(demand.flops, rel=0.05)
    assert network.image_bytes[0] == pytest.approx(demand.image_bytes, rel=0.1)
    assert network.fixed_bytes == pytest.approx(demand.fixed_bytes, rel=0.2)


def test_speed_grows_with_the_machine_and_falls_without_bfloat16() -> None:
    def rate(cores: int, bfloat16: bool = True, batch: int = 64) -> float:
        return images_per_second(NETWORKS[0], "cpu", batch=batch, cores=cores, bfloat16=bfloat16)[0]

    assert rate(2) == pytest.approx(128, rel=0.01)  # as measured, docs/cifar10.md
    assert rate(4) == pytest.approx(2 * rate(2))
    assert rate(2, bfloat16=False) < rate(2)
    assert rate(2, batch=8) < rate(2, batch=16) < 0.7 * rate(2)


def test_few_images_in_small_batches_fit_into_the_time() -> None:
    choice = choose(replace(LAPTOP, images=600, hours=0.1))
    config = config_of(choice)
    assert config.training.batch_size < NETWORKS[0].batch
    assert choice.seconds == pytest.approx(360, rel=0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, images: Any) -> Path:
    made = tmp_path_factory.mktemp("auto")
    images.folder(made / "images", ["a", "b"], 30)
    return made


def test_a_survey_counts_what_a_preparation_would_read(folder: Path, images: Any) -> None:
    survey = survey_source(str(folder / "images"), Config().data)
    assert (survey.images, survey.held_out, survey.classes) == (60, None, 2)
    assert 8 <= survey.short_side <= 256
    images.folder(folder / "split" / "train", ["a", "b"], 3)
    images.folder(folder / "split" / "test", ["a", "b"], 2)
    survey = survey_source(str(folder / "split"), Config().data)
    assert (survey.images, survey.held_out) == (10, 4)


def test_overrides_win_and_are_marked(folder: Path) -> None:
    found = resolve_auto(str(folder / "images"), ["training.epochs=3", "optimizer.lr=0.5"], hours=2)
    assert (found.config.training.epochs, found.config.optimizer.lr) == (3, 0.5)
    table = "\n".join(found.lines())
    assert "given: training.epochs=3, optimizer.lr=0.5" in table
    assert any(line.split()[:3] == ["learning", "rate", "0.5"] and line.endswith("given") for line in found.lines())
    assert resolve_auto(str(folder / "images"), ["training.epochs=3", "optimizer.lr=0.5"], hours=2) == found


def test_another_network_is_counted(folder: Path) -> None:
    found = resolve_auto(str(folder / "images"), ["model.depths=[2, 2]"])
    plain = resolve_auto(str(folder / "images"))
    assert found.config.model.depths == (2, 2) and found.config.model.embed_dim == plain.config.model.embed_dim
    assert found.choice.rate > plain.choice.rate


def test_a_wrong_setting_is_an_error_before_the_images_are_listed() -> None:
    with pytest.raises(UserError, match=r"did you mean .training\.epochs"):
        resolve_auto("/no/such/folder", ["training.epoch=3"])
    with pytest.raises(UserError, match=r"training\.epochs.*many"):
        resolve_auto("/no/such/folder", ["training.epochs=many"])


def test_auto_is_the_default_of_a_run_and_of_nothing_else(folder: Path) -> None:
    settings = Settings(str(folder / "images"), None, (), (), folder / "out", None)
    resolved = resolve_run(settings)
    assert resolved.config.recipe == "auto" and resolved.explanation
    assert resolve_run(replace(settings, recipe="auto")).config == resolved.config
    named = resolve_run(replace(settings, recipe="demo"))
    assert named.config == Config.load("demo") and not named.explanation
