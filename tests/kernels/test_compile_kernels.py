"""The Triton kernels compile for the GPUs in use, and keep their values in registers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("compile_kernels.py")
F32, BF16, I32, I64 = "*fp32", "*bf16", "*i32", "*i64"
WINDOW = {"N": 49, "WINDOW": 7, "SHIFTED": True, "D": 32, "TILE": 64, "WIDTH": 32}  # of the published Swins
LARGE_WINDOW = {"N": 196, "SHIFTED": True, "D": 32, "BLOCK": 64, "WIDTH": 32}
SIZES = {"count": "i32", "heads": "i32", "scale": "fp32"}
NORM = {"ADDS": True, "SCALES": True}
NORMS = [(96, 128, 32, 4), (768, 1024, 4, 8)]  # width of a row, its power of two, rows, warps
LOGITS = dict.fromkeys(("student", "teacher"), BF16) | dict.fromkeys(("center", "teacher_lse", "weights"), F32)
LOGITS |= {"matches": I64, "K": "i32", "inverse_temp": "fp32", "teacher_inverse_temp": "fp32"}
KERNELS: dict[str, tuple[str, str, dict[str, str], dict[str, Any], dict[str, int]]] = {
    "multiply": (
        "multi_tensor_triton",
        "_multiply_kernel",
        {"pointers": I64, "sizes": I64, "factors": F32},
        {"BLOCK": 4096},
        {},
    ),
    "attend": (
        "window_attention_triton",
        "_attend_kernel",
        {"qkv": BF16, "fill": F32, "windows": I32, "table": F32, "biases": F32, "out": BF16, "lse": F32, **SIZES},
        WINDOW,
        {"num_warps": 4},
    ),
    "attend backward": (
        "window_attention_triton",
        "_attend_backward_kernel",
        {"qkv": BF16, "fill": F32, "windows": I32, "biases": F32, "out": BF16, "lse": F32, "outer": BF16}
        | {"of_qkv": BF16, "of_bias": F32, "of_fill": F32, **SIZES},
        WINDOW,
        {"num_warps": 8, "num_stages": 1},
    ),
    **{
        f"attend in large windows, {name}": (
            "large_window_attention_triton",
            f"_{name}_kernel",
            {"qkv": BF16, "fill": F32, "windows": I32, "biases": F32, "out": BF16, "lse": F32, **more, **SIZES},
            LARGE_WINDOW | ({"STEP": 32} if name == "key_gradient" else {}),
            {"num_warps": 4, "num_stages": 1},
        )
        for name, more in {
            "attend": {},
            "query_gradient": {"outer": BF16, "of_qkv": BF16},
            "bias_gradient": {"outer": BF16, "of_bias": F32},
            "key_gradient": {"outer": BF16, "of_qkv": BF16, "of_fill": F32},
        }.items()
    },
    "gradient of the bias table of large windows": (
        "large_window_attention_triton",
        "_table_gradient_kernel",
        {"of_bias": F32, "of_table": F32, "programs": "i32", "heads": "i32"},
        {"WINDOW": 14, "TILE": 256},
        {},
    ),
    **{
        f"add norm {C}": (
            "add_norm_triton",
            "_add_norm_kernel",
            dict.fromkeys(("x", "total"), F32)
            | dict.fromkeys(("y", "normed"), BF16)
            | dict.fromkeys(("scales", "weight", "bias", "means", "rstds"), F32)
            | {"images": I32, "T": "i32", "eps": "fp32"},
            NORM | {"C": C, "WIDTH": width, "ROWS": rows},
            {"num_warps": warps},
        )
        for C, width, rows, warps in NORMS
    },
    **{
        f"add norm backward {C}": (
            "add_norm_triton",
            "_add_norm_backward_kernel",
            dict.fromkeys(("total", "of_total", "of_x"), F32)
            | dict.fromkeys(("of_normed", "of_y"), BF16)
            | dict.fromkeys(("scales", "weight", "means", "rstds", "of_weights"), F32)
            | {"images": I32, "T": "i32"},
            NORM | {"C": C, "WIDTH": width, "ROWS": rows, "CONTINUES": True},
            {"num_warps": warps},
        )
        for C, width, rows, warps in NORMS
    },
    "teacher": (
        "cross_entropy_triton",
        "_teacher_kernel",
        {"logits": BF16, "center": F32, "lse": F32, "K": "i32", "inverse_temp": "fp32"},
        {"BLOCK": 4096},
        {},
    ),
    "cross-entropy": (
        "cross_entropy_triton",
        "_forward_kernel",
        LOGITS | dict.fromkeys(("loss", "lse"), F32),
        {"Q": 2, "BLOCK": 4096},
        {"num_warps": 8},
    ),
    "cross-entropy backward": (
        "cross_entropy_triton",
        "_backward_kernel",
        LOGITS | {"lse": F32, "outer": F32, "gradient": BF16},
        {"Q": 2, "BLOCK": 4096},
        {},
    ),
    "gelu backward": (
        "gelu_triton",
        "_gelu_backward_kernel",
        {"h": BF16, "outer": BF16, "of_h": BF16, "activation": BF16, "count": "i32"},
        {"BLOCK": 1024},
        {},
    ),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[int]]]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    kernels = [[f"esvit_core.kernels.{module}", *rest] for module, *rest in KERNELS.values()]
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], input=json.dumps(kernels), capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(KERNELS, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("name", KERNELS)
def test_no_value_is_spilled(compiled: dict[str, dict[str, list[int]]], name: str) -> None:
    assert set(compiled[name]) == {"80", "90", "100"}
    for architecture, (registers, spilled) in compiled[name].items():
        assert registers <= 255 and spilled == 0, (architecture, registers, spilled)
