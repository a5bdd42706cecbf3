"""What the command line draws of translations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from modekit.cli.printing.console import out
from modekit.cli.printing.mixtures import print_notes, table_of_models
from modekit.cli.printing.table import Table

if TYPE_CHECKING:
    from modekit.demo.translation import TranslatedTable
    from modekit.evaluation.translation.results import TranslationResults


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
    for metric, signature in results.signatures.items():
        out.print(Text(f"{metric}: {signature}", style="dim"))
    print_notes(results.notes)


def print_translated(found: TranslatedTable) -> None:
    """Draw BLEU and chrF of all models of a demo's seed."""
    out.print("BLEU / chrF of held-out pairs, translated greedily.")
    out.print(table_of_models(*found.table(between="\n")))
    for metric, signature in found.signatures.items():
        out.print(Text(f"{metric}: {signature}", style="dim"))
