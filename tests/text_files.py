"""Files of text as users have them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from modekit.text.records import data_of


def write_records(path: Path, records: Iterable[Any]) -> str:
    """A line per record, or per document as a record; what a recipe in the file's folder calls it."""
    said = (record if isinstance(record, dict) else data_of(record) for record in records)
    path.write_text("".join(json.dumps(record) + "\n" for record in said))
    return f"./{path.name}"
