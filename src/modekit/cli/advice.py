"""The command that looks before anything is built."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from modekit.cli.printing.advice import print_advice
from modekit.cli.printing.console import out
from modekit.cli.progress import drawn_progress
from modekit.cli.shell import AsJson, RecipePath, Trust, app
from modekit.run import Run
from modekit.text.amounts import SAMPLE_TOKENS


@app.command()
def advise(
    recipe: RecipePath,
    tokens: Annotated[
        int, typer.Option(min=64, help="Held-out tokens per domain to measure on (select split).")
    ] = SAMPLE_TOKENS,
    native: Annotated[bool, typer.Option("--native", help="Advise only mixtures that run without modekit.")] = False,
    write: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File for the advised recipe, with reasons as comments.")
    ] = None,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Recommend a recipe: measure what each expert changed and what of it helps, and list what is wrong.

    The recipe's `mixture` is ignored. Exit code 1 if nothing is left to mix.
    """
    from modekit.search.advise.advise import advise
    from modekit.search.advise.recipe import check_target, write_advised

    if write is not None:
        check_target(write)
    with drawn_progress() as progress:
        advice = advise(recipe, tokens=tokens, native=native, run=Run(trust_remote_code, progress))
    if as_json:
        sys.stdout.write(advice.model_dump_json(indent=2) + "\n")
    else:
        print_advice(advice)
    if advice.recipe is None:
        raise typer.Exit(1)
    if write is not None:
        write_advised(write, advice, recipe.resolve().parent)
        if not as_json:
            out.print(Text.assemble((str(write), "bold"), f": modekit build {write} OUT"), soft_wrap=True)
