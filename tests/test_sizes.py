"""What pods ask for where the configuration says auto."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from esvit_core.config import Config
from esvit_core.config.cluster_settings import PodConfig
from esvit_core.config.kubernetes_names import AUTO, quantity_bytes, quantity_cores
from esvit_core.errors import UserError
from esvit_core.planning import pod_sizes
from esvit_core.planning.count_operations import count_demand, count_parameters
from esvit_core.planning.pod_sizes import Size, fill_auto, resolve_pod
from esvit_pipelines.settings import Settings, cluster_request

NEEDED = Size(0.5, 4, 2**30, 2**31, 50 * 2**30)


@pytest.mark.parametrize(
    ("given", "cpu", "memory"),
    [
        ({}, ("500m", "4"), ("1Gi", "2Gi")),
        ({"cpu": "8", "memory": "6Gi"}, ("8", "8"), ("6Gi", "6Gi")),
        ({"cpu": "200m", "memory_limit": "3G"}, ("200m", "4"), ("1Gi", "3G")),
        ({"cpu_limit": None, "memory_limit": "512Mi"}, ("500m", None), ("512Mi", "512Mi")),
        ({"cpu_limit": "250m"}, ("250m", "250m"), ("1Gi", "2Gi")),
    ],
)
def test_what_is_said_holds_and_auto_fits_to_it(
    given: dict[str, str], cpu: tuple[str, str], memory: tuple[str, str]
) -> None:
    pod = fill_auto(PodConfig(**given), lambda: NEEDED)
    assert ((pod.cpu, pod.cpu_limit), (pod.memory, pod.memory_limit)) == (cpu, memory)


def test_the_recipe_is_not_asked_where_everything_is_said() -> None:
    pod = PodConfig(cpu="1", cpu_limit="2", memory="1Gi", memory_limit="2Gi", scratch="5Gi", shared_memory="1Gi")
    assert fill_auto(pod, lambda: pytest.fail("asked")) is pod


@pytest.mark.parametrize("role", ["prepare", "train", "evaluate", "publish"])
def test_the_demo_fits_on_four_cores(role: str) -> None:
    """Of which Kubernetes and Kubeflow take most."""
    pod = resolve_pod(Config.load("demo"), role)  # type: ignore[arg-type]
    assert AUTO not in (pod.cpu, pod.cpu_limit, pod.memory, pod.memory_limit, pod.scratch)
    assert quantity_cores(pod.cpu) <= 0.5 and quantity_bytes(pod.memory) <= 4 * 2**30
    assert quantity_bytes(pod.memory_limit) >= quantity_bytes(pod.memory)


def test_the_memory_holds_what_the_steps_of_all_processes_are_counted_to_take() -> None:
    config = Config.load("demo", ["training.processes=2", "training.batch_size=1024"])
    counted = 2 * count_demand(config, torch.float32, "cpu").bytes(512)
    assert counted < quantity_bytes(resolve_pod(config, "train").memory) < 2 * counted + 4 * 2**30


def test_beside_the_shard_cache_there_is_space_for_the_checkpoints_of_the_largest_preset() -> None:
    config = Config.load("imagenet_swin_base_w14")
    checkpoint = 16 * count_parameters(config)  # both networks and the averages of AdamW
    for role, number in (("train", 4), ("evaluate", 1), ("publish", 2)):
        pod = resolve_pod(config, role)  # type: ignore[arg-type]
        assert quantity_bytes(pod.scratch) - 2**30 * float(pod.cache_gib) >= number * checkpoint


def test_a_network_of_a_billion_parameters_gets_a_larger_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pod_sizes, "_parameters", lambda text: 10**9)
    pod = resolve_pod(Config.load("demo"), "train")
    assert quantity_bytes(pod.scratch) - 2**30 * float(pod.cache_gib) >= 4 * 16 * 10**9
    own = resolve_pod(Config.load("demo", ["cluster.train.scratch=2Ti"]), "train")
    assert (own.scratch, own.cache_gib) == ("2Ti", "1024")


def test_larger_batches_networks_and_more_accelerators_ask_for_more() -> None:
    def memory(*settings: str) -> int:
        return quantity_bytes(resolve_pod(Config.load("demo", settings), "train").memory)

    assert memory("training.batch_size=512") > memory()
    assert memory("training.batch_size=512", "training.max_images_per_process=32") < memory("training.batch_size=512")
    several = ["launch.scheduler=volcano", "launch.nodes=4"]
    assert memory("training.batch_size=512", *several) < memory("training.batch_size=512")
    gpus = [resolve_pod(Config.load("demo", [f"cluster.train.accelerators={n}"]), "train") for n in (1, 8)]
    assert quantity_bytes(gpus[0].memory) < quantity_bytes(gpus[1].memory)
    assert quantity_cores(gpus[0].cpu) < quantity_cores(gpus[1].cpu)


@pytest.mark.parametrize("gpus", [1, 8])
def test_shared_memory_holds_the_batches_of_six_workers_per_gpu(gpus: int) -> None:
    settings = [f"cluster.train.accelerators={gpus}", f"training.batch_size={64 * gpus}"]
    config = Config.load("imagenet_swin_tiny_w7", settings)
    pod = resolve_pod(config, "train")
    batch = 64 * 3 * (2 * 224**2 + 8 * 96**2)  # levels: a byte per value
    shared = quantity_bytes(str(pod.shared_memory))
    assert gpus * 13 * batch <= shared < gpus * 13 * batch + 2**30
    assert quantity_bytes(pod.memory) > shared + 8 * gpus * 2**30
    assert resolve_pod(Config.load("demo"), "train").shared_memory == "1Gi"  # no workers on CPUs


def test_a_pipeline_is_compiled_with_sizes_for_the_recipe_that_is_asked_for() -> None:
    """What else it is compiled with is the same for every recipe."""
    ask_for = partial(Settings, "", transfer=(), out=Path("out"), bucket=None)
    small = cluster_request(ask_for("demo", ())).compile_config
    large = cluster_request(ask_for("demo", ("training.batch_size=1024",))).compile_config
    assert large.training == small.training
    assert quantity_bytes(large.cluster.train.memory) > quantity_bytes(small.cluster.train.memory)


def test_sizes_that_cannot_follow_from_a_recipe_are_asked_for() -> None:
    there = Settings("", "s3://b/own.yaml", (), (), Path("out"), None)
    with pytest.raises(UserError, match=r"recipe s3://b/own.yaml: .*cluster.train.memory=16Gi"):
        _ = cluster_request(there).compile_config
    message = cluster_request(replace(there, overrides=("cluster.train.memory=16Gi",)))
    assert message.compile_config.cluster.train.memory == "16Gi"
