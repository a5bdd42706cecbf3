"""The command that searches for the best mixture."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from modekit.cli.options import grouped
from modekit.cli.printing.console import out
from modekit.cli.printing.mixtures import print_tune
from modekit.cli.progress import drawn_progress
from modekit.cli.shell import AsJson, RecipePath, Writing, app, resolved
from modekit.errors import check_packages
from modekit.text.amounts import SAMPLE_TOKENS


@dataclass(frozen=True)
class TuneOptions(Writing):
    """How much is searched, where, and by how many."""

    trials: Annotated[int, typer.Option(min=1, help="Number of candidates; all fixed baselines are scored in any case.")] = 48
    tokens: Annotated[int, typer.Option(min=64, help="Held-out tokens per domain, for the choice and for the report.")] = (
        SAMPLE_TOKENS
    )
    sequence_length: Annotated[int, typer.Option(min=8, help="Longest piece of a document, in tokens.")] = 512
    space: Annotated[Path | None, typer.Option(help="YAML file with the axes of the search (docs/tune.md).")] = None
    native: Annotated[bool, typer.Option("--native", help="Only mixtures that run without modekit (vLLM, llama.cpp).")] = False
    processes: Annotated[int, typer.Option(min=1, help="Number of parallel processes.")] = 1
    ray: Annotated[
        bool, typer.Option("--ray", help="Run the processes on Ray: the cluster of RAY_ADDRESS, or this machine.")
    ] = False
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the search.")] = 0
    as_json: AsJson = False


@app.command()
@grouped
def tune(
    recipe: RecipePath,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of the best mixture.")],
    options: TuneOptions,
) -> None:
    """Find the best mixture of a recipe's experts on held-out text, and build it."""
    check_packages(("optuna",), "pip install 'modekit[tune]'")
    from modekit.recipes.read import load_recipe
    from modekit.search.tune.results import TuneSettings
    from modekit.search.tune.tune import tune

    settings = TuneSettings(
        options.trials, options.tokens, options.sequence_length, options.seed, options.processes, options.ray
    )
    with drawn_progress() as progress:
        results = tune(
            load_recipe(recipe),
            resolved(recipe).parent,
            resolved(output),
            space=options.space,
            settings=settings,
            native=options.native,
            overwrite=options.overwrite,
            run=options.run(progress),
        )
    if options.as_json:
        sys.stdout.write(results.model_dump_json(indent=2) + "\n")
        return
    print_tune(results)
    said = "the best variant; its recipe.yaml, and all variants in results/tune.md"
    out.print(Text.assemble((str(output), "bold"), f": {said}"))
