"""Commands that score: `eval` losses, `eval-tasks` tasks, `eval-translation` translations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.text import Text

from modekit.cli.options import grouped, texts_by_domain
from modekit.cli.printing import out, print_json, print_next, print_result
from modekit.cli.progress import running
from modekit.cli.shell import OutFolder, app, checkpoint_in, common, resolved
from modekit.text.amounts import TABLE_TOKENS
from modekit.text.documents import find_text

if TYPE_CHECKING:
    from modekit.evaluation.results_folder import Result


LabelOption = Annotated[
    Literal["gate", "tag"] | None,
    typer.Option(help="Also score with right and wrong labels, by gate (all weight on their expert) or tag (before the text)."),
]


@dataclass(frozen=True)
class ScoredOptions:
    """Which text is scored, and how much of it."""

    text: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="Score this text of a domain instead of the recipe's; repeatable."),
    ] = None
    tokens: Annotated[int, typer.Option(min=64, help="Held-out tokens per domain.")] = TABLE_TOKENS
    sequence_length: Annotated[int, typer.Option(min=8, help="Longest piece of a document, in tokens.")] = 512


@dataclass(frozen=True)
class TaskOptions:
    """Which models answer which questions."""

    models: Annotated[str | None, typer.Option(help="Models to score, such as base,medicine,mixture (default: all).")] = None
    include_path: Annotated[
        list[Path] | None, typer.Option(exists=True, file_okay=False, help="Folder of your own YAML tasks; repeatable.")
    ] = None
    trust_tasks: Annotated[
        bool, typer.Option("--trust-tasks", help="Allow task files that may run code (with --include-path).")
    ] = False
    limit: Annotated[int | None, typer.Option(min=1, help="Largest number of items per task.")] = None


@dataclass(frozen=True)
class DecodingOptions:
    """How translations are written, and of how many pairs."""

    beams: Annotated[int, typer.Option(min=1, help="Number of beams (1: greedy).")] = 1
    pairs: Annotated[int, typer.Option(min=1, help="Largest number of pairs per domain.")] = 200
    batch: Annotated[int, typer.Option(min=1, help="Sources per batch.")] = 16
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest translation in tokens.")] = 256


@app.command(name="eval")
@grouped
def evaluate(checkpoint: OutFolder, scored: ScoredOptions, labels: LabelOption = None) -> None:
    """Score base, experts, weight average, oracle and mixture by their loss on held-out text."""
    given = texts_by_domain(scored.text)
    for name, specs in given.items():
        find_text(specs, root=Path.cwd(), where=f"--text {name}")
    opened = checkpoint_in(checkpoint)
    with running() as run:
        from modekit.evaluation.domains import scored_on
        from modekit.evaluation.evaluate import evaluate

        results = evaluate(
            scored_on(opened, given, Path.cwd()),
            tokens_per_domain=scored.tokens,
            sequence_length=scored.sequence_length,
            labels=labels,
            run=run,
        )
    show_results(results, checkpoint)
    if not common().json:
        print_next(checkpoint, "inspect OUT", "report OUT")


@app.command()
@grouped
def eval_tasks(
    checkpoint: OutFolder,
    tasks: Annotated[
        str,
        typer.Argument(
            metavar="TASKS",
            help="Tasks of lm-evaluation-harness, or questions from the held-out text (questions, glosses, "
            "continuations), separated by commas.",
        ),
    ],
    options: TaskOptions,
) -> None:
    """Score base, experts and mixture on tasks, or on questions made from the held-out text."""
    opened = checkpoint_in(checkpoint)
    with running() as run:
        from modekit.evaluation.tasks.evaluate import TaskSettings, evaluate_tasks

        settings = TaskSettings(
            models=() if options.models is None else _listed(options.models),
            folders=[resolved(folder) for folder in options.include_path or ()],
            trusted=options.trust_tasks,
            limit=options.limit,
        )
        results = evaluate_tasks(opened, _listed(tasks), settings, run)
    show_results(results, checkpoint)


@app.command()
@grouped
def eval_translation(checkpoint: OutFolder, options: DecodingOptions, labels: LabelOption = None) -> None:
    """Translate held-out sources with base, experts and mixture, and score them with sacrebleu."""
    opened = checkpoint_in(checkpoint)
    with running() as run:
        from modekit.evaluation.translation.evaluate import evaluate_translation
        from modekit.evaluation.translation.results import Decoding

        results = evaluate_translation(
            opened,
            pairs=options.pairs,
            decoding=Decoding(options.beams, options.batch, options.max_new_tokens),
            labels=labels,
            run=run,
        )
    show_results(results, checkpoint)


def show_results(results: Result, checkpoint: Path) -> None:
    """As tables and where its files lie, or as JSON."""
    from modekit.evaluation.results_folder import RESULTS_FOLDER

    if common().json:
        print_json(results.as_data())
        return
    print_result(results)
    page = Path(results.file).with_suffix(".md").name
    out.print(Text(f"{checkpoint / RESULTS_FOLDER}: {results.file}, {page}", style="dim"))


def _listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]
