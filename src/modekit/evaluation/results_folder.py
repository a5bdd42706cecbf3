"""OUT/results: where what was found lies, and the one reader of eval.json."""

from __future__ import annotations

from collections.abc import Mapping

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.evaluation.results import Results, results_from_data
from modekit.files.change import change_together
from modekit.files.read import read_json
from modekit.files.write import json_bytes

RESULTS_FOLDER = "results"
RESULTS_FILE = "eval.json"


def read_results(checkpoint: Checkpoint) -> Results:
    """The table that eval.json holds, whatever it was made of. Raises OSError and ValueError."""
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
