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
    from modekit.experts.corpus.fertility import Trained


def print_balanced(balanced: Balanced, folder: Path) -> None:
    """Draw what was kept and dropped."""
    from modekit.experts.corpus.balanced import notes_of, table_of

    header, rows = table_of(balanced)
    table = Table(" ".join(header[:2]), header[2:])
    for split, name, *cells in rows:
        table.add(f"{split} {name}", *cells)
    out.print(table)
    print_notes(notes_of(balanced))
    found = ", ".join(f"{split} {balanced.diff_percent(split):.2f} %" for split in balanced.splits)
    said = f": {len(balanced.domains)} domains, at most {balanced.settings.max_diff_percent:g} % apart: {found}"
    out.print(Text.assemble((str(folder), "bold"), said))


def print_tokenizer(trained: Trained, folder: Path) -> None:
    """Draw fertility per domain."""
    compared = trained.against is not None
    table = Table(
        "domain", ["documents", "kB", "tokens per word", "per 1,000 bytes", *(["against", "change"] if compared else [])]
    )
    for each in trained.domains:
        cells = [f"{each.documents:,}", f"{each.text_bytes / 1000:,.1f}", f"{each.per_word:.2f}", f"{each.per_1000_bytes:.1f}"]
        if compared:
            other, change = each.against_per_1000_bytes, each.change
            cells += ["-" if other is None else f"{other:.1f}", "-" if change is None else f"{change:+.1%}"]
        table.add(each.name, *cells)
    against = f", against {trained.against}" if compared else ""
    out.print(Text(f"Tokens of documents held out of the training{against}."))
    out.print(table)
    print_notes(trained.notes)
    out.print(Text.assemble((str(folder), "bold"), f": a tokenizer of {trained.vocabulary:,} tokens"))
