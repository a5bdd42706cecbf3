"""`modekit eval --translate`: its options, and the call of what translates."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from modekit.cli.printing.console import out
from modekit.cli.progress import drawn_progress
from modekit.cli.shell import resolved
from modekit.run import Run

if TYPE_CHECKING:
    from modekit.evaluation.labels import Labels


@dataclass(frozen=True)
class TranslationOptions:
    """Options of `--translate`."""

    translate: Annotated[
        bool, typer.Option("--translate", help="Translate held-out sources and score them with sacrebleu.")
    ] = False
    beams: Annotated[int | None, typer.Option(min=1, help="Number of beams (with --translate; default 1, greedy).")] = None
    pairs: Annotated[
        int | None, typer.Option(min=1, help="Largest number of pairs per domain (with --translate; default 200).")
    ] = None
    batch: Annotated[int | None, typer.Option(min=1, help="Sources per batch (with --translate; default 16).")] = None
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest translation in tokens (with --translate; default 256).")
    ] = None

    def beside_translate(self) -> dict[str, object]:
        """Those that mean nothing without --translate."""
        return {
            "--beams": self.beams,
            "--pairs": self.pairs,
            "--batch": self.batch,
            "--max-new-tokens": self.max_new_tokens,
        }


def score_translations(
    checkpoint: Path, options: TranslationOptions, labels: Labels | None, run: Run, *, as_json: bool
) -> None:
    """Translate, score and draw the table."""
    from modekit.checkpoint.checkpoint import open_checkpoint
    from modekit.cli.printing.translation import print_translations
    from modekit.evaluation.results_folder import RESULTS_FOLDER
    from modekit.evaluation.translation.decoding import Decoding
    from modekit.evaluation.translation.evaluate import evaluate_translation

    decoding = Decoding(options.beams or 1, options.batch or 16, options.max_new_tokens or 256)
    with drawn_progress() as progress:
        results = evaluate_translation(
            open_checkpoint(resolved(checkpoint)),
            pairs=options.pairs or 200,
            decoding=decoding,
            labels=labels,
            run=replace(run, progress=progress),
        )
    if as_json:
        sys.stdout.write(json.dumps(results.as_data(), indent=2) + "\n")
    else:
        print_translations(results)
        out.print(Text(f"{checkpoint / RESULTS_FOLDER}: translate.json, translate.md (with examples)", style="dim"))
