"""The demo."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated, Literal

import typer
from rich.text import Text

from modekit.cli.printing import out, print_next, print_result
from modekit.cli.progress import running
from modekit.cli.shell import app, resolved


@app.command()
def demo(
    what: Annotated[
        Literal["mlp", "full", "lora", "translation"],
        typer.Argument(
            metavar="EXPERTS",
            help="mlp: FFNs trained alone; full: full fine-tunes, several backbones; lora: adapters, kept low-rank and folded "
            "into a plain checkpoint; translation: models that translate, scored by loss, BLEU and chrF.",
        ),
    ] = "mlp",
    quick: Annotated[bool, typer.Option("--quick", help="A smoke run in minutes: figures mean nothing.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of the demo; what is there is kept and used. Default: demo, demo-full, ..."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds to run, from 0.")] = 1,
) -> None:
    """Train a base and four experts on real text, mix them in several ways and show what each is worth."""
    with running() as run:
        from modekit.demo.demo import folder_of, folder_of_mixture, run_demo
        from modekit.demo.kinds import AS_MIXED, Kind

        output = output or folder_of(what, quick=quick)
        results = run_demo(resolved(output), seeds=range(seeds), what=what, quick=quick, run=run)
    for seed in results.per_seed:
        out.print(Text(f"seed {seed}", style="bold"))
        print_result(results.merged(seed))
        if seed in results.translated:
            print_result(results.translated[seed])
    said = f"{results.seconds / 60:.1f} minutes; models, recipes, checkpoints and results/demo.md are in {output}"
    out.print(Text(said, style="dim"))
    kind, folder = Kind(what, quick), output / "seed0"
    chosen = AS_MIXED.get(what)
    if chosen is not None:
        out.print(f"{chosen} is what `modekit mix` makes of these models without the base")
    shown = folder_of_mixture(folder, chosen or next(iter(kind.mixtures)))
    print_next(shown, "report OUT", *([] if kind.translates else ["chat OUT"]))
    texts = ["--text " + quote(f"{name}={output / 'text' / name}.jsonl") for name in kind.domains]
    models = " ".join(quote(str(folder / name)) for name in ("base", *kind.domains))
    print_next(output / "mixed", f"mix {models} --without-base {' '.join(texts)} -o OUT")
