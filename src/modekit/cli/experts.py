"""Commands that make experts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from pydantic import BaseModel, BeforeValidator, Field
from rich.text import Text

from modekit.cli.options import grouped, texts_by_domain
from modekit.cli.printing import out, print_done, print_json, print_notes, print_table
from modekit.cli.progress import running
from modekit.cli.shell import Writing, app, common, refuse_without_effect, writable
from modekit.cli.words import Words, settings_in
from modekit.errors import ModekitError
from modekit.evaluation.tables import ResultTable
from modekit.files.figures import bytes_of, three_digits

if TYPE_CHECKING:
    from modekit.experts.distill.settings import DistillSettings
    from modekit.experts.distill.teaching import Teaching
    from modekit.experts.specialist import BeforeAfter, SpecialistRecord
    from modekit.run import Run


def _listed(value: object) -> object:
    return value.split(",") if isinstance(value, str) else value


class SpecialistSettings(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Settings of `modekit specialize`; those of a kind of training that is not asked for have no effect and are refused."""

    rank: int | None = Field(None, ge=1, description="Rank of the adapter (--train lora; default 16).")
    steps: int | None = Field(None, ge=1, description="Optimiser steps; default: once over the text.")
    learning_rate: float | None = Field(None, gt=0, le=10, description="Peak learning rate (default 1e-4; lora 1e-3).")
    batch_tokens: int = Field(4_096, ge=2, description="Tokens per step.")
    sequence_length: int = Field(512, ge=8, description="Longest piece of a document, in tokens.")
    seed: int = Field(0, ge=0, description="Random seed of the text order.")
    losses: Annotated[list[str] | dict[str, float] | None, BeforeValidator(_listed)] = Field(
        None,
        description="--teacher: names, or names with weights: forward_kl (default), reverse_kl, teacher_ce, total_variation.",
    )
    temperature: float | None = Field(None, description="--teacher: softmax temperature of teacher and student (default 2).")
    weights: float | None = Field(None, description="--teacher: weight of the text loss, the teacher's is the rest (0.5).")
    adaptive: bool | None = Field(None, description="--teacher: a loss that rises counts less, in place of weights.")
    alternate: bool | None = Field(None, description="--teacher: steps on text and teacher in turn, not their sum.")
    mix: Literal["equal", "turns"] | None = Field(
        None, description="--teacher: equal: as much of each --text in every step; turns: one per step; default: shuffled."
    )
    randomise: float | None = Field(None, ge=0, lt=1, description="--tags: probability of a random label.")
    randomise_to: Literal["all", "others", "generic", "half"] | None = Field(
        None, description="--tags: labels to draw from: all (default; its own, too), others, generic (none), half."
    )
    generic_share: float | None = Field(None, gt=0, lt=1, description="--generic: its share of the tokens (default 0.3).")

    def check(self, **there: object) -> None:
        """Raise ModekitError for a setting that changes nothing; `there`: what its other options are."""
        for key, field in type(self).model_fields.items():
            option, colon, _ = (field.description or "").partition(":")
            if colon and option.startswith("--") and not there[option[2:]]:
                refuse_without_effect(option, {key: getattr(self, key)})
        if not self.randomise:
            refuse_without_effect("a probability above 0 (randomise)", {"randomise_to": self.randomise_to})

    def distillation(self) -> DistillSettings:
        """What the expert learns from a teacher. Raises TrainingError."""
        from modekit.experts.distill.settings import DistillSettings, losses_of
        from modekit.training.settings import checked_settings

        losses = losses_of(self.losses) if isinstance(self.losses, list) else self.losses
        said = {"losses": losses, **{key: getattr(self, key) for key in ("temperature", "weights", "adaptive", "alternate")}}
        given = {key: value for key, value in said.items() if value is not None}
        return checked_settings(given, DistillSettings, where="--teacher")


@dataclass(frozen=True)
class SpecializeOptions(Writing):
    """What an expert is trained on, and what of it moves."""

    train: Annotated[
        str,
        typer.Option(help="mlp: train the FFN alone; lora: train an adapter (OUT is a PEFT folder); full: train everything."),
    ] = "mlp"
    tags: Annotated[
        bool,
        typer.Option("--tags", help="Read each --text label=FILE with a reserved token for its label; BASE gets missing ones."),
    ] = False
    generic: Annotated[list[str] | None, typer.Option(help="Text of no domain, read without a tag; repeatable.")] = None
    teacher: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of a model to learn from; any size, BASE's tokenizer (docs/training.md)."),
    ] = None


