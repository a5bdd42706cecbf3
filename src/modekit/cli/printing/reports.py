"""What the command line draws of a mixture that goes to others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from modekit.cli.printing.console import out
from modekit.cli.printing.mixtures import print_notes
from modekit.cli.printing.table import Table
from modekit.files.figures import bytes_of

if TYPE_CHECKING:
    from modekit.report.push import Parcel


def print_parcel(parcel: Parcel, repo: str) -> None:
    """Draw what goes to a repository and what stays."""
    sizes = parcel.sizes()
    table = Table(f"to {repo}", ["bytes", "how"])
    for name, size in sizes.items():
        table.add(name, bytes_of(size), "made for it" if isinstance(parcel.files[name], bytes) else "as it is")
    out.print(table)
    print_notes(parcel.notes)
    if parcel.left:
        left = ", ".join(f"{name} ({bytes_of(size)})" for name, size in parcel.left.items())
        out.print(Text(f"stays here: {left}"))
    going, staying = bytes_of(sum(sizes.values())), bytes_of(sum(parcel.left.values()))
    out.print(Text.assemble((going, "bold"), f" in {len(sizes)} files go, {staying} stay"))
