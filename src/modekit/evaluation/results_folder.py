"""OUT/results: where what was found lies, and the one reader of eval.json."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.evaluation.results import Results, Row, results_from_data
from modekit.files.change import change_together
from modekit.files.read import LARGE, parse_json, read_bytes, read_json
from modekit.files.user_cache import is_proven_here, keep_proven
from modekit.files.write import json_bytes

RESULTS_FOLDER = "results"
RESULTS_FILE = "eval.json"


def read_results(checkpoint: Checkpoint) -> Results:
    """The table that eval.json holds, whatever it was made of. Raises OSError and ValueError."""
    return results_from_data(read_json(checkpoint.folder / RESULTS_FOLDER / RESULTS_FILE))


def rows_scored_here(checkpoint: Checkpoint) -> Sequence[Row]:
    """The rows of eval.json, if this user's modekit wrote that very file; else none. Raises OSError and ValueError.

    A file that somebody else brought is shown as what it says (`modekit report`), but no row of it stands for a score.
    """
    content = read_bytes(checkpoint.folder / RESULTS_FOLDER / RESULTS_FILE, LARGE)
    return results_from_data(parse_json(content.decode())).rows if is_proven_here(_claim(content)) else ()


def write_results(checkpoint: Checkpoint, files: Mapping[str, bytes], *, all_of: str | None = None) -> None:
    """Write files into OUT/results, all together; `all_of` names a folder there of which no others are to stay.

    Raises OSError and OutputError.
    """
    inside = {f"{RESULTS_FOLDER}/{name}": content for name, content in files.items()}
    change_together(checkpoint.folder, inside, remove_in=f"{RESULTS_FOLDER}/{all_of}" if all_of else None)


def write_table(checkpoint: Checkpoint, results: Results) -> None:
    """Write eval.json and eval.md."""
    content = json_bytes(results.as_data())
    write_results(checkpoint, {RESULTS_FILE: content, "eval.md": results.markdown().encode()})
    keep_proven(_claim(content))


def _claim(content: bytes) -> str:
    return f"{RESULTS_FILE} {hashlib.sha256(content).hexdigest()}"
