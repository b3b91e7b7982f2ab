"""The JSON text that is stored."""

from __future__ import annotations

import json
from typing import Any


def encode_json(value: Any) -> bytes:
    """JSON that people can read, keys in the order they were given."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
