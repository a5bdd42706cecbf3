"""`modekit mix`: from models to a mixture in one line."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from modekit.cli.export import ExportOptions, write_gguf
from modekit.cli.mixtures import show_build
from modekit.cli.options import grouped, texts_by_domain
from modekit.cli.printing.console import out
from modekit.cli.printing.mixtures import print_mix
from modekit.cli.progress import drawn_progress
from modekit.cli.serving import serve_until_stopped
from modekit.cli.shell import Fsync, Overwrite, Trust, app, writable
from modekit.engines.registry import GgufSettings, Outtype, ServeSettings
from modekit.engines.threads import ASKED
from modekit.recipes.strict import BASE
from modekit.run import Run


@dataclass(frozen=True)
class MixOptions:
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
    overwrite: Overwrite = False
    fsync: Fsync = True
    trust_remote_code: Trust = False


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
    if options.threads is not None:  # torch and llama.cpp, neither of which is running yet, read it
        os.environ[ASKED] = str(options.threads)
    from modekit.building.build import build
    from modekit.building.mix import Models, plan_mix
    from modekit.building.preview import needed_time
    from modekit.recipes.edit import RECIPE_FILE, as_file

    target, gguf = writable(options.output, options.overwrite), options.output.with_name(f"{options.output.name}.gguf")
    if options.gguf is not None:
        from modekit.engines.converter import check_installed

        check_installed()
        writable(gguf, options.overwrite)
    joining = [] if options.without_base or BASE in [each.rpartition("=")[2] for each in experts] else [BASE]
    models = Models(base, [*experts, *joining], texts_by_domain(options.text), Path.cwd())
    with drawn_progress() as progress:
        run = Run(options.trust_remote_code, progress, options.fsync)
        planned = plan_mix(models, target, "any" if options.gguf is None else "native", run=run)
    print_mix(planned, needed_time(planned.plan))
    beside = {RECIPE_FILE: as_file(planned.plan.recipe, planned.plan.root, planned.plan.root)}
    checkpoint = show_build(
        options.output,
        lambda progress: build(
            planned.plan, target, overwrite=options.overwrite, beside=beside, run=Run(progress=progress, sync=options.fsync)
        ),
    )
    if options.gguf is not None:
        said = vars(options)
        shared = {key: said[key] for key in ("overwrite", "fsync", "trust_remote_code")}
        write_gguf(checkpoint, gguf, ExportOptions(gguf=True, outtype=options.gguf, **shared))
    if options.serve:
        settings = ServeSettings(threads=options.threads, gguf=GgufSettings(options.gguf))
        serve_until_stopped(checkpoint, settings, Run(options.trust_remote_code, sync=options.fsync))
    else:
        how = f" --outtype {options.gguf}" if options.gguf is not None else ""
        out.print(f"next: modekit chat {options.output}, modekit eval {options.output}, modekit serve {options.output}{how}")
