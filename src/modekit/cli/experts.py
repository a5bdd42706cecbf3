"""Commands that make experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.text import Text

from modekit.cli.options import grouped, texts_by_domain
from modekit.cli.printing import out, print_done, print_json, print_notes, print_table
from modekit.cli.progress import running
from modekit.cli.shell import NewFolder, Writing, app, common, model_in, refuse_without_effect, writable
from modekit.cli.words import Words, settings_in
from modekit.errors import ModekitError
from modekit.evaluation.tables import ResultTable
from modekit.files.figures import bytes_of, or_dash
from modekit.text.documents import find_text

if TYPE_CHECKING:
    from modekit.experts.distill import Teaching
    from modekit.experts.settings import SpecialistSettings
    from modekit.experts.specialist import BeforeAfter, SpecialistRecord
    from modekit.run import Run


def _check(settings: SpecialistSettings, there: Mapping[str, object]) -> None:
    """Raise ModekitError for a setting that changes nothing; `there`: options, and whether they are given."""
    given = {key: getattr(settings, key) for key in type(settings).model_fields if key in settings.model_fields_set}
    for key, value in given.items():
        option, _, _ = str(type(settings).model_fields[key].description).partition(":")
        if not there.get(option, True):
            refuse_without_effect(option, {key: value})
    if not settings.randomise:
        refuse_without_effect("a probability above 0 (randomise)", {"randomise_to": given.get("randomise_to")})


@dataclass(frozen=True)
class SpecializeOptions(Writing):
    """What an expert is trained on, and what of it moves."""

    train: Annotated[
        Literal["mlp", "lora", "full"],
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
    output: NewFolder,
    text: Annotated[list[str], typer.Option(help="Text of the domain, or with --tags label=FILE of several; repeatable.")],
    options: SpecializeOptions,
    words: Words = None,
) -> None:
    """Fine-tune a base model on one domain so that it mixes well; --tags: on several; --teacher: from another model."""
    from modekit.experts.settings import SpecialistSettings

    settings, lora = settings_in(words, SpecialistSettings, "specialize"), options.train == "lora"
    there = {"--train lora": lora, "--teacher": options.teacher, "--tags": options.tags, "--generic": options.generic}
    _check(settings, there)
    if options.teacher is not None:
        refuse_without_effect(
            "a training without --teacher", {"--tags": options.tags or None, "--generic": options.generic or None}
        )
        if len(text) < 2:
            refuse_without_effect("several texts (--text A --text B)", {"mix": settings.mix})
    target = writable(output, options.overwrite, trains=True)
    for each in text:
        find_text([(options.tags and each.partition("=")[2]) or each], root=Path.cwd(), where="--text")
    with running() as run:
        folder, commit = model_in(base, "BASE", run)
        from modekit.experts.labelled import Generic, Labelled
        from modekit.experts.specialize import specialize
        from modekit.loaded.text_training import Training

        shared = {key: getattr(settings, key) for key in ("steps", "batch_tokens", "sequence_length", "seed")}
        training = Training(learning_rate=settings.learning_rate or (1e-3 if lora else 1e-4), **shared)
        generic = Generic(options.generic, settings.generic_share) if options.generic else None
        labelled = Labelled(_by_label(text), settings.randomise, settings.randomise_to) if options.tags else None
        record = specialize(
            folder,
            target,
            labelled or text,
            root=Path.cwd(),
            train=options.train,
            rank=settings.rank,
            hub=None if commit is None else (base, commit),
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
    from modekit.experts.distill import Teaching

    folder, _ = model_in(teacher, "--teacher", run)
    return Teaching(folder, settings, settings.mix)


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
        out.print(f"teacher {record.teacher['name']}: distillation loss {_change(record.distillation_loss)}")


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
    output: NewFolder,
    base: Annotated[str, typer.Option(help="Folder or hub id of the model it was tuned from.")],
    options: ExtractOptions,
) -> None:
    """Extract a LoRA adapter from a full fine-tune, and show what that loses."""
    from modekit.experts.extract import extract

    target = writable(output, options.overwrite)
    with running() as run:
        tuned, _ = model_in(model, "MODEL", run)
        origin, _ = model_in(base, "--base", run)
        record = extract(tuned, origin, target, rank=options.rank, base_name=base, overwrite=options.overwrite, run=run)
    if common().json:
        print_json({**record.model_dump(mode="json"), "notes": record.notes()})
        return
    kinds = {**record.kinds, "all": record.all}
    said = "drift: |difference| / |base weight|; error: what the factors leave of the difference, 0 = nothing."
    rows = [[name, str(row.modules), str(row.rank), or_dash(row.drift), or_dash(row.error)] for name, row in kinds.items()]
    print_table(ResultTable("", ["module", "number", "rank", "drift", "error"], rows, said))
    print_notes(record.notes())
    kept = f"{record.carried:.0%} of the model's squared difference"
    print_done(output, f"{record.all.modules} modules, {bytes_of(record.bytes)}, {kept}")
