"""The command that trains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modekit.cli.options import DomainTexts, texts_by_domain
from modekit.cli.printing import print_done, print_json, print_notes, print_result, print_table
from modekit.cli.progress import running
from modekit.cli.shell import OutFolder, app, checkpoint_in, common, resolved
from modekit.cli.words import Words, said_in
from modekit.evaluation.tables import ResultTable
from modekit.files.figures import count_of
from modekit.text.amounts import SAMPLE_TOKENS

if TYPE_CHECKING:
    from modekit.recipes.strict import RecipeData
    from modekit.training.train import TrainedMixture


@app.command()
def train(
    checkpoint: OutFolder,
    words: Words = None,
    settings: Annotated[
        Path | None, typer.Option(help="YAML with settings by name (docs/training.md); those of the command line win.")
    ] = None,
    text: DomainTexts = None,
    output: Annotated[Path | None, typer.Option("--out", help="Folder for the trained mixture (default: OUT itself).")] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=0, help="Held-out tokens per domain for the tables before and after (default 8192); 0: none."),
    ] = None,
) -> None:
    """Improve a mixture by gradient; by default train only its routers. Works under torchrun and accelerate launch."""
    from modekit.training.settings import given_settings

    wanted, opened = given_settings(train_words(words), settings), checkpoint_in(checkpoint)
    with running() as run:
        from modekit.training.train import train

        done = train(
            opened,
            wanted,
            texts=texts_by_domain(text),
            root=Path.cwd(),
            out=resolved(output) if output is not None else None,
            evaluate_tokens=(SAMPLE_TOKENS if tokens is None else tokens) or None,
            run=run,
        )
    if common().json:
        print_json({"improved": done.improved, **done.record.model_dump(mode="json")})
    else:
        print_training(output if output is not None and done.improved else checkpoint, done)
    if done.failed is not None:
        raise done.failed


def train_words(words: list[str] | None) -> RecipeData:
    """The settings of a training; lists may be said with commas alone. Raises ModekitError."""
    said = said_in(words, "train")
    return said | {key: said[key].split(",") for key in ("what", "generic") if isinstance(said.get(key), str)}


def print_training(folder: Path, training: TrainedMixture) -> None:
    """Draw what a training came to."""
    record = training.record
    if training.results is not None:
        print_result(training.results)
    said = "Held-out loss by which states were compared (select split)."
    rows = [[name, f"{loss['before']:.4f}", f"{loss['after']:.4f}"] for name, loss in record.select_loss.items()]
    print_table(ResultTable("", ["domain", "before", "after"], rows, said))
    print_notes(record.notes)
    moved = f"{count_of(record.parameters)} parameters, {record.steps} steps, {record.tokens:,} tokens"
    print_done(folder, f"{'trained' if training.improved else 'left as it was'}; {moved}")
