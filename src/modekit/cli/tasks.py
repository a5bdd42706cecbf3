"""`modekit eval --tasks`: parses, calls tasks.run, prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from modekit.cli.printing.console import out
from modekit.cli.progress import drawn_progress
from modekit.errors import ModekitError
from modekit.run import Run

if TYPE_CHECKING:
    from modekit.cli.results import TaskOptions


def score_tasks(checkpoint: Path, options: TaskOptions, *, as_json: bool, trust_remote_code: bool) -> None:
    """Run tasks named with commas between them and draw their table."""
    from modekit.checkpoint.checkpoint import open_checkpoint
    from modekit.cli.printing.tasks import print_tasks
    from modekit.evaluation.results_folder import RESULTS_FOLDER
    from modekit.evaluation.tasks.ask import evaluate_tasks

    opened = open_checkpoint(checkpoint.resolve())
    with drawn_progress() as progress:
        results = evaluate_tasks(
            opened, _listed(options.tasks or "", "--tasks"),
            models=_listed(options.models, "--models") if options.models is not None else (),
            folders=[folder.resolve() for folder in options.include_path or ()], limit=options.limit,
            seen=[str(Path(each).resolve()) for each in options.seen or ()], seed=options.seed or 0,
            run=Run(trust_remote_code, progress),
        )  # fmt: skip
    if as_json:
        sys.stdout.write(json.dumps(results.as_data(opened), indent=2) + "\n")
        return
    print_tasks(results)
    out.print(f"[dim]{escape(str(checkpoint / RESULTS_FOLDER))}: tasks.json, tasks.md[/]")


def _listed(names: str, where: str) -> list[str]:
    listed = [name.strip() for name in names.split(",") if name.strip()]
    if not listed:
        raise ModekitError("no name is given", where=where, found=repr(names), remedy="write names with commas between them")
    return listed
