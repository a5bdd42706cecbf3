"""What the command line draws of tasks, chats and translations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from modekit.cli.printing.console import out
from modekit.cli.printing.mixtures import print_notes, table_of_models
from modekit.cli.printing.table import Cell, Table

if TYPE_CHECKING:
    from modekit.demo.translation import TranslatedTable
    from modekit.evaluation.chat import ChatResults
    from modekit.evaluation.tasks.results import TaskResults
    from modekit.evaluation.translation.results import TranslationResults


def print_tasks(results: TaskResults) -> None:
    """Draw means, then a table per domain, then tasks by name: a row per model."""
    out.print(f"Scores of each model, 95 % interval {'after /' if out.soft_wrap else 'below'}.")
    for title, header, body in results.tables(between="\n"):
        out.print(Text(title, style="bold"))
        out.print(table_of_models(header, body))
    print_notes(results.notes)


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


def print_translations(results: TranslationResults) -> None:
    """Draw a row per model: BLEU and chrF, speed and parameters; then how often the mixture is better than the base."""
    table = table_of_models(*results.table(between="\n"))
    out.print(results.said())
    out.print(table)
    if results.differences:
        out.print("Pairs on which the mixture's sentence chrF is higher than the base's, lower, and the same.")
        counts = Table("", ["higher", "lower", "same"])
        for domain, counted in results.differences.items():
            counts.add(domain, str(counted.better), str(counted.worse), str(counted.same))
        out.print(counts)
    for metric, signature in vars(results.signatures).items():
        out.print(Text(f"{metric}: {signature}", style="dim"))
    print_notes(results.notes)


def print_translated(found: TranslatedTable) -> None:
    """Draw BLEU and chrF of all models of a demo's seed."""
    out.print("BLEU / chrF of held-out pairs, translated greedily.")
    out.print(table_of_models(*found.table(between="\n")))
    for metric, signature in vars(found.signatures).items():
        out.print(Text(f"{metric}: {signature}", style="dim"))
