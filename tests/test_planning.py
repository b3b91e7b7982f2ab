"""A plan counts what a real step does, and says what to change where a run does not fit."""

from __future__ import annotations

import io
import math
from typing import Any, cast

import numpy as np
import psutil
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from esvit_core.config import Config
from esvit_core.data.loading.loader import Batch, TrainLoader
from esvit_core.errors import UserError
from esvit_core.models.layers import windows
from esvit_core.models.multicrop import build_student_teacher
from esvit_core.planning import estimate as planning
from esvit_core.planning import rehearse
from esvit_core.planning.checkpoint_cost import checkpoint_cost
from esvit_core.planning.count_operations import LiveBytes, count_demand, count_memory
from esvit_core.planning.estimate import Gpu, advice, plan_run
from esvit_core.planning.rehearse import Rehearsal
from esvit_core.runs.environment import available_cores
from esvit_core.training.distributed.processes import World
from esvit_core.training.loop import training_step
from esvit_core.training.optim.optimizer import build_optimizer
from esvit_core.training.state import assemble_train_state, make_deterministic
from esvit_pipelines.cli.plan_command import plan

CPU = torch.device("cpu")


class OneStep:
    steps_per_epoch = 1


def micro(**sections: dict[str, Any]) -> Config:
    values: dict[str, Any] = {
        "augment": {
            "global_crops": {"size": 64, "number": 2, "scale": (0.4, 1)},
            "local_crops": {"size": 32, "number": 2, "scale": (0.05, 0.4)},
        },
        "model": {"arch": "swin", "embed_dim": 32, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4},
        "head": {"out_dim": 512, "hidden_dim": 64, "bottleneck_dim": 32},
        "training": {"batch_size": 16, "epochs": 2, "precision": "float32"},
    }
    return Config.from_mapping({**values, **{name: values.get(name, {}) | part for name, part in sections.items()}})


def test_operations_and_bytes_are_those_of_a_real_step() -> None:
    config = micro(optimizer={"freeze_last_layer_epochs": 0})
    demand = count_demand(config, torch.float32, "cpu")
    state = assemble_train_state(config, World(0, 1, CPU, None), cast(TrainLoader, OneStep()))
    crops = [torch.randn(16, 3, size, size) for size in (64, 64, 32, 32)]

    def step() -> None:
        training_step(state, Batch(crops, np.arange(16), 0.0), state.schedule_values())

    step()  # makes the optimizer's averages
    linear = {torch.ops.mkldnn._linear_pointwise: lambda x, weight, *_, **__: 2 * math.prod(x) * weight[0]}
    with FlopCounterMode(display=False, custom_mapping=linear) as counter:
        step()
    # The first layer's input takes no gradient, and the matching of regions is left out.
    assert demand.flops * 16 == pytest.approx(counter.get_total_flops(), rel=0.05)

    class Peak(LiveBytes):
        peak = 0

        def __torch_dispatch__(self, *args: Any, **kwargs: Any) -> Any:
            result = super().__torch_dispatch__(*args, **kwargs)
            self.peak = max(self.peak, self.bytes)
            return result

    state.reducer.zero()
    with Peak() as live:
        step()
    held = 16 * sum(p.numel() for p in state.student.parameters()) + sum(crop.nbytes for crop in crops)
    assert demand.bytes(16) == pytest.approx(held + live.peak, rel=0.15)


# GB that torch's CUDA allocator had in use at most in a step of 64 images in bfloat16 with fused AdamW and the Triton
# kernels (benchmarks/gpu_counts.py, torch 2.14.1, 2026-11-29; windows of 14: 2026-11-30). No kernel ran: allocations do
# not depend on values.
ALLOCATED = {
    "imagenet_swin_tiny_w7": 14.66,
    "imagenet_swin_tiny_w7_view": 10.58,
    "imagenet_swin_base_w7": 25.34,
    "imagenet_swin_base_w14": 25.49,
    "imagenet_vil_2262": 26.07,
    "imagenet_cvt_tiny": 20.30,
    "imagenet_resnet50": 15.30,
}


@pytest.mark.parametrize("recipe", ALLOCATED)
def test_the_bytes_of_a_gpu_are_those_that_torch_allocates_there(recipe: str) -> None:
    counted = count_memory(Config.load(recipe), torch.bfloat16, "cuda").bytes(64)
    assert counted / 1e9 == pytest.approx(ALLOCATED[recipe], rel=0.05)


def test_lazy_logits_take_what_torch_allocates_on_a_gpu() -> None:
    """``benchmarks/gpu_counts.py --set training.lazy_logits=true``, as above, 2026-11-30."""
    config = Config.load("imagenet_swin_tiny_w7", ["training.lazy_logits=true"])
    assert count_memory(config, torch.bfloat16, "cuda").bytes(64) / 1e9 == pytest.approx(11.56, rel=0.05)


