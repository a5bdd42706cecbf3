"""Commands that make experts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.text import Text

from modekit.cli.labels import LabelOptions
from modekit.cli.options import grouped
from modekit.cli.printing.console import out, print_json
from modekit.cli.printing.mixtures import print_extract, print_notes, print_specialist
from modekit.cli.progress import drawn_progress
from modekit.cli.shell import Writing, app, common, refuse_without_effect, writable
from modekit.errors import ModekitError
from modekit.files.figures import bytes_of
from modekit.run import Run

if TYPE_CHECKING:
    from modekit.experts.distill.distill import Distillation
    from modekit.experts.distill.inputs import Mix
    from modekit.experts.distill.settings import DistillSettings
    from modekit.experts.moving import What
    from modekit.loaded.text_training import Training


@dataclass(frozen=True)
class TeacherOptions:
    """A teacher: what the expert learns from it besides the text."""

    teacher: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of a model to learn from; any size, BASE's tokenizer (docs/training.md)."),
    ] = None
    distill: Annotated[
        list[str] | None,
        typer.Option(help="NAME or NAME=WEIGHT; repeatable: forward_kl (default), reverse_kl, teacher_ce, total_variation."),
    ] = None
    temperature: Annotated[float | None, typer.Option(help="Softmax temperature of teacher and student (default 2).")] = None
    weights: Annotated[
        float | None, typer.Option(help="Weight of the text loss (0 to 1); the teacher loss gets the rest (default 0.5).")
    ] = None
    adaptive: Annotated[
        bool, typer.Option("--adaptive", help="Adapt the weights: a loss that rises counts less (instead of --weights).")
    ] = False
    alternate: Annotated[
        bool, typer.Option("--alternate", help="Alternate steps on text and teacher, instead of their sum.")
    ] = False
    mix: Annotated[
        str | None,
        typer.Option(
            help="How several --text share the steps (default: shuffled together). equal: as much of each in every step; "
            "turns: one text per step."
        ),
    ] = None

    def check(self) -> None:
        """Raise ModekitError for an option that changes nothing."""
        named = {f"--{name.replace('_', '-')}": value or None for name, value in vars(self).items() if name != "teacher"}
        if self.teacher is None:
            refuse_without_effect("a teacher (--teacher MODEL)", named)

    def _settings(self) -> DistillSettings:
        from modekit.experts.distill.settings import distill_settings, losses_of

        said = {
            "losses": losses_of(self.distill) if self.distill else None,
            "temperature": self.temperature,
            "weights": self.weights,
            "adaptive": self.adaptive or None,
            "alternate": self.alternate or None,
        }
        return distill_settings({name: value for name, value in said.items() if value is not None}, where="--teacher")

    def asked(self, student: Path, text: list[str], train: What, rank: int, training: Training, run: Run) -> Distillation:
        """What is asked for with a teacher. Raises TrainingError, and SourceError where there is no teacher."""
        from modekit.experts.distill.distill import Distillation
        from modekit.sources.open import model_folder

        assert self.teacher is not None
        root = Path.cwd()
        settings, mix = self._settings(), self._mix(text)
        teacher = model_folder(self.teacher, None, root=root, label="--teacher", run=run)
        return Distillation(student, teacher, text, root, train, rank, training, settings, mix)

    def _mix(self, text: list[str]) -> Mix | None:
        if self.mix is not None and self.mix not in ("equal", "turns"):
            raise ModekitError(
                "unknown choice", where="--mix", found=self.mix, expected="equal or turns", remedy="write one of them"
            )
        if self.mix is not None and len(text) < 2:
            refuse_without_effect("several texts (--text A --text B)", {"--mix": self.mix})
        return cast("Mix | None", self.mix)


@dataclass(frozen=True)
class SpecializeOptions(Writing):
    """How an expert is trained."""

    train: Annotated[
        str,
        typer.Option(help="mlp: train the FFN alone; lora: train an adapter (OUT is a PEFT folder); full: train everything."),
    ] = "mlp"
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of the adapter (--train lora; default 16).")] = None
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps; default: once over the text.")] = None
    learning_rate: Annotated[
        float | None, typer.Option(min=0, max=10, help="Peak learning rate (default 1e-4; lora 1e-3).")
    ] = None
    batch_tokens: Annotated[int, typer.Option(min=2, help="Tokens per step.")] = 4_096
    sequence_length: Annotated[int, typer.Option(min=8, help="Longest piece of a document, in tokens.")] = 512
    seed: Annotated[int, typer.Option(help="Random seed of the text order.")] = 0


@app.command()
@grouped
def specialize(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder or hub id of the base model.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    text: Annotated[list[str], typer.Option(help="Text of the domain, or with --tags label=FILE of several; repeatable.")],
    options: SpecializeOptions,
    labelled: LabelOptions,
    taught: TeacherOptions,
) -> None:
    """Fine-tune a base model on one domain so that it mixes well; --tags: on several; --teacher: from another model."""
    from modekit.sources.open import model_folder

    taught.check()
    labelled.check(taught.teacher)
    target = writable(output, options.overwrite)
    with drawn_progress() as progress:
        run = options.run(progress)
        from modekit.experts.specialize import checked_choice, specialize
        from modekit.loaded.text_training import Training

        train, rank, rate = checked_choice(options.train, options.rank, options.learning_rate)
        training = Training(
            steps=options.steps,
            learning_rate=rate,
            batch_tokens=options.batch_tokens,
            sequence_length=options.sequence_length,
            seed=options.seed,
        )
        folder = model_folder(base, None, root=Path.cwd(), label="BASE", run=run)
        if taught.teacher is not None:
            from modekit.experts.distill.distill import distill

            asked = taught.asked(folder, text, train, rank, training, run)
            record = distill(asked, target, overwrite=options.overwrite, run=run)
        else:
            record = specialize(
                folder,
                target,
                labelled.texts(text),
                root=Path.cwd(),
                train=train,
                rank=rank,
                training=training,
                generic=labelled.of_no_domain(),
                overwrite=options.overwrite,
                run=run,
            )
    print_specialist(output, record)


@dataclass(frozen=True)
class ExtractOptions(Writing):
    """How large an adapter becomes."""

    rank: Annotated[int, typer.Option(min=1, help="Rank of every module's adapter.")] = 16
    module: Annotated[list[str] | None, typer.Option(help="Only modules of this name (q_proj, mlp.down_proj).")] = None


@app.command()
@grouped
def extract(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id of the fine-tuned model.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    base: Annotated[str, typer.Option(help="Folder or hub id of the model it was tuned from.")],
    options: ExtractOptions,
) -> None:
    """Extract a LoRA adapter from a full fine-tune, and show what that loses."""
    from modekit.experts.extract import ExtractSettings, extract
    from modekit.sources.open import model_folder

    settings = ExtractSettings(options.rank, options.module, base_name=base)
    target = writable(output, options.overwrite)
    with drawn_progress() as progress:
        run = options.run(progress)
        tuned = model_folder(model, None, root=Path.cwd(), label="MODEL", run=run)
        origin = model_folder(base, None, root=Path.cwd(), label="--base", run=run)
        record = extract(tuned, origin, target, settings, overwrite=options.overwrite, run=run)
    if common().json:
        print_json({**record.model_dump(mode="json"), "notes": record.notes()})
        return
    print_extract(record)
    print_notes(record.notes())
    said = f"{record.all.modules} modules, {bytes_of(record.bytes)}, {record.carried:.0%} of the model's squared difference"
    out.print(Text.assemble((str(output), "bold"), f": {said}"))
