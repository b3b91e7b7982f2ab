"""Encode JSON objects for the store."""

from __future__ import annotations

import json
from typing import Any


def encode_json(value: Any) -> bytes:
    """Encode a value as readable JSON, with keys in insertion order."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
