"""Commands that change who is in a mixture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from modekit.cli.options import grouped
from modekit.cli.printing import out, print_done, print_notes, print_table
from modekit.cli.progress import running
from modekit.cli.shell import OutFolder, Writing, app, checkpoint_in, resolved, writable
from modekit.cli.words import Words, said_in
from modekit.errors import ModekitError
from modekit.evaluation.tables import ResultTable
from modekit.files.figures import bytes_of, three_digits
from modekit.text.amounts import SAMPLE_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable

    from modekit.checkpoint.checkpoint import Checkpoint
    from modekit.members.admission import Admission
    from modekit.members.edits import MixtureEdit, NewExpert

Name = Annotated[str, typer.Argument(metavar="NAME", help="The expert's name.")]


@dataclass(frozen=True)
class ModelOptions:
    """The model or adapter that comes, and its text."""

    model: Annotated[str | None, typer.Option(help="Folder or hub id of a full model, or the word base.")] = None
    adapter: Annotated[str | None, typer.Option(help="Folder or hub id of a PEFT adapter.")] = None
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text of its domain; repeatable. self: the expert writes some (default if other experts did)."),
    ] = None

    def new(self, words: list[str] | None, command: str) -> NewExpert:
        """As the change takes it, with what the words say of the expert. Raises ModekitError."""
        from modekit.members.edits import NewExpert

        said = said_in(words, command, besides=["weight"] if command == "add" else [])
        weight = said.pop("weight", None)
        given = {key: value for key, value in vars(self).items() if value is not None}
        return NewExpert({**given, **said}, Path.cwd(), weight)


@dataclass(frozen=True)
class AdmissionOptions:
    """What is measured before an expert is added."""

    measure: Annotated[bool, typer.Option(help="Measure first what the expert adds, and which expert it resembles.")] = True
    tokens: Annotated[int, typer.Option(min=64, help="Held-out tokens of its text to measure on (select split).")] = (
        SAMPLE_TOKENS
    )
    force: Annotated[bool, typer.Option("--force", help="Use the expert whatever the measurement shows.")] = False


@dataclass(frozen=True)
class WriteOptions(Writing):
    """Where the new mixture goes, and how."""

    output: Annotated[
        Path | None, typer.Option("--out", metavar="NEW", help="Folder for the new mixture (default: OUT itself).")
    ] = None
    refit: Annotated[bool, typer.Option("--refit", help="Fit a trained router again.")] = False


@app.command()
@grouped
def add(
    checkpoint: OutFolder,
    name: Annotated[str, typer.Option(help="Name of the new expert and of its domain.")],
    model: ModelOptions,
    admission: AdmissionOptions,
    write: WriteOptions,
    words: Words = None,
) -> None:
    """Add an expert; the models and texts of the others are not needed. weight=N where the recipe has mixture.weights."""
    from modekit.members.edits import add_expert

    _change(checkpoint, lambda opened: add_expert(opened, name, model.new(words, "add")), write, admission)


@app.command()
@grouped
def replace(
    checkpoint: OutFolder,
    name: Name,
    model: ModelOptions,
    admission: AdmissionOptions,
    write: WriteOptions,
    words: Words = None,
) -> None:
    """Replace the model of an expert."""
    from modekit.members.edits import replace_expert

    _change(checkpoint, lambda opened: replace_expert(opened, name, model.new(words, "replace")), write, admission)


@app.command()
@grouped
def remove(checkpoint: OutFolder, name: Name, write: WriteOptions) -> None:
    """Remove an expert; the result is what a build without it gives."""
    from modekit.members.edits import remove_expert

    _change(checkpoint, lambda opened: remove_expert(opened, name), write)


def _change(
    folder: Path,
    edit: Callable[[Checkpoint], MixtureEdit],
    write: WriteOptions,
    admission: AdmissionOptions | None = None,
) -> None:
    """Plan the change, measure the new expert, write the mixture."""
    from modekit.building.build import build
    from modekit.members.change import before_change
    from modekit.planning.room import bytes_linked

    target = resolved(write.output or folder)
    opened = checkpoint_in(folder)
    if target != opened.folder:
        writable(target, write.overwrite)
    with running() as run:
        before = before_change(opened, edit(opened), refits=write.refit, run=run)
        found = None
        if admission is not None and admission.measure:
            from modekit.members.admission import measure_admission  # torch, which a change itself may not need

            found = measure_admission(before, tokens=admission.tokens, run=run)
    pairs = zip(before.plan.recipe.names, before.origins, strict=True)
    new = [name for name, origin in pairs if origin is None]
    print_notes((note for note in before.plan.notes if any(name in note for name in new)), before=True)
    if found is not None and admission is not None:
        print_admission(found)
        if found.refused and not admission.force:
            raise ModekitError(
                "the expert is not added",
                where=str(folder),
                remedy="do what the message above suggests, or pass --force",
            )
    with running() as run:
        done = build(before.plan, target, overwrite=write.overwrite, update=before, run=run)
    print_notes(done.notes)
    written = before.plan.bytes_written - bytes_linked(before.plan)
    said = f"{len(done.names)} experts ({', '.join(done.names)}), router {done.record.router.status}"
    print_done(write.output or folder, f"{said}; {bytes_of(written)} of weights written")


def print_admission(admission: Admission) -> None:
    """Draw what was measured of an expert before it is added, and what was found, the gravest first."""
    name, base = admission.expert, admission.losses.get("base", 0.0)
    if admission.losses:
        said = f"Held-out loss in nats per token on {admission.tokens:,} tokens of {name}'s text (select split)."
        rows = [
            [name if row == "expert" else row, f"{loss:.3f}", f"{base - loss:+.3f}"] for row, loss in admission.losses.items()
        ]
        print_table(ResultTable("", ["model", "loss", "gain over base"], rows, said))
    if admission.nearest is not None:
        other, cosine, distance = admission.nearest
        near = f"the nearest expert is {other}: cosine {cosine:.2f}, distance {three_digits(distance)}"
        out.print(f"{name} moved {three_digits(admission.drift)} of the base's size; {near}.")
    for finding in sorted(admission.findings, key=lambda finding: [*_COLOURS].index(finding.level)):
        found = f": {finding.found}" if finding.found else ""
        todo = f"; to do: {finding.to_do}" if finding.to_do else ""
        out.print(Text.assemble((f"{finding.level}:", _COLOURS[finding.level]), f" {finding.what}{found}{todo}"))


_COLOURS = {"error": "red", "warning": "yellow", "note": "dim"}
