"""OUT/results: where what was found lies, and the one reader of eval.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.evaluation.results import Results, results_from_data
from modekit.files.change import change_together
from modekit.files.write import json_bytes

RESULTS_FOLDER = "results"
RESULTS_FILE = "eval.json"
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading a results file raises when it is not there, damaged, or of another version."""
_LARGEST = 2**28  # bytes of a results file; more is not one


def read_json(path: Path) -> Any:
    """Plain data of a results file. Raises one of UNREADABLE: FileNotFoundError where there is none."""
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"{path.stat().st_size:,} bytes")
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)


def read_results(checkpoint: Checkpoint) -> Results:
    """The table that eval.json holds, whatever it was made of. Raises one of UNREADABLE."""
    return results_from_data(read_json(checkpoint.folder / RESULTS_FOLDER / RESULTS_FILE))


def write_results(checkpoint: Checkpoint, files: Mapping[str, bytes], *, all_of: str | None = None) -> None:
    """Write files into OUT/results, all together; `all_of` names a folder there of which no others are to stay.

    Raises OSError and OutputError.
    """
    inside = {f"{RESULTS_FOLDER}/{name}": content for name, content in files.items()}
    change_together(checkpoint.folder, inside, remove_in=f"{RESULTS_FOLDER}/{all_of}" if all_of else None)


def write_table(checkpoint: Checkpoint, results: Results) -> None:
    """Write eval.json and eval.md."""
    write_results(checkpoint, {RESULTS_FILE: json_bytes(results.as_data()), "eval.md": results.markdown().encode()})


def _refuse_constant(name: str) -> float:
    raise ValueError(name)
