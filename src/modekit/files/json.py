"""JSON that strangers wrote, as plain data: what no JSON and no file can hold is refused."""

from __future__ import annotations

import json
import math
import re
from typing import Any

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str) -> Any:
    """JSON as plain data. Raises ValueError: also where it nests too deeply, or holds what no JSON and no file can.

    That is NaN and Infinity, numbers of thousands of digits, and halves of surrogate pairs, which no encoding writes.
    """
    try:
        data = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
        if _SURROGATE.search(text):
            json.dumps(data, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return data


def _finite(digits: str) -> float:
    if math.isinf(number := float(digits)):
        raise ValueError(f"{digits[:20]} is no number that a computer can hold")
    return number


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")
