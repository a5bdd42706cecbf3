"""What `modekit data` draws: what was kept of every domain, and how many tokens a tokenizer makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from modekit.cli.printing.console import out
from modekit.cli.printing.mixtures import print_notes
from modekit.cli.printing.table import Table

if TYPE_CHECKING:
    from modekit.experts.corpus.balanced import Balanced
    from modekit.experts.corpus.tokenizer import TrainedTokenizer


def print_balanced(balanced: Balanced, folder: Path) -> None:
    """Draw what was kept and dropped."""
    header, rows = balanced.table()
    table = Table(" ".join(header[:2]), header[2:])
    for split, name, *cells in rows:
        table.add(f"{split} {name}", *cells)
    out.print(table)
    print_notes(balanced.notes())
    said = (
        f": {len(balanced.domains)} domains, at most {balanced.settings.max_diff_percent:g} % apart: {balanced.differences()}"
    )
    out.print(Text.assemble((str(folder), "bold"), said))


def print_tokenizer(trained: TrainedTokenizer, folder: Path) -> None:
    """Draw fertility per domain."""
    compared = trained.against is not None
    table = Table(
        "domain", ["documents", "kB", "tokens per word", "per 1,000 bytes", *(["against", "change"] if compared else [])]
    )
    for each in trained.domains:
        cells = [f"{each.documents:,}", f"{each.bytes / 1000:,.1f}", f"{each.per_word:.2f}", f"{each.per_1000_bytes:.1f}"]
        if compared:
            other, change = each.against_per_1000_bytes, each.change
            cells += ["-" if other is None else f"{other:.1f}", "-" if change is None else f"{change:+.1%}"]
        table.add(each.name, *cells)
    against = f", against {trained.against}" if compared else ""
    out.print(Text(f"Tokens of documents held out of the training{against}."))
    out.print(table)
    print_notes(trained.notes)
    out.print(Text.assemble((str(folder), "bold"), f": a tokenizer of {trained.vocabulary:,} tokens"))
