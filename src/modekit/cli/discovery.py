"""Commands that search: for domains in text that nobody has labelled, and for the best mixture."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from modekit.cli.options import grouped
from modekit.cli.printing.console import out
from modekit.cli.printing.mixtures import print_notes, print_tune
from modekit.cli.printing.table import Cell, Table
from modekit.cli.progress import drawn_progress
from modekit.cli.shell import AsJson, RecipePath, Writing, app, checkpoint_in, refuse_without_effect, resolved
from modekit.errors import check_packages
from modekit.files.output import replaced_by
from modekit.search.discover.result import MOST_DOMAINS, DiscoverSettings
from modekit.text.amounts import SAMPLE_TOKENS

if TYPE_CHECKING:
    from modekit.search.discover.result import Discovery, DocumentGroup


@dataclass(frozen=True)
class DiscoverOptions(Writing):
    """Options of `modekit discover`."""

    domains: Annotated[
        int | None,
        typer.Option(min=2, max=MOST_DOMAINS, help="Number of domains (default: chosen by held-out likelihood)."),
    ] = None
    sample: Annotated[int, typer.Option(min=2, help="Largest number of documents to learn the groups from.")] = 8_192
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the grouping.")] = 0
    mixture: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Mixture to compare with: which groups its router sends to an expert.")
    ] = None
    as_json: AsJson = False


@app.command()
@grouped
def discover(
    text: Annotated[list[str], typer.Option(help="Unlabelled text: file, folder or hub data set; repeatable.")],
    options: DiscoverOptions,
    output: Annotated[
        Path | None, typer.Argument(metavar="[FOLDER]", help="Folder to write a .jsonl per domain to (default: write nothing).")
    ] = None,
) -> None:
    """Group unlabelled documents into domains, name each by its words, and show which ones a mixture already serves."""
    check_packages(("sklearn", "scipy", "threadpoolctl"), "pip install 'modekit[discover]'")
    from modekit.search.discover.discover import Unlabelled, discover

    if output is None:
        refuse_without_effect("a FOLDER to write to", {"--overwrite": options.overwrite or None})
    mixture = None if options.mixture is None else checkpoint_in(options.mixture)
    with drawn_progress() as progress:
        discovery = discover(
            Unlabelled(text, Path.cwd(), mixture),
            DiscoverSettings(domains=options.domains, sample=options.sample, seed=options.seed),
            out=None if output is None else resolved(output),
            replace=replaced_by(options.overwrite),
            run=options.run(progress),
        )
    if options.as_json:
        sys.stdout.write(discovery.model_dump_json(indent=2) + "\n")
    else:
        print_discovery(discovery, output)


def print_discovery(discovery: Discovery, folder: Path | None) -> None:
    """Print what was found; `folder` is where it was written, None when it was not."""
    if discovery.tried:
        _print_tried(discovery)
        out.print()
    _print_groups(discovery)
    print_notes(discovery.notes)
    for group in discovery.groups:
        if group.name == discovery.next:
            said = f" {group.name}, of which no expert serves about {group.unserved:,.0f} documents"
            out.print(Text.assemble(("the next expert:", "bold"), said))
    if folder is not None:
        said = f"{discovery.domains} domain{'' if discovery.domains == 1 else 's'} as text, and discover.json"
        out.print(Text.assemble((str(folder), "bold"), f": {said}"), soft_wrap=True)


def _print_tried(discovery: Discovery) -> None:
    table = Table("domains", ["held-out likelihood", "gain"])
    for tried in discovery.tried:
        held_out = Cell(f"{tried.held_out:.3f}", own=tried.domains == discovery.domains)
        table.add(str(tried.domains), held_out, "" if tried.gain is None else f"{tried.gain:+.3f}")
    worth = f"a domain more must gain {discovery.worth}"
    out.print(f"How many domains: held-out log-likelihood, nats per word; {worth}.")
    out.print(table)


def _print_groups(discovery: Discovery) -> None:
    served = discovery.mixture is not None
    table = Table("domain", ["documents", "share", *(["served", "led by"] if served else []), "words"], prose=True)
    total = sum(group.documents for group in discovery.groups)
    for group in discovery.groups:
        cells = [f"{group.documents:,}", f"{group.documents / total:.0%}", *(_served(group) if served else [])]
        table.add(group.name, *cells, ", ".join(group.words))
    about = ": served is the share that an expert other than the base leads on with certainty, led by who leads at all"
    out.print(f"{total:,} documents{about if served else ''}.")
    out.print(table)


def _served(group: DocumentGroup) -> list[str]:
    if group.served is None or not group.served.documents:
        return ["-", "-"]
    expert, share = next(iter(group.served.experts.items()))
    return [f"{group.served.served:.0%}", f"{expert} {share:.0%}"]


@dataclass(frozen=True)
class TuneOptions(Writing):
    """How much is searched, where, and by how many."""

    trials: Annotated[int, typer.Option(min=1, help="Number of candidates; all fixed baselines are scored in any case.")] = 48
    tokens: Annotated[int, typer.Option(min=64, help="Held-out tokens per domain, for the choice and for the report.")] = (
        SAMPLE_TOKENS
    )
    sequence_length: Annotated[int, typer.Option(min=8, help="Longest piece of a document, in tokens.")] = 512
    space: Annotated[Path | None, typer.Option(help="YAML file with the axes of the search (docs/tune.md).")] = None
    native: Annotated[bool, typer.Option("--native", help="Only mixtures that run without modekit (vLLM, llama.cpp).")] = False
    processes: Annotated[int, typer.Option(min=1, help="Number of parallel processes.")] = 1
    ray: Annotated[
        bool, typer.Option("--ray", help="Run the processes on Ray: the cluster of RAY_ADDRESS, or this machine.")
    ] = False
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the search.")] = 0
    as_json: AsJson = False


@app.command()
@grouped
def tune(
    recipe: RecipePath,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of the best mixture.")],
    options: TuneOptions,
) -> None:
    """Find the best mixture of a recipe's experts on held-out text, and build it."""
    check_packages(("optuna",), "pip install 'modekit[tune]'")
    from modekit.recipes.read import load_recipe
    from modekit.search.tune.results import TuneSettings
    from modekit.search.tune.tune import tune

    settings = TuneSettings(
        options.trials, options.tokens, options.sequence_length, options.seed, options.processes, options.ray
    )
    with drawn_progress() as progress:
        results = tune(
            load_recipe(recipe),
            resolved(recipe).parent,
            resolved(output),
            space=options.space,
            settings=settings,
            native=options.native,
            overwrite=options.overwrite,
            run=options.run(progress),
        )
    if options.as_json:
        sys.stdout.write(results.model_dump_json(indent=2) + "\n")
        return
    print_tune(results)
    said = "the best variant; its recipe.yaml, and all variants in results/tune.md"
    out.print(Text.assemble((str(output), "bold"), f": {said}"))
