"""`modekit eval --tasks`: its options, and the call of what scores tasks."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from modekit.cli.printing.console import out
from modekit.cli.progress import drawn_progress
from modekit.cli.shell import resolved
from modekit.errors import ModekitError
from modekit.run import Run


@dataclass(frozen=True)
class TaskOptions:
    """Options of `--tasks`."""

    tasks: Annotated[
        str | None,
        typer.Option(
            help="Score tasks of lm-evaluation-harness, or questions from the held-out text (questions, glosses, "
            "continuations, generation), separated by commas."
        ),
    ] = None
    models: Annotated[str | None, typer.Option(help="Rows to score, such as base,medicine,mixture (with --tasks).")] = None
    include_path: Annotated[
        list[Path] | None, typer.Option(help="Folder of your own YAML tasks (with --tasks); repeatable.")
    ] = None
    limit: Annotated[int | None, typer.Option(min=1, help="Largest number of items per task (with --tasks).")] = None
    seen: Annotated[
        list[str] | None, typer.Option(help="Text that the base was trained on; its terms are not asked for (with questions).")
    ] = None
    seed: Annotated[int | None, typer.Option(help="Random seed of the questions (default 0).")] = None

    def beside_tasks(self) -> dict[str, object]:
        """Those that mean nothing without --tasks."""
        return {
            "--models": self.models,
            "--include-path": self.include_path,
            "--limit": self.limit,
            "--seen": self.seen,
            "--seed": self.seed,
        }


def score_tasks(checkpoint: Path, options: TaskOptions, *, as_json: bool, trust_remote_code: bool) -> None:
    """Run tasks named with commas between them and draw their table."""
    from modekit.checkpoint.checkpoint import open_checkpoint
    from modekit.cli.printing.tasks import print_tasks
    from modekit.evaluation.results_folder import RESULTS_FOLDER
    from modekit.evaluation.tasks.ask import evaluate_tasks

    opened = open_checkpoint(resolved(checkpoint))
    with drawn_progress() as progress:
        results = evaluate_tasks(
            opened,
            _listed(options.tasks or "", "--tasks"),
            models=_listed(options.models, "--models") if options.models is not None else (),
            folders=[resolved(folder) for folder in options.include_path or ()],
            limit=options.limit,
            seen=[str(resolved(Path(each))) for each in options.seen or ()],
            seed=options.seed or 0,
            run=Run(trust_remote_code, progress),
        )
    if as_json:
        sys.stdout.write(json.dumps(results.as_data(opened), indent=2) + "\n")
        return
    print_tasks(results)
    out.print(Text(f"{checkpoint / RESULTS_FOLDER}: tasks.json, tasks.md", style="dim"))


def _listed(names: str, where: str) -> list[str]:
    listed = [name.strip() for name in names.split(",") if name.strip()]
    if not listed:
        raise ModekitError("no name is given", where=where, found=repr(names), remedy="write names with commas between them")
    return listed