def test_a_plan_counts_lazy_logits_where_a_training_uses_them() -> None:
    config = Config.load("imagenet_swin_tiny_w7", ["training.batch_size=256"])
    small, large = (plan_run(config, gpu, 1, 1_281_167).demand for gpu in ("a100", "h200"))
    assert 256 * large.logit_bytes > 0.1 * 141e9 > 0 and small.image_bytes == large.image_bytes
    few = plan_run(
        config.model_copy(update={"training": config.training.model_copy(update={"batch_size": 64})}), "h200", 1, 10**6
    )
    assert few.demand.image_bytes == large.image_bytes + large.logit_bytes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_bytes_of_a_gpu_are_those_of_a_real_step(torch_settings: None) -> None:
    make_deterministic()  # the default, which selects other kernels
    config = Config.load("imagenet_swin_tiny_w7", ["training.batch_size=64", "optimizer.freeze_last_layer_epochs=0"])
    state = assemble_train_state(config, World(0, 1, torch.device("cuda", 0), None), cast(TrainLoader, OneStep()))
    batch = Batch([torch.zeros(64, 3, size, size) for size in (*(224,) * 2, *(96,) * 8)], np.arange(64), 0.0)
    training_step(state, batch, state.schedule_values())  # makes the optimizer's averages
    torch.cuda.reset_peak_memory_stats()
    training_step(state, batch, state.schedule_values())
    counted = count_demand(config, torch.bfloat16, "cuda").bytes(64)
    assert counted == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)


def test_counting_takes_no_tensor_into_the_layouts_that_real_steps_use() -> None:
    windows._window_layout.cache_clear()
    count_demand(micro(), torch.bfloat16)
    layout = windows.window_layout(8, 8, 4, 2, CPU)
    assert type(layout.index) is torch.Tensor


def test_a_network_that_draws_in_its_forward_pass_is_counted() -> None:
    demand = count_demand(Config.load("imagenet_vil_2262"), torch.bfloat16)
    assert demand.flops > 1e11 and demand.image_bytes > 1e8


def test_activation_checkpointing_keeps_less_and_computes_more() -> None:
    kept, checkpointed = (
        count_demand(micro(launch={"activation_checkpointing": c}), torch.bfloat16) for c in (False, True)
    )
    assert checkpointed.image_bytes < 0.7 * kept.image_bytes
    assert kept.flops < checkpointed.flops < 4 / 3 * kept.flops
    assert (
        checkpointed.bytes(checkpointed.most_images(1e9)) <= 1e9 < checkpointed.bytes(checkpointed.most_images(1e9) + 1)
    )


def test_a_plan_follows_from_the_count_and_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    config = micro(training={"precision": "bfloat16"})
    demand = count_demand(config, torch.bfloat16)
    monkeypatch.setitem(planning.GPUS, "h200", Gpu("large", demand.bytes(16)))
    monkeypatch.setitem(planning.GPUS, "a100", Gpu("small", demand.bytes(6)))

    large = plan_run(config, "h200", 2, images=100, images_per_second=32.0)
    assert large.fits and (large.images_per_process, large.micro_batch, large.steps) == (8, 8, 12)
    assert large.seconds == pytest.approx(12 * 16 / 32.0)
    assert large.cost(price=3.0) == pytest.approx(3.0 * 2 * 6.0 / 3600)
    unmeasured = plan_run(config, "h200", 2, images=100)
    assert unmeasured.bytes == large.bytes
    assert (unmeasured.images_per_second, unmeasured.seconds, unmeasured.cost(price=3.0)) == (None, None, None)

    small = plan_run(config, "a100", 1, images=100)
    assert not small.fits
    output = advice(config, small)
    setting = next(line for line in output if "max_images_per_process" in line)
    most = int(setting.split("=")[1].split(":")[0])
    again = plan_run(micro(training={"max_images_per_process": most, "precision": "bfloat16"}), "a100", 1, images=100)
    assert again.fits and again.micro_batch == most
    assert any("launch.activation_checkpointing=true" in line for line in output) and any(
        line.startswith("--gpus ") for line in output
    )


@pytest.mark.parametrize(("gpus", "images", "message"), [(1, 15, "--images 15"), (17, 100, "--gpus 17")])
def test_what_makes_no_step_is_refused(gpus: int, images: int, message: str) -> None:
    with pytest.raises(UserError, match=f"{message}: expected at .* training.batch_size, which is 16"):
        plan_run(micro(), "h200", gpus, images)


def test_larger_steps_lie_on_the_line_through_the_rehearsed_ones() -> None:
    seen = Rehearsal(1, 1, (4, 8), (1.0, 1.5), (10.0, 14.0))
    assert (seen.seconds_of(8), seen.seconds_of(16)) == (1.5, 2.5)
    assert seen.bytes_of(16) - seen.bytes_of(8) == 8.0


