"""What the processor supports natively; this module does not import torch."""

from __future__ import annotations

import re
from pathlib import Path

_BFLOAT16 = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "bf16": "Arm BF16"}


def cpu_bfloat16() -> str:
    """Return the name of the instructions that compute bfloat16 natively, or an empty string."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return ""
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    flags = set(line.group(1).split()) if line else set()
    return next((name for flag, name in _BFLOAT16.items() if flag in flags), "")
