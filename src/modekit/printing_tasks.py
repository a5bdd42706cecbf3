"""What the command line draws of tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from modekit.printing import out

if TYPE_CHECKING:
    from modekit.tasks.results import TaskResults, TaskScores

_COLUMNS = 5  # side by side: more would not fit a terminal


def print_tasks(results: TaskResults) -> None:
    """Draw every task, the means, and the mixture's differences of the means."""
    out.print("Scores, 95 % intervals below (bootstrap over documents, or items).")
    _print_blocks(results.models, results.tasks, "task")
    if results.macro:
        out.print("Means over the domains that have an expert, or over tasks of one metric.")
        _print_blocks(results.models, results.macro, "mean")
        if any(scores.differences for scores in results.macro.values()):
            out.print("Mixture minus each other model, paired over items.")
            _print_blocks(results.models, results.macro, "mean", differences=True)
    for note in results.notes:
        out.print(f"[yellow]note:[/] {escape(note)}")


def _print_blocks(models: Sequence[str], columns: Mapping[str, TaskScores], what: str, *, differences: bool = False) -> None:
    from modekit.tasks.results import table_of

    names = list(columns)
    for start in range(0, len(names), _COLUMNS):
        part = {name: columns[name] for name in names[start : start + _COLUMNS]}
        header, body = table_of(models, part, differences=differences, between="\n")
        table = Table(box=None, pad_edge=False, header_style="bold")
        for place, title in enumerate(header):
            shown = what if place == 0 else title.removeprefix("modekit_").replace("_", "\n", 1)
            table.add_column(escape(shown), justify="left" if place == 0 else "right", no_wrap=True)
        for cells in body:
            style = {"mixture": "bold green", "chance": "dim"}.get(cells[0])
            table.add_row(*map(escape, cells), style=style)
        out.print(table)
        out.print()
