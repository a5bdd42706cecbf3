"""OUT/results: where what was found lies, and the one reader of eval.json."""

from __future__ import annotations

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.evaluation.results import Results, results_from_data
from modekit.files.read import read_json
from modekit.files.staging import write_atomically, write_json

RESULTS_FOLDER = "results"
RESULTS_FILE = "eval.json"


def read_results(checkpoint: Checkpoint) -> Results:
    """The table that eval.json holds, whatever it was made of. Raises OSError and ValueError."""
    return results_from_data(read_json(checkpoint.folder / RESULTS_FOLDER / RESULTS_FILE))


def write_results(checkpoint: Checkpoint, results: Results) -> None:
    """Write eval.json and eval.md."""
    folder = checkpoint.folder / RESULTS_FOLDER
    folder.mkdir(exist_ok=True)
    write_json(folder / RESULTS_FILE, results.as_data())
    write_atomically(folder / "eval.md", results.markdown().encode())