@app.command()
@grouped
def specialize(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder or hub id of the base model.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    text: Annotated[list[str], typer.Option(help="Text of the domain, or with --tags label=FILE of several; repeatable.")],
    options: SpecializeOptions,
    words: Words = None,
) -> None:
    """Fine-tune a base model on one domain so that it mixes well; --tags: on several; --teacher: from another model."""
    from modekit.sources.folders import model_folder

    settings = settings_in(words, SpecialistSettings, "specialize")
    settings.check(teacher=options.teacher, tags=options.tags, generic=options.generic)
    if options.teacher is not None:
        refuse_without_effect(
            "a training without --teacher", {"--tags": options.tags or None, "--generic": options.generic or None}
        )
        if len(text) < 2:
            refuse_without_effect("several texts (--text A --text B)", {"mix": settings.mix})
    target = writable(output, options.overwrite, trains=True)
    with running() as run:
        from modekit.experts.labelled import SHARE, Generic, Labelled
        from modekit.experts.specialize import checked_choice, specialize
        from modekit.loaded.text_training import Training

        train, rank, rate = checked_choice(options.train, settings.rank, settings.learning_rate)
        shared = {key: getattr(settings, key) for key in ("steps", "batch_tokens", "sequence_length", "seed")}
        training = Training(learning_rate=rate, **shared)
        folder, _ = model_folder(base, root=Path.cwd(), label="BASE", run=run)
        generic = Generic(options.generic, settings.generic_share or SHARE) if options.generic else None
        labelled = (
            Labelled(_by_label(text), settings.randomise or 0.0, settings.randomise_to or "all") if options.tags else None
        )
        record = specialize(
            folder,
            target,
            labelled or text,
            root=Path.cwd(),
            train=train,
            rank=rank,
            training=training,
            generic=generic,
            teaching=_teaching(options.teacher, settings, run),
            overwrite=options.overwrite,
            run=run,
        )
    print_specialist(output, record)


def _teaching(teacher: str | None, settings: SpecialistSettings, run: Run) -> Teaching | None:
    if teacher is None:
        return None
    from modekit.experts.distill.teaching import Teaching
    from modekit.sources.folders import model_folder

    folder, _ = model_folder(teacher, root=Path.cwd(), label="--teacher", run=run)
    return Teaching(folder, settings.distillation(), settings.mix)


def print_specialist(output: Path, record: SpecialistRecord) -> None:
    """Draw what became of a base model, and of its distance to a teacher where it had one."""
    loss, kl = record.held_out_loss, record.held_out_kl
    change = "no held-out text" if loss.before is None else f"held-out loss {_change(loss)}"
    line = f"{record.specialist}, {record.training['steps']} steps, {change}"
    if kl is not None and kl.before is not None:
        line += f", KL to the teacher {_change(kl)}"
    print_done(output, line)
    if record.held_out_loss_by_label:
        each = (f"{name} {_change(losses)}" for name, losses in record.held_out_loss_by_label.items())
        out.print(Text(f"{'with their tags' if record.labels else 'each'}: {', '.join(each)}"))
    if record.teacher is not None and record.distillation_loss is not None:
        said = f"{_change(record.distillation_loss)}; mean weight of the text {record.cross_entropy_weight:.2f}"
        out.print(f"teacher {record.teacher['name']}: distillation loss {said}")


def _change(loss: BeforeAfter) -> str:
    return "no text" if loss.before is None or loss.after is None else f"{loss.before:.3f} -> {loss.after:.3f}"


def _by_label(text: list[str]) -> dict[str, list[str]]:
    from modekit.recipes.strict import NAME_RULE, is_name

    found = texts_by_domain(text)
    if wrong := [label for label in found if not is_name(label)]:
        raise ModekitError("this is no label", where="--text", found=wrong[0], expected=NAME_RULE, remedy="write law=FILE")
    return found


@dataclass(frozen=True)
class ExtractOptions(Writing):
    """How large an adapter becomes."""

    rank: Annotated[int, typer.Option(min=1, help="Rank of every module's adapter.")] = 16


@app.command()
@grouped
def extract(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id of the fine-tuned model.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    base: Annotated[str, typer.Option(help="Folder or hub id of the model it was tuned from.")],
    options: ExtractOptions,
) -> None:
    """Extract a LoRA adapter from a full fine-tune, and show what that loses."""
    from modekit.experts.extract import extract
    from modekit.sources.folders import model_folder

    target = writable(output, options.overwrite)
    with running() as run:
        tuned, _ = model_folder(model, root=Path.cwd(), label="MODEL", run=run)
        origin, _ = model_folder(base, root=Path.cwd(), label="--base", run=run)
        record = extract(tuned, origin, target, rank=options.rank, base_name=base, overwrite=options.overwrite, run=run)
    if common().json:
        print_json({**record.model_dump(mode="json"), "notes": record.notes()})
        return
    kinds = {**record.kinds, "all": record.all}
    said = "drift: |difference| / |base weight|; error: what the factors leave of the difference, 0 = nothing."
    rows = [[name, str(row.modules), str(row.rank), _share(row.drift), _share(row.error)] for name, row in kinds.items()]
    print_table(ResultTable("", ["module", "number", "rank", "drift", "error"], rows, said))
    print_notes(record.notes())
    kept = f"{record.carried:.0%} of the model's squared difference"
    print_done(output, f"{record.all.modules} modules, {bytes_of(record.bytes)}, {kept}")


def _share(value: float | None) -> str:
    return "-" if value is None else three_digits(value)
