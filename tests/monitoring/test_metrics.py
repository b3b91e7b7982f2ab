"""The figures on /metrics."""

import socket
import urllib.request

import pytest

from esvit_core.errors import UserError
from esvit_core.monitoring.metrics import TrainingMetrics


def test_served_figures_have_conventional_names() -> None:
    metrics = TrainingMetrics("run-a", "demo", world_size=2, total_steps=100)
    metrics.step(1, seconds=0.2, wait_seconds=0.01, images=64)
    metrics.line(
        {"step": 1, "loss": 5.0, "loss_view": 4.0, "loss_region": 6.0, "lr": 1e-3, "entropy_view": 3.0, "kl_view": 1.0}
    )
    metrics.line({"student_kl_region": 0.5, "prototypes_view": 12, "centre_norm_view": 0.25})
    metrics.line({"feature_rank": 7.5, "mutual_matches": 0.75, "feature_std": None})
    metrics.warned("entropy_view")
    metrics.checkpoint(0.5, 1000)
    metrics.resumed(3)
    address = metrics.serve(0)
    text = urllib.request.urlopen(address, timeout=5).read().decode()
    assert address.startswith("http://127.0.0.1:")
    who = 'recipe="demo",run="run-a"'
    for line in (
        f"esvit_train_step_seconds_count{{{who}}} 1.0",
        f"esvit_train_images_total{{{who}}} 64.0",
        f'esvit_train_loss{{{who},term="region"}} 6.0',
        f"esvit_train_learning_rate{{{who}}} 0.001",
        f'esvit_teacher_entropy_nats{{level="view",{who}}} 3.0',
        f'esvit_teacher_kl_nats{{level="view",{who}}} 1.0',
        f'esvit_student_teacher_kl_nats{{level="region",{who}}} 0.5',
        f'esvit_teacher_prototypes_in_use{{level="view",{who}}} 12.0',
        f'esvit_teacher_centre_norm{{level="view",{who}}} 0.25',
        f"esvit_teacher_feature_rank{{{who}}} 7.5",
        f"esvit_region_mutual_match_ratio{{{who}}} 0.75",
        f'esvit_train_warnings_total{{{who},sign="entropy_view"}} 1.0',
        f"esvit_train_world_size{{{who}}} 2.0",
        f"esvit_train_resumes_total{{{who}}} 3.0",
        f"esvit_checkpoint_bytes{{{who}}} 1000.0",
    ):
        assert line in text
    assert "process_resident_memory_bytes" in text


def test_a_port_in_use_is_a_users_mistake() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"training.metrics_port {port}"):
            TrainingMetrics("run-a", "demo", 1, 1).serve(port)
