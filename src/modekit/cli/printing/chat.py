"""What the command line draws of conversations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modekit.cli.printing.console import out
from modekit.cli.printing.mixtures import print_notes
from modekit.cli.printing.table import Cell, Table

if TYPE_CHECKING:
    from modekit.evaluation.chat import ChatResults


def print_chat(results: ChatResults) -> None:
    """Draw a row per kind of question: the share on which the right expert leads, and how often each one does."""
    from modekit.evaluation.chat import share

    out.print(
        f"Share of questions on which their own expert leads, at the last prompt token and after {results.answer_tokens} "
        "tokens of answer; then how often each expert leads at the last prompt token."
    )
    table = Table("", ["questions", "prompt", "answer", *results.experts])
    for row in results.rows:
        counts = [Cell(str(row.leaders.get(name, 0)), own=name == row.expert) for name in results.experts]
        table.add(row.name, Cell(str(row.questions), "dim"), share(row.at_prompt), share(row.after_answer), *counts)
    out.print(table)
    print_notes(results.notes)
