"""ONNX: one file for onnxruntime and other runtimes, for any batch size and one image size.

The exporter is PyTorch's, based on ``torch.export`` (``dynamo=True``). It analyzes the network's code instead of tracing
one run, so the batch size stays dynamic. The older tracing exporter fixes the batch size wherever Python code reads it,
and PyTorch no longer develops it.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from esvit_core.errors import UserError
from esvit_core.models.region_map import FeatureNetwork

# The exporter's native opset; others would need a converter.
OPSET = 18
PIXELS, OUTPUTS = "pixels", ("view_features", "region_features")
_LIBRARIES = ("onnx", "onnxscript", "onnxruntime")


def write(backbone: nn.Module, path: Path, description: dict[str, Any], regions: bool) -> None:
    """Write the backbone as ONNX.

    The input ``pixels`` (batch, 3, S, S) takes normalized images of ``eval_crop`` pixels; the outputs are
    ``view_features`` (batch, D) and, with ``regions``, ``region_features`` (batch, H, W, D'). The file's
    ``metadata_props`` contain the preprocessing.

    Raises:
        UserError: a required library is not installed.
    """
    require_libraries()
    network = FeatureNetwork(backbone, regions).eval()
    size = description["eval_crop"]
    outputs = list(OUTPUTS if regions else OUTPUTS[:1])
    with torch.no_grad(), _plain_attention(), _quiet():
        program = torch.onnx.export(
            network,
            (torch.zeros(2, 3, size, size),),
            dynamo=True,
            dynamic_shapes={PIXELS: {0: torch.export.Dim("batch", min=1)}},
            opset_version=OPSET,
            input_names=[PIXELS],
            output_names=outputs,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update({key: _text(value) for key, value in description.items()})
    program.save(path)


def read(path: Path) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Load the file in onnxruntime as a function of images (B, 3, S, S)."""
    require_libraries()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: tuple(map(torch.from_numpy, session.run(None, {PIXELS: images.numpy()})))


def usage(path: Path, description: dict[str, Any]) -> list[str]:
    """Return the lines of Python that load the file."""
    size = description["eval_crop"]
    return [
        "import numpy, onnxruntime",
        f"session = onnxruntime.InferenceSession({str(path)!r})  # how to prepare images: its metadata",
        f'view, *regions = session.run(None, {{"{PIXELS}": numpy.zeros((1, 3, {size}, {size}), numpy.float32)}})',
    ]


def require_libraries() -> None:
    """Check that the libraries for ONNX are installed.

    Raises:
        UserError: one of the libraries is not installed.
    """
    from importlib.util import find_spec

    if missing := [name for name in _LIBRARIES if find_spec(name) is None]:
        raise UserError(f"format onnx: {', '.join(missing)} not installed; pip install 'esvit[export]'")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, which logs, warns and prints about versions and progress."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


class _plain_attention(TorchFunctionMode):  # noqa: N801 (used as a context)
    """Compute attention by its formula, because the exporter's translation supports only one batch axis."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = kwargs or {}
        if func is F.scaled_dot_product_attention and not (values.get("is_causal") or values.get("enable_gqa")):
            return _attention(*args, **values)
        return func(*args, **values)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    **_: Any,  # dropout, which is off in eval mode
) -> Tensor:
    logits = q * (q.shape[-1] ** -0.5 if scale is None else scale) @ k.mT
    return (logits if attn_mask is None else logits + attn_mask).softmax(-1) @ v
