"""Commands from models or a recipe to a proven checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from modekit.cli.options import grouped, texts_by_domain
from modekit.cli.printing import (
    err,
    print_done,
    print_json,
    print_next,
    print_notes,
    print_result,
    print_table,
)
from modekit.cli.progress import running
from modekit.cli.shell import NewFolder, OutFolder, Overwrite, RecipePath, Writing, app, common, resolved, writable
from modekit.cli.words import Words, said_in
from modekit.errors import ModekitError
from modekit.evaluation.tables import ResultTable
from modekit.files.figures import bytes_of, count_of, file_count
from modekit.recipes.recipe import Format
from modekit.recipes.strict import BASE
from modekit.run import Run

if TYPE_CHECKING:
    from modekit.building.preview import Preview
    from modekit.checkpoint.checkpoint import Checkpoint
    from modekit.planning.plan import Plan


_QUICK_TOKENS = 2_000  # per domain: minutes, where all that eval reads by default may take an hour


@app.command()
def plan(recipe: RecipePath) -> None:
    """Show what a build would do, from configs and headers alone."""
    from modekit.building.preview import preview_of

    with running() as run:
        found = preview_of(*_planned(recipe, run))
    if common().json:
        print_json(found.model_dump(mode="json"))
        return
    print_plan(found)
    if found.disk["needed"] > found.disk["free"]:
        err.print(Text("the disk has too little free space for this build", style="yellow"))


@app.command()
def build(
    recipe: RecipePath,
    output: NewFolder,
    overwrite: Overwrite = False,
) -> None:
    """Write the mixture: stream the experts, fit the router."""
    from modekit.building.build import build

    target = writable(output, overwrite)
    with running() as run:
        made, notes = _planned(recipe, run)
    print_notes([*made.notes, *notes], before=True)
    show_build(output, lambda run: build(made, target, overwrite=overwrite, run=run))


def _planned(recipe: Path, run: Run) -> tuple[Plan, list[str]]:
    """The plan of a recipe's file, and what to say of its texts."""
    from modekit.planning.make import make_plan
    from modekit.recipes.read import load_recipe
    from modekit.text.held_out import check_texts

    wanted, root = load_recipe(recipe), resolved(recipe).parent
    notes = check_texts(wanted, root)
    return make_plan(wanted, root, run=run), notes


def show_build(output: Path, write: Callable[[Run], Checkpoint]) -> None:
    """Write a mixture, with its progress drawn, and say what it has become and what comes next."""
    from modekit.sources.config import architecture_of
    from modekit.sources.tokenizer import has_tokenizer
    from modekit.text.written import little_written

    with running() as run:
        checkpoint = write(run)
    size, said = sum(file.stat().st_size for file in output.rglob("*") if file.is_file()), architecture_of(checkpoint.config)
    print_done(output, f"{said}, {len(checkpoint.names)} experts, {_routing_of(checkpoint)}, {bytes_of(size)}")
    print_notes([*checkpoint.notes, *little_written(checkpoint.record.recipe, checkpoint.recipe_root)])
    commands = ("eval-translation",) if checkpoint.shape.family.pair else ("chat", "serve")
    if has_tokenizer(output):
        print_next(output, f"eval OUT --tokens {_QUICK_TOKENS}", *(f"{each} OUT" for each in commands))


def _routing_of(checkpoint: Checkpoint) -> str:
    router, recipe = checkpoint.record.router, checkpoint.record.recipe
    name = "zero gate" if router.settings is None else router.settings.fit
    return f"router {name}, {router.status}, method {recipe.mixture.method}, {recipe.chosen}"


@app.command()
def fit(checkpoint: OutFolder, words: Words = None) -> None:
    """Set the router anew, from kept statistics where they suffice; the experts are not touched."""
    from modekit.checkpoint.open import open_with_any_router
    from modekit.recipes.edit import changes_of
    from modekit.routing.fit import refit

    with running() as run:
        done = refit(open_with_any_router(resolved(checkpoint)), changes_of(said_in(words, "fit")), run=run)
    print_done(checkpoint, _routing_of(done))


