"""Commands that score."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from modekit.cli.shell import AsJson, OutFolder, Trust, app, drawn_progress
from modekit.errors import ModekitError
from modekit.printing import (
    out,
    print_results,
    print_summary,
)


@app.command(name="eval")
def evaluate(
    checkpoint: OutFolder,
    tokens: Annotated[int, typer.Option(min=64, help="Held-out tokens per domain.")] = 20_000,
    sequence_length: Annotated[int, typer.Option(min=8, help="Longest piece of a document, in tokens.")] = 512,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Score base, experts, weight average, oracle and mixture on held-out text."""
    from modekit.checkpoint import open_checkpoint
    from modekit.evaluate import RESULTS_FOLDER
    from modekit.evaluate import evaluate as run

    with drawn_progress() as progress:
        results = run(
            open_checkpoint(checkpoint.resolve()), tokens_per_domain=tokens, sequence_length=sequence_length,
            trust_remote_code=trust_remote_code, progress=progress,
        )  # fmt: skip
    if as_json:
        sys.stdout.write(json.dumps(results.as_data(), indent=2) + "\n")
    else:
        print_results(results)
        out.print(f"[dim]{escape(str(checkpoint / RESULTS_FOLDER))}: eval.json, eval.md[/]")


@app.command()
def demo(
    output: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of the demo; what is there is kept and used. Default: demo, demo-full, ..."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds to run, from 0.")] = 1,
    full: Annotated[bool, typer.Option("--full", help="Ordinary full fine-tunes as experts, several backbones.")] = False,
    adapters: Annotated[
        bool, typer.Option("--adapters", help="LoRA adapters as experts, kept low-rank and folded into a native checkpoint.")
    ] = False,
    real: Annotated[bool, typer.Option("--real", help="Start from SmolLM2-135M (within an hour).")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A smoke test: the same steps, too short to be good.")] = False,
) -> None:
    """Train a base and four experts on real text, mix them in several ways and show what each is worth."""
    from modekit.demo.run import run_demo

    if full and adapters:
        raise ModekitError("the experts are either full models or adapters", where="--full, --adapters", remedy="give one")
    options = (("full", full), ("adapters", adapters), ("real", real), ("quick", quick))
    kinds = [name for name, chosen in options if chosen]
    output = output or Path("-".join(["demo", *kinds]))
    what: Any = "full" if full else "lora" if adapters else "mlp"
    with drawn_progress() as progress:
        results = run_demo(output.resolve(), seeds=range(seeds), what=what, real=real, quick=quick, progress=progress)
    for seed in results.per_seed:
        out.print(f"[bold]seed {seed}[/]")
        print_results(results.merged(seed))
    if seeds > 1:
        print_summary(results.summary())
    out.print(
        f"[dim]{results.seconds / 60:.1f} minutes; models, recipes, checkpoints and results are in {escape(str(output))}[/]"
    )