def test_this_machine_takes_real_steps_in_as_many_processes_as_will_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearse, "MAX_FLOPS", 1e10)
    plan = plan_run(micro(training={"processes": 2}), "cpu", 1, images=32)
    assert plan.devices == 2 and plan.images_per_process == 8
    assert plan.images_per_second and plan.seconds == pytest.approx(4 * 16 / plan.images_per_second)
    assert 2 * 100e6 < plan.bytes < plan.memory == psutil.virtual_memory().total


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_machine_with_a_gpu_rehearses_on_its_processors() -> None:
    plan = plan_run(micro(training={"precision": "auto"}), "cpu", 1, images=32)
    assert plan.devices == min(available_cores(), 2)
    assert plan.bytes > 2 * 100e6, "not the resident memory of processes"


def test_checkpoints_have_the_size_of_the_saved_state() -> None:
    config = micro()
    student, teacher = build_student_teacher(config)
    optimizer = build_optimizer(student, config)
    for p in student.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    written = 0
    for thing in (student, teacher, optimizer):
        file = io.BytesIO()
        torch.save(thing.state_dict(), file)
        written += len(file.getvalue())
    counted = count_demand(config, torch.float32).checkpoint_bytes
    files = 3e3 * len(list(student.named_parameters()))  # names and headers, which weigh in a network this small
    assert counted < written < counted + files


def test_the_training_at_risk_and_the_bytes_follow_from_the_interval() -> None:
    auto = checkpoint_cost(micro(training={"checkpoint_minutes": "auto"}), 1e9, step_seconds=1.0)
    assert (auto.lost_seconds, auto.bytes_per_hour) == (900, 4e9)
    assert (auto.pod_lost_seconds, auto.pod_bytes_per_hour) == (60, (60e9, 120e9))
    assert auto.store_rate == pytest.approx(1e9 / 30)
    fixed = checkpoint_cost(micro(training={"checkpoint_minutes": 5}), 1e9, step_seconds=1.0)
    assert (fixed.lost_seconds, fixed.pod_lost_seconds, fixed.bytes_per_hour) == (300, 300, 12e9)
    by_steps = checkpoint_cost(
        micro(training={"checkpoint_minutes": 5, "checkpoint_steps": 100}), 1e9, step_seconds=0.5
    )
    assert by_steps.lost_seconds == 50

    unmeasured = checkpoint_cost(micro(training={"checkpoint_minutes": 5, "checkpoint_steps": 100}), 1e9, None)
    assert unmeasured.lost_seconds == 300


POD_LINE = "in a step's own pod: at most 60 s of training lost if the store takes 39 MB/s; 71 to 142 GB per hour"


def test_plan_prints_time_cost_and_checkpoints_at_a_measured_speed(capsys: pytest.CaptureFixture[str]) -> None:
    plan(Config.load("imagenet_swin_tiny_w7"), "h100", 8, 1_281_167, 2.0, 5600.0, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert "speed   5,600.0 images/s (from --images-per-second)" in lines and "time    19.1 hours" in lines
    assert lines[-1] == "cost    305 at 2 per device-hour"
    (first,) = [number for number, line in enumerate(lines) if line.startswith("saved ")]
    # 73.8 M parameters, of which a checkpoint holds four times four bytes; 1,000 steps take a minute and a half.
    assert lines[first] == "saved   1.2 GB every 1.5 minutes, and on SIGTERM; 46.5 GB per hour"
    assert lines[first + 1].strip() == POD_LINE


def test_plan_without_a_measured_speed_says_what_is_known_and_asks_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Config.load("imagenet_swin_tiny_w7")
    plan(recipe, "h100", 8, 1_281_167, None, None, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert any(
        line.startswith("work ") and line.endswith("300 epochs of 1,281,167 images, 750,600 steps") for line in lines
    )
    (speed,) = [line for line in lines if line.startswith("speed ")]
    assert "not known" in speed and "--images-per-second" in speed
    assert not any(line.startswith(("time", "cost")) for line in lines)
    assert "saved   1.2 GB at least every 15 minutes, and on SIGTERM; at least 4.7 GB per hour" in lines
    assert lines[-1].strip() == POD_LINE
    with pytest.raises(UserError, match=r"--price 2: .* needs their measured speed; give --images-per-second"):
        plan(recipe, "h100", 8, 1_281_167, 2.0, None, as_json=False)


def test_plan_refuses_a_speed_for_the_machine_that_measures_its_own() -> None:
    with pytest.raises(UserError, match="--images-per-second: no effect with --gpu cpu"):
        plan_run(micro(), "cpu", 1, 100, 5.0)
