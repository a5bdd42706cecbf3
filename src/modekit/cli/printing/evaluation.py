"""What the command line draws of tasks, chats and translations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from modekit.cli.printing.console import out
from modekit.cli.printing.mixtures import print_notes, table_of_models
from modekit.cli.printing.table import Cell, Table

if TYPE_CHECKING:
    from modekit.demo.translation import TranslatedTable
    from modekit.evaluation.chat import ChatResults
    from modekit.evaluation.tasks.intervals import Estimate
    from modekit.evaluation.tasks.results import TaskResults, TaskScores
    from modekit.evaluation.translation.results import TranslationResults


def print_tasks(results: TaskResults) -> None:
    """Draw a table per kind of question, a column per model; then one of the tasks asked for by name."""
    place = "after /" if out.soft_wrap else "below"
    out.print(f"Scores of each model, 95 % interval {place}; mixture -: the mixture's mean minus the model's, paired.")
    kinds: dict[str, dict[str, TaskScores]] = {}
    for name, scores in results.tasks.items():
        if scores.domain is not None:
            kind = name.removeprefix(f"modekit_{scores.domain}_")
            kinds.setdefault(kind, {})[scores.domain + ("\nunseen" if scores.unseen else "")] = scores
    for kind, by_domain in kinds.items():
        _print_table(results, kind, by_domain, results.macro.get(kind))
    if "questions" in results.macro and len(kinds) > 1:
        _print_table(results, "questions", {}, results.macro["questions"])
    named = {name: scores for name, scores in results.tasks.items() if scores.domain is None}
    for metric in dict.fromkeys(scores.metric for scores in named.values()):
        of_metric = {name: scores for name, scores in named.items() if scores.metric == metric}
        _print_table(results, "tasks", of_metric, results.macro.get(metric))
    print_notes(results.notes)


def _print_table(results: TaskResults, title: str, lines: Mapping[str, TaskScores], mean: TaskScores | None) -> None:
    first = mean or next(iter(lines.values()))
    chances = {scores.chance for scores in lines.values()} or {first.chance}
    chance = f", chance {first.chance:.2f}" if first.chance is not None and len(chances) == 1 else ""
    less = "" if first.higher_is_better else ", less is better"
    out.print(Text.assemble((title, "bold"), f" ({first.metric}{chance}{less})"))
    models = [model for model in results.models if any(model in scores.rows for scores in [first, *lines.values()])]
    table = Table("", ["n", *models])
    for label, scores in lines.items():
        cells = [_cell(scores.rows.get(model), scores.metric) for model in models]
        table.add(label, Cell(str(scores.items), "dim"), *_green(models, cells))
    if mean is not None:
        cells = [_cell(mean.rows.get(model), mean.metric) for model in models]
        table.add("mean", Cell(str(mean.items), "dim"), *_green(models, cells), style="bold")
    if first is mean and first.differences:
        cells = [_cell(mean.differences.get(model), mean.metric, "+") for model in models]
        table.add("mixture -", "", *_green(models, cells))
    out.print(table)
    out.print()


def _green(models: Sequence[str], cells: Sequence[str]) -> list[Cell]:
    """Cells with the mixture's in green."""
    return [Cell(cell, "green" if model == "mixture" else "") for model, cell in zip(models, cells, strict=True)]


def _cell(estimate: Estimate | None, metric: str, sign: str = "") -> str:
    """A score, and below it the bounds of its interval, short enough for six models on a terminal."""
    from modekit.evaluation.tasks.results import PERCENTAGES

    if estimate is None:
        return "-"
    digits, fewer = (1, 1) if metric in PERCENTAGES else (3, 2)
    value = f"{estimate.value:{sign}.{digits}f}"
    if estimate.low is None or estimate.high is None:
        return value
    bounds = (
        f"{bound:{sign}.{fewer}f}".replace("0.", ".", 1) if fewer == 2 else f"{bound:{sign}.{fewer}f}"
        for bound in (estimate.low, estimate.high)
    )
    return f"{value}\n{' '.join(bounds)}"


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
