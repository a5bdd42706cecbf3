"""The command that searches for the best mixture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from modekit.cli.options import grouped
from modekit.cli.printing.console import out, print_json
from modekit.cli.printing.mixtures import print_result
from modekit.cli.progress import running
from modekit.cli.shell import RecipePath, Writing, app, common, resolved
from modekit.cli.words import said_in
from modekit.text.amounts import SAMPLE_TOKENS


@dataclass(frozen=True)
class TuneOptions(Writing):
    """How much text variants are compared on, and where they run."""

    tokens: Annotated[int, typer.Option(min=64, help="Held-out tokens per domain.")] = SAMPLE_TOKENS
    sequence_length: Annotated[int, typer.Option(min=8, help="Longest piece of a document, in tokens.")] = 512
    ray: Annotated[bool, typer.Option("--ray", help="Run variants as Ray tasks: on RAY_ADDRESS, or this machine.")] = False


@app.command()
@grouped
def tune(
    recipe: RecipePath,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of the best mixture.")],
    options: TuneOptions,
    axes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE,VALUE]...", help="Values to try, like top_k=1,2 (default: the fixed variants)."),
    ] = None,
) -> None:
    """Find the best variant of a recipe's mixture on held-out text, and build it."""
    from modekit.recipes.read import load_recipe
    from modekit.search.tune import tune

    with running() as run:
        results = tune(
            load_recipe(recipe),
            resolved(recipe).parent,
            resolved(output),
            axes=said_in(axes, "tune", lists=True),
            tokens_per_domain=options.tokens,
            sequence_length=options.sequence_length,
            ray=options.ray,
            overwrite=options.overwrite,
            run=run,
        )
    if common().json:
        print_json(results.as_data())
        return
    print_result(results)
    said = "the best variant; its recipe.yaml, and all variants in results/tune.md"
    out.print(Text.assemble((str(output), "bold"), f": {said}"))