@app.command()
def verify(
    checkpoint: OutFolder,
    reload: Annotated[bool, typer.Option(help="Also load it in plain transformers.")] = True,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also run every expert beside its own model: what is lost of it, in nats.")
    ] = False,
) -> None:
    """Compare every tensor of a checkpoint with its source; exit code 1 if a check fails."""
    from modekit.building.verify import is_proven, verify
    from modekit.checkpoint.open import open_with_any_router

    with running() as run:
        opened = open_with_any_router(resolved(checkpoint))
        checks, forced = verify(opened, run=run, reload=reload), None
        if deep:
            from modekit.evaluation.forced import force_experts

            forced = force_experts(opened, run=run)
    if common().json:
        said = [vars(check) for check in checks]
        print_json(said if forced is None else {"checks": said, "forced": forced.as_data()})
    else:
        rows = [[check.name, check.verdict, check.detail] for check in checks]
        print_table(ResultTable("", ["check", "verdict", "detail"], rows, prose=True))
        if forced is not None:
            print_result(forced)
    if not is_proven(checks):
        raise typer.Exit(1)


@dataclass(frozen=True)
class MixOptions(Writing):
    """What is mixed, and where it goes."""

    output: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="The folder to write.")]
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="Text of an expert's domain; repeatable. Experts without text write some."),
    ] = None
    without_base: Annotated[bool, typer.Option("--without-base", help="Leave the base out of the experts.")] = False
    format: Annotated[
        Format,
        typer.Option(
            help="plain: runs without modekit, as in llama.cpp; modekit: its own; auto: plain if it keeps the experts."
        ),
    ] = "auto"


@app.command()
@grouped
def mix(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder or hub id of the model that all experts descend from.")],
    experts: Annotated[
        list[str],
        typer.Argument(metavar="EXPERT", help="Folder or hub id of a model or adapter; NAME=PATH gives it another name."),
    ],
    options: MixOptions,
) -> None:
    """Mix models into one: choose the form and the router, and write the mixture and its recipe."""
    if not all(experts):
        raise ModekitError("an expert without a path", where="EXPERT", found="''", remedy="name a folder or hub id")
    from modekit.building.build import build
    from modekit.building.mix import Models, plan_mix
    from modekit.building.preview import preview_of

    target = writable(options.output, options.overwrite)
    joining = [] if options.without_base or BASE in [each.rpartition("=")[2] for each in experts] else [BASE]
    models = Models(base, [*experts, *joining], texts_by_domain(options.text), Path.cwd())
    with running() as run:
        made, notes = plan_mix(models, target, form=options.format, run=run)
    print_plan(preview_of(made, notes))
    show_build(options.output, lambda run: build(made, target, overwrite=options.overwrite, run=run))


def print_plan(plan: Preview) -> None:
    """Draw what a build would do."""
    parameters, sizes, memory, disk = plan.parameters, plan.bytes, plan.memory, plan.disk
    also = "" if plan.also_runs_in.startswith("transformers") else "also "
    weights, kept, needed = map(bytes_of, (sizes["written"], sizes["statistics"], disk["needed"]))
    rows = [
        ("architecture", f"{plan.architecture} ({also}runs in {plan.also_runs_in})"),
        ("why", plan.why),
        ("experts", ", ".join(f"{name} ({model})" for name, model in plan.experts.items())),
        ("mixing", f"{plan.method}, {plan.chosen}, backbone {plan.backbone}"),
        ("router", plan.router_why or plan.router),
        ("parameters", f"{count_of(parameters['total'])} total, {count_of(parameters['active'])} active per token"),
        ("tensors", f"{plan.tensors} in {file_count(plan.shards)}, {plan.dtype}"),
        ("disk", f"{needed} needed ({weights} of weights, {kept} to fit the router again), {bytes_of(disk['free'])} free"),
        ("memory", ", ".join(f"{bytes_of(memory[step])} to {step}" for step in ("build", "fit", "load"))),
        *(("note", note) for note in plan.notes),
    ]
    print_table(ResultTable("", ["", ""], rows, prose=True))
