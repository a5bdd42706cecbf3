"""The demo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from modekit.cli.options import grouped
from modekit.cli.printing.console import out
from modekit.cli.printing.mixtures import print_result, print_summary
from modekit.cli.progress import drawn_progress
from modekit.cli.shell import app, resolved
from modekit.errors import ModekitError
from modekit.run import Run

if TYPE_CHECKING:
    from modekit.demo.kinds import What


@dataclass(frozen=True)
class DemoKind:
    """What the demo's experts are, and how much work it does."""

    full: Annotated[bool, typer.Option("--full", help="Ordinary full fine-tunes as experts, several backbones.")] = False
    adapters: Annotated[
        bool, typer.Option("--adapters", help="LoRA adapters as experts, kept low-rank and folded into a native checkpoint.")
    ] = False
    translation: Annotated[
        bool,
        typer.Option("--translation", help="Models that translate messages of programs, mixed; scored by loss, BLEU and chrF."),
    ] = False
    real: Annotated[bool, typer.Option("--real", help="Start from SmolLM2-135M (within an hour).")] = False
    quick: Annotated[bool, typer.Option("--quick", help="A smoke run in minutes: figures mean nothing.")] = False

    def what(self) -> What:
        """The kind. Raises ModekitError for two at once, and for another base where the demo trains its own."""
        kinds: dict[str, What] = {"full": "full", "adapters": "lora", "translation": "translation"}
        asked = [name for name in kinds if getattr(self, name)]
        if len(asked) > 1:
            raise ModekitError(
                "the experts are of one kind",
                where=", ".join(f"--{name}" for name in asked),
                remedy="give one of these options",
            )
        if self.real and self.translation:
            raise ModekitError(
                "the base that translates is trained by the demo itself",
                where="--translation, --real",
                remedy="give one of the two",
            )
        return kinds[asked[0]] if asked else "mlp"


@app.command()
@grouped
def demo(
    kind: DemoKind,
    output: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of the demo; what is there is kept and used. Default: demo, demo-full, ..."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds to run, from 0.")] = 1,
) -> None:
    """Train a base and four experts on real text, mix them in several ways and show what each is worth."""
    from modekit.demo.demo import folder_of, run_demo

    what, real, quick = kind.what(), kind.real, kind.quick
    output = output or folder_of(what, real=real, quick=quick)
    with drawn_progress() as progress:
        results = run_demo(resolved(output), seeds=range(seeds), what=what, real=real, quick=quick, run=Run(progress=progress))
    for seed in results.per_seed:
        out.print(Text(f"seed {seed}", style="bold"))
        print_result(results.merged(seed))
        if seed in results.translated:
            print_result(results.translated[seed])
    if seeds > 1:
        print_summary(results.summary())
    said = f"{results.seconds / 60:.1f} minutes; models, recipes, checkpoints and results are in {output}"
    out.print(Text(said, style="dim"))
