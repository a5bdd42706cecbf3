"""Commands from models or a recipe to a proven checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from modekit.cli.export import ExportOptions, write_gguf
from modekit.cli.options import grouped, texts_by_domain
from modekit.cli.printing.console import out, print_json
from modekit.cli.printing.mixtures import (
    print_checks,
    print_mix,
    print_next,
    print_notes,
    print_plan,
    print_result,
)
from modekit.cli.progress import running
from modekit.cli.serving import serve_until_stopped
from modekit.cli.shell import OutFolder, Overwrite, RecipePath, Writing, app, common, resolved, writable
from modekit.cli.words import Words, said_in
from modekit.engines.registry import Outtype, ServeSettings
from modekit.engines.threads import ASKED
from modekit.errors import ModekitError
from modekit.files.figures import bytes_of
from modekit.recipes.strict import BASE
from modekit.run import Run

if TYPE_CHECKING:
    from modekit.checkpoint.checkpoint import Checkpoint
    from modekit.evaluation.forced import ForcedExperts
    from modekit.recipes.strict import RecipeData


_QUICK_TOKENS = 2_000  # per domain: minutes, where all that eval reads by default may take an hour


@app.command()
def plan(recipe: RecipePath) -> None:
    """Show what a build would do, from configs and headers alone."""
    from modekit.building.preview import preview

    with running() as run:
        found = preview(recipe, run=run)
    if common().json:
        print_json(found.model_dump(mode="json"))
    else:
        print_plan(found)


@app.command()
def build(
    recipe: RecipePath,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    overwrite: Overwrite = False,
    prove: Annotated[
        bool, typer.Option("--prove", help="Then compare every expert with its own model, as verify --deep does.")
    ] = False,
) -> None:
    """Write the mixture: stream the experts, fit the router."""
    from modekit.building.build import build
    from modekit.planning.make import make_plan
    from modekit.recipes.read import load_recipe
    from modekit.text.glance import check_texts

    wanted, target = load_recipe(recipe), writable(output, overwrite)
    with running() as run:
        made = make_plan(wanted, resolved(recipe).parent, run=run)
    print_notes(check_texts(made.recipe, made.root, made.family.reads))
    checkpoint = show_build(output, lambda run: build(made, target, overwrite=overwrite, run=run))
    if prove:
        print_result(_forced(checkpoint))
    print_next(f"modekit eval {output} --tokens {_QUICK_TOKENS}", f"modekit chat {output}", f"modekit serve {output}")


def show_build(output: Path, write: Callable[[Run], Checkpoint]) -> Checkpoint:
    """Write a mixture, with its progress drawn, and say what it has become."""
    from modekit.checkpoint.checkpoint import size_of
    from modekit.checkpoint.record import STATISTICS_FOLDER
    from modekit.recipes.auto import why_chosen
    from modekit.sources.config import architecture_of

    new = [str(parent) for parent in reversed(output.parents) if not parent.exists()]
    with running() as run:
        checkpoint = write(run)
    size, kept, record = size_of(output), size_of(output / STATISTICS_FOLDER), checkpoint.record
    said = f"{architecture_of(checkpoint.config)}, {len(checkpoint.names)} experts, top_k {record.recipe.top_k}"
    out.print(Text.assemble((str(output), "bold"), f": {said}, router {record.router.status}, {bytes_of(size)}"))
    if why := why_chosen(record.recipe, native=checkpoint.shape.plain):
        out.print(Text(f"router: {why}", style="dim"))
    if new:
        out.print(Text(f"made the folder{'s' if len(new) > 1 else ''} {', '.join(new)}", style="dim"))
    if kept:
        said = f"{output / STATISTICS_FOLDER}: {bytes_of(kept)} of statistics, which may be deleted: only "
        out.print(Text(f"{said}`modekit fit` reads them, and can make them again from the text", style="dim"))
    return checkpoint


def _forced(checkpoint: Checkpoint) -> ForcedExperts:
    """Every expert beside its own model."""
    from modekit.evaluation.forced import force_experts

    with running() as run:
        return force_experts(checkpoint, run=run)


@app.command()
def fit(checkpoint: OutFolder, words: Words = None) -> None:
    """Set the router anew, from kept statistics where they suffice; the experts are not touched."""
    from modekit.checkpoint.checkpoint import open_with_any_router
    from modekit.routing.refit import refit

    with running() as run:
        done = refit(open_with_any_router(resolved(checkpoint)), fit_words(words), run=run)
    settings = done.record.router.settings
    name = settings.fit if settings is not None else "zero gate"
    said = f"method {done.record.recipe.mixture.method}, top_k {done.record.recipe.top_k}"
    out.print(Text.assemble((str(checkpoint), "bold"), f": router {name}, {done.record.router.status}, {said}"))


def fit_words(words: list[str] | None) -> RecipeData:
    """What becomes of the mixture, as its recipe would say it. Raises ModekitError."""
    from modekit.recipes.router import Router

    said = said_in(words, "fit")
    router = {key: value for key, value in said.items() if key in Router.model_fields}
    return {**{key: value for key, value in said.items() if key not in router}, "router": router}


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
    from modekit.checkpoint.checkpoint import open_with_any_router

    opened = open_with_any_router(resolved(checkpoint))
    with running() as run:
        checks = verify(opened, run=run, reload=reload)
    if not common().json:
        print_checks(checks)
    forced = _forced(opened) if deep else None
    if common().json:
        said = [vars(check) for check in checks]
        shown = said if forced is None else {"checks": said, "forced": forced.as_data()}
        print_json(shown)
    elif forced is not None:
        print_result(forced)
    if not is_proven(checks):
        raise typer.Exit(1)


@dataclass(frozen=True)
class MixOptions(Writing):
    """What is mixed, and what is done with it."""

    output: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="The folder to write.")]
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="Text of an expert's domain; repeatable. Experts without text write some."),
    ] = None
    without_base: Annotated[bool, typer.Option("--without-base", help="Leave the base out of the experts.")] = False
    gguf: Annotated[
        Outtype | None, typer.Option(help="Then write OUT.gguf/ for llama.cpp with weights of this type, and compare it.")
    ] = None
    serve: Annotated[bool, typer.Option("--serve", help="Then serve it with OpenAI's API, as modekit serve does.")] = False
    threads: Annotated[
        int | None, typer.Option(min=1, max=1_024, help="CPU threads (default: OMP_NUM_THREADS, or as many as are useful).")
    ] = None


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
    if options.threads is not None:  # torch and llama.cpp, neither of which is running yet, read it
        os.environ[ASKED] = str(options.threads)
    from modekit.building.build import build
    from modekit.building.mix import Models, plan_mix
    from modekit.engines.converter import check_installed, check_tokenizer, is_installed
    from modekit.recipes.edit import RECIPE_FILE, as_file

    target, gguf = writable(options.output, options.overwrite), options.output.with_name(f"{options.output.name}.gguf")
    if options.gguf is not None:
        check_installed()
        writable(gguf, options.overwrite)
    joining = [] if options.without_base or BASE in [each.rpartition("=")[2] for each in experts] else [BASE]
    models = Models(base, [*experts, *joining], texts_by_domain(options.text), Path.cwd())
    with running() as run:
        planned = plan_mix(models, target, "any" if options.gguf is None else "native", run=run)
        if options.gguf is not None or (options.serve and is_installed() and planned.plan.shape.without_gguf is None):
            run.begin("try the tokenizer in llama.cpp")
            check_tokenizer(planned.plan.sources[0].folder)
    print_mix(planned)
    beside = {RECIPE_FILE: as_file(planned.plan.recipe, planned.plan.root, planned.plan.root)}
    checkpoint = show_build(
        options.output,
        lambda run: build(planned.plan, target, overwrite=options.overwrite, beside=beside, run=run),
    )
    if options.gguf is not None:
        write_gguf(checkpoint, gguf, ExportOptions(gguf=True, outtype=options.gguf, overwrite=options.overwrite))
    if options.serve:
        settings = ServeSettings(threads=options.threads, outtype=options.gguf)
        serve_until_stopped(checkpoint, settings)
    else:
        how = f" --outtype {options.gguf}" if options.gguf is not None else ""
        print_next(
            f"modekit chat {options.output}",
            f"modekit eval {options.output} --tokens {_QUICK_TOKENS}",
            f"modekit serve {options.output}{how}",
        )
