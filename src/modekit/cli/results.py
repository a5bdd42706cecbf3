"""Commands that score."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from modekit.cli.chat import ChatOptions, score_chat
from modekit.cli.options import grouped
from modekit.cli.printing.console import out
from modekit.cli.printing.mixtures import print_results, print_summary
from modekit.cli.printing.translation import print_translated
from modekit.cli.progress import LIBRARIES, drawn_progress
from modekit.cli.shell import AsJson, OutFolder, Trust, app, refuse_without_effect, resolved
from modekit.cli.tasks import TaskOptions, score_tasks
from modekit.cli.told import ToldOptions
from modekit.cli.translate import TranslationOptions, score_translations
from modekit.errors import ModekitError
from modekit.run import Run
from modekit.text.amounts import TABLE_TOKENS

if TYPE_CHECKING:
    from modekit.demo.kinds import What


@dataclass(frozen=True)
class HeldOutOptions(ToldOptions):
    """How much held-out text is scored, and which labels of it are told."""

    tokens: Annotated[int | None, typer.Option(min=64, help=f"Held-out tokens per domain (default {TABLE_TOKENS:,}).")] = None
    sequence_length: Annotated[
        int | None, typer.Option(min=8, help="Longest piece of a document, in tokens (default 512).")
    ] = None

    def of_text(self) -> dict[str, object]:
        """Those that mean nothing without text."""
        return {"--tokens": self.tokens, "--sequence-length": self.sequence_length}

    def of_scores(self) -> dict[str, object]:
        """Those that mean nothing where no text is scored."""
        return {**self.of_text(), **self.of_labels()}


@dataclass(frozen=True)
class WritingOptions(TranslationOptions, ChatOptions):
    """What models write: answers in chats, translations."""


@app.command(name="eval")
@grouped
def evaluate(
    checkpoint: OutFolder,
    held_out: HeldOutOptions,
    of_tasks: TaskOptions,
    written: WritingOptions,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Score base, experts, weight average, oracle and mixture on held-out text, on --tasks, or what they --translate; or, with
    --chat, who leads.
    """
    if written.translate:
        others = {**held_out.of_text(), "--tasks": of_tasks.tasks, **of_tasks.beside_tasks(), "--chat": written.chat or None}
        refuse_without_effect("--translate scores translations", {**others, **written.beside_chat()})
        score_translations(checkpoint, written, held_out.asked(), Run(trust_remote_code), as_json=as_json)
        return
    refuse_without_effect("it belongs to --translate", written.beside_translate())
    if written.chat:
        refuse_without_effect(
            "--chat asks questions", {**held_out.of_scores(), "--tasks": of_tasks.tasks, **of_tasks.beside_tasks()}
        )
        score_chat(checkpoint, written, as_json=as_json, trust_remote_code=trust_remote_code)
        return
    refuse_without_effect("it belongs to --chat", written.beside_chat())
    if of_tasks.tasks is not None:
        refuse_without_effect("--tasks scores no text", held_out.of_scores())
        score_tasks(checkpoint, of_tasks, as_json=as_json, trust_remote_code=trust_remote_code)
        return
    refuse_without_effect("it belongs to --tasks", of_tasks.beside_tasks())
    from modekit.checkpoint.checkpoint import open_checkpoint

    with drawn_progress() as progress:
        progress(LIBRARIES, 0, 1)
        from modekit.evaluation.evaluate import evaluate
        from modekit.evaluation.results_folder import RESULTS_FOLDER

        results = evaluate(
            open_checkpoint(resolved(checkpoint)),
            tokens_per_domain=held_out.tokens or TABLE_TOKENS,
            sequence_length=held_out.sequence_length or 512,
            labels=held_out.asked(),
            run=Run(trust_remote_code, progress),
        )
    if as_json:
        sys.stdout.write(json.dumps(results.as_data(), indent=2) + "\n")
    else:
        print_results(results)
        out.print(Text(f"{checkpoint / RESULTS_FOLDER}: eval.json, eval.md", style="dim"))


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
        kinds: dict[str, What] = {
            "full": "full",
            "adapters": "lora",
            "translation": "translation",
        }
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
        print_results(results.merged(seed))
        if seed in results.translated:
            print_translated(results.translated[seed])
    if seeds > 1:
        print_summary(results.summary())
    said = f"{results.seconds / 60:.1f} minutes; models, recipes, checkpoints and results are in {output}"
    out.print(Text(said, style="dim"))
