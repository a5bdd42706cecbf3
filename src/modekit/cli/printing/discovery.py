"""What `modekit discover` prints: the groups, the numbers that were tried, and what to do next."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from modekit.cli.printing.console import out
from modekit.cli.printing.mixtures import print_notes
from modekit.cli.printing.table import Cell, Table

if TYPE_CHECKING:
    from modekit.search.discover.result import Discovery, DocumentGroup


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
