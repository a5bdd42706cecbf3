"""Commands that change who is in a mixture."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from modekit.cli.options import grouped
from modekit.cli.printing.console import out
from modekit.cli.printing.members import print_door, print_members
from modekit.cli.printing.mixtures import print_notes
from modekit.cli.progress import drawn_progress
from modekit.cli.shell import AsJson, Fsync, OutFolder, Overwrite, Trust, app, resolved
from modekit.errors import ModekitError
from modekit.files.figures import bytes_of
from modekit.run import Run
from modekit.text.amounts import SAMPLE_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable

    from modekit.checkpoint.checkpoint import Checkpoint
    from modekit.members.wanted import NewExpert, Wanted

Name = Annotated[str, typer.Argument(metavar="NAME", help="The expert's name.")]


@dataclass(frozen=True)
class ModelOptions:
    """The model or adapter that comes, and its text."""

    model: Annotated[str | None, typer.Option(help="Folder or hub id of a full model, or the word base.")] = None
    adapter: Annotated[str | None, typer.Option(help="Folder or hub id of a PEFT adapter.")] = None
    text: Annotated[list[str] | None, typer.Option(help="Text of its domain; repeatable.")] = None
    as_: Annotated[str | None, typer.Option("--as", help="lora: keep only a low-rank part of a full model.")] = None
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of that part (default 16).")] = None
    revision: Annotated[str | None, typer.Option(help="Hub revision.")] = None
    label: Annotated[
        list[str] | None,
        typer.Option(help="Another name under which texts of its domain are known; repeatable."),
    ] = None

    def new(self, weight: float | None = None) -> NewExpert:
        """As the change takes it. Raises ModekitError."""
        from modekit.members.wanted import NewExpert

        if (self.model is None) == (self.adapter is None):
            raise ModekitError(
                "give either --model or --adapter", where="--model, --adapter", remedy="name the new expert's folder or hub id"
            )
        said = {
            "model": self.model,
            "adapter": self.adapter,
            "text": self.text,
            "as": self.as_,
            "rank": self.rank,
            "revision": self.revision,
            "labels": self.label,
        }
        return NewExpert({key: value for key, value in said.items() if value is not None}, Path.cwd(), weight)


@dataclass(frozen=True)
class DoorOptions:
    """What is measured before an expert is let in."""

    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure first what the expert adds, and which expert it resembles.")
    ] = True
    tokens: Annotated[int, typer.Option(min=64, help="Held-out tokens of its text to measure on (select split).")] = (
        SAMPLE_TOKENS
    )
    force: Annotated[bool, typer.Option("--force", help="Add the expert whatever was measured.")] = False


@dataclass(frozen=True)
class WriteOptions:
    """Where the new mixture goes, and how."""

    output: Annotated[
        Path | None, typer.Option("--out", metavar="NEW", help="Folder for the new mixture (default: OUT itself).")
    ] = None
    refit: Annotated[bool, typer.Option("--refit", help="Fit a trained router again.")] = False
    overwrite: Overwrite = False
    fsync: Fsync = True
    trust_remote_code: Trust = False


@app.command()
@grouped
def add(
    checkpoint: OutFolder,
    name: Annotated[str, typer.Option(help="Name of the new expert and of its domain.")],
    model: ModelOptions,
    door: DoorOptions,
    write: WriteOptions,
    weight: Annotated[float | None, typer.Option(help="Weight of the expert in a linear mixture with given weights.")] = None,
) -> None:
    """Let one more expert in; the others' models and texts are not needed."""
    from modekit.members.wanted import adding

    asked = f"add {name} {model} {weight}"
    _change(checkpoint, asked, lambda opened: adding(opened, name, model.new(weight)), write, door)


@app.command()
@grouped
def replace(checkpoint: OutFolder, name: Name, model: ModelOptions, door: DoorOptions, write: WriteOptions) -> None:
    """Put another model in the place of an expert."""
    from modekit.members.wanted import replacing

    _change(checkpoint, f"replace {name} {model}", lambda opened: replacing(opened, name, model.new()), write, door)


@app.command()
@grouped
def remove(checkpoint: OutFolder, name: Name, write: WriteOptions) -> None:
    """Take an expert out: what is left is what a build without it gives."""
    from modekit.members.wanted import removing

    _change(checkpoint, f"remove {name}", lambda opened: removing(opened, name), write)


@app.command()
@grouped
def rename(
    checkpoint: OutFolder,
    name: Name,
    new_name: Annotated[str, typer.Argument(metavar="NEW_NAME", help="The new name.")],
    write: WriteOptions,
) -> None:
    """Give an expert and its domain another name."""
    from modekit.members.wanted import renaming

    _change(checkpoint, f"rename {name} {new_name}", lambda opened: renaming(opened, name, new_name), write)


@app.command()
def experts(checkpoint: OutFolder, as_json: AsJson = False) -> None:
    """Show who is in the mixture: since when, worth what, under which licence."""
    from modekit.checkpoint.checkpoint import open_checkpoint
    from modekit.members.listing import as_data, members_of

    opened = open_checkpoint(resolved(checkpoint))
    members = members_of(opened)
    if as_json:
        sys.stdout.write(json.dumps(as_data(opened, members), indent=2) + "\n")
    else:
        print_members(members, opened.record.history)


def _change(
    folder: Path, asked: str, wanted: Callable[[Checkpoint], Wanted], write: WriteOptions, door: DoorOptions | None = None
) -> None:
    """Plan the change, look at who comes, write it and say what it cost. `asked`: what of the command makes it another."""
    from modekit.building.build import build
    from modekit.checkpoint.checkpoint import open_checkpoint
    from modekit.files.output import check_not_made_by
    from modekit.members.change import before_change

    target = resolved(write.output or folder)
    check_not_made_by(target, asked)
    opened = open_checkpoint(resolved(folder))
    with drawn_progress() as progress:
        run = Run(write.trust_remote_code, progress, write.fsync)
        planned = before_change(opened, dataclasses.replace(wanted(opened), refits=write.refit), run=run)
        before = dataclasses.replace(planned, made_by=asked)
        found = None
        if door is not None and door.measure:
            from modekit.members.door import look_at  # torch, which a change itself may not need

            found = look_at(before, tokens=door.tokens, run=run)
    if found is not None and door is not None:
        print_door(found)
        before = before.measured(found.numbers())
        if found.refused and not door.force:
            raise ModekitError(
                "the expert is not let in",
                where=str(folder),
                found="; ".join(each.what for each in found.refused),
                remedy="do what is said above, or pass --force",
            )
    with drawn_progress() as progress:
        run = Run(write.trust_remote_code, progress, write.fsync)
        done = build(before.plan, target, overwrite=write.overwrite, update=before, run=run)
    written = before.plan.bytes_written - before.plan.bytes_linked
    said = f"{len(done.names)} experts ({', '.join(done.names)}), router {done.record.router.status}"
    out.print(Text.assemble((str(write.output or folder), "bold"), f": {said}; {bytes_of(written)} of weights written"))
    old = [name for name in ("results", "README.md", "LICENSE.md") if target == opened.folder and (target / name).exists()]
    if old:
        print_notes([f"{', '.join(old)}: of the mixture before; modekit eval, report and card make them anew"])
