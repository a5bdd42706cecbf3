"""Data files of a stranger's tasks, looked through before the harness loads them: nothing packed, and no bombs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modekit.files.read import parse_json, read_text

LARGEST = 2**25
"""Bytes of a file."""
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt")
_MOST_LINES = 200_000
_MOST_VALUES = 2**21  # lists and objects of a file
_MOST_COLUMNS = 1_000  # keys within keys count as columns, too


def check_data(place: Path, loader: str, delimiter: str) -> None:
    """Raise OSError, or ValueError that says why a file is not read by a loader (json, csv, text)."""
    from datasets.utils.extract import Extractor

    text = read_text(place, LARGEST)
    packed = Extractor.infer_extractor_format(str(place))
    if packed:
        raise ValueError(f"it is packed ({packed})")
    lines = text.splitlines()
    if len(lines) > _MOST_LINES:
        raise ValueError(f"it has more than {_MOST_LINES:,} lines")
    if loader == "csv" and lines and lines[0].count(delimiter) >= _MOST_COLUMNS:
        raise ValueError(f"it has more than {_MOST_COLUMNS:,} columns")
    if loader == "json":
        if text.count("{") + text.count("[") > _MOST_VALUES:
            raise ValueError(f"it has more than {_MOST_VALUES:,} lists and objects")
        _check_columns(text, lines)


def _check_columns(text: str, lines: list[str]) -> None:
    try:
        rows = [parse_json(line) for line in lines if line.strip()]
    except ValueError:  # not one item a line
        rows = [parse_json(text)]
    columns: set[tuple[str, ...]] = set()
    left: list[tuple[tuple[str, ...], Any]] = [((), row) for row in rows]
    while left:
        path, value = left.pop()
        if isinstance(value, dict):
            left += [((*path, key), each) for key, each in value.items()]
        elif isinstance(value, list):
            left += [(path, each) for each in value if isinstance(each, (dict, list))]
        columns.add(path)
        if len(columns) > _MOST_COLUMNS:
            raise ValueError(f"it has more than {_MOST_COLUMNS:,} columns")
