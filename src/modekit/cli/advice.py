"""The command that looks before anything is built."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from modekit.cli.printing.console import out, shows_bold
from modekit.cli.printing.mixtures import fit_said, print_notes
from modekit.cli.printing.table import OWN, Cell, Table
from modekit.cli.progress import drawn_progress
from modekit.cli.shell import AsJson, RecipePath, Trust, app
from modekit.files.figures import bytes_of, count_of, or_dash, three_digits
from modekit.recipes.strict import BASE
from modekit.run import Run
from modekit.text.amounts import SAMPLE_TOKENS

if TYPE_CHECKING:
    from modekit.search.advise.result import Advice, Finding, WayToRun, WordTable


@app.command()
def advise(
    recipe: RecipePath,
    tokens: Annotated[
        int, typer.Option(min=64, help="Held-out tokens per domain to measure on (select split).")
    ] = SAMPLE_TOKENS,
    native: Annotated[bool, typer.Option("--native", help="Advise only mixtures that run without modekit.")] = False,
    write: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File for the advised recipe, with reasons as comments.")
    ] = None,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Recommend a recipe: measure what each expert changed and which changes help, and list what is wrong.

    The recipe's `mixture` is ignored. Exit code 1 if nothing is left to mix.
    """
    from modekit.search.advise.advise import advise
    from modekit.search.advise.recipe import check_target, write_advised

    if write is not None:
        check_target(write)
    with drawn_progress() as progress:
        advice = advise(recipe, tokens=tokens, native=native, run=Run(trust_remote_code, progress))
    if as_json:
        sys.stdout.write(advice.model_dump_json(indent=2) + "\n")
    else:
        print_advice(advice)
    if advice.recipe is None:
        raise typer.Exit(1)
    if write is not None:
        write_advised(write, advice, recipe.resolve().parent)
        if not as_json:
            out.print(Text.assemble((str(write), "bold"), f": modekit build {write} OUT"), soft_wrap=True)


_COLOURS = {"error": "red", "warning": "yellow", "note": "dim"}


def print_advice(advice: Advice) -> None:
    """Print what was found, from the files to the recipe."""
    moved = [name for name, drift in advice.drift.items() if drift.relative]
    if moved:
        _print_drift(advice, moved)
    if len(moved) > 1:
        _print_cosines(advice, moved)
    if advice.losses:
        _print_losses(advice)
        _print_gains(advice)
    if advice.words is not None:
        _print_words(advice.words)
    print_findings(advice.findings)
    _print_recommendations(advice)


def _print_drift(advice: Advice, moved: Sequence[str]) -> None:
    table = Table("expert", ["all", *advice.drift[moved[0]].groups])
    for name in moved:
        cells = []
        for group in advice.drift[name].groups.values():
            relative = "-" if group.relative is None else three_digits(group.relative)
            cells.append("0" if group.share == 0 else f"{relative}  {group.share:4.0%}")
        table.add(name, three_digits(advice.drift[name].relative), *cells)
    out.print("How far experts moved: |difference| / |base|, and the group's share of the squared difference.")
    out.print(table)


def _print_cosines(advice: Advice, moved: Sequence[str]) -> None:
    table = Table("expert", moved)
    pairs = advice.similarity
    for name, row in zip(pairs.experts, pairs.cosine, strict=True):
        if name in moved:
            cosines = ((other, cosine) for other, cosine in zip(pairs.experts, row, strict=True) if other in moved)
            table.add(name, *("" if other == name or cosine is None else f"{cosine:.2f}" for other, cosine in cosines))
    out.print("\nWhether they moved the same way: cosine of their differences from the base.")
    out.print(table)


def _print_losses(advice: Advice) -> None:
    domains = list(advice.losses[BASE])
    table = Table("model", domains)
    for model, losses in advice.losses.items():
        table.add(model, *(Cell(f"{losses[domain]:.3f}", own=domain == model) for domain in domains))
    tokens = [advice.text[domain].tokens for domain in domains]
    size = f"{min(tokens):,}" + (f" to {max(tokens):,}" if min(tokens) < max(tokens) else "")
    own = "in bold" if shows_bold(out) else f"marked {OWN}"
    out.print(f"\nHeld-out loss in nats per token ({size} tokens per domain of the select split), an expert's own text {own}.")
    out.print(table)


def _print_gains(advice: Advice) -> None:
    """Of experts that have a gain; all of their parts have a share then, or none."""
    shares = {name: {part: each.share for part, each in gain.parts.items() if each.share} for name, gain in advice.gain.items()}
    columns = {name: own for name, own in shares.items() if own}
    if not columns:
        return
    table = Table("put into the base", list(columns))
    for part in next(iter(columns.values())):
        table.add(part, *(own[part].said(2) for own in columns.values()))
    out.print("\nWhere the gain sits: share of an expert's gain on its own text, with its standard error.")
    out.print(table)
    without = [name for name, own in columns.items() if any(share.error is None for share in own.values())]
    if without:
        print_notes([f"too little text to say how sure the figures of {', '.join(without)} are: give more, or more --tokens"])


def _print_words(words: WordTable) -> None:
    table = Table("text of", words.domains)
    for name, row in zip(words.domains, words.named, strict=True):
        table.add(name, *(f"{share:.2f}" for share in row))
    out.print("\nWhich domain n-grams take a token for, knowing the text so far: share of held-out tokens.")
    out.print(table)


def print_findings(findings: Sequence[Finding]) -> None:
    """Print findings, the gravest first."""
    if findings:
        out.print("\nFindings")
    for finding in sorted(findings, key=lambda finding: [*_COLOURS].index(finding.level)):
        found = f": {finding.found}" if finding.found else ""
        colour = _COLOURS[finding.level]
        text = Text.assemble((finding.level, colour), "  ", (finding.about, "bold"), f"  {finding.what}{found}")
        out.print(text, soft_wrap=True)
        if finding.to_do:
            out.print(Text(f"  to do: {finding.to_do}", style="dim"), soft_wrap=True)


def _print_recommendations(advice: Advice) -> None:
    out.print("\nAdvice")
    if advice.recipe is None:
        out.print("  Nothing is left to mix: no usable expert is better than the base.")
        return
    for choice in advice.advice:
        keys = ", ".join(f"{key}: {_inline(value)}" for key, value in choice.mixture.items())
        out.print(Text(keys, style="bold green"), soft_wrap=True)
        out.print(Text(f"  {choice.why}"), soft_wrap=True)
        out.print(Text(f"  {choice.source}", style="dim"), soft_wrap=True)
    plan = advice.plan
    assert plan is not None
    sizes = plan.parameters
    numbers = f"{count_of(sizes['total'])} parameters, {count_of(sizes['active'])} active per token"
    gives = f" {plan.architecture}, {numbers}, {bytes_of(plan.bytes['written'])}"
    out.print(Text.assemble(("gives", "bold"), gives), soft_wrap=True)
    out.print(Text.assemble(("router", "bold"), f" {plan.router_why or plan.router}"), soft_wrap=True)
    out.print(Text.assemble(("fit", "bold"), f" {fit_said(plan.fit)}"), soft_wrap=True)
    for note in plan.notes:
        out.print(Text.assemble(("  note:", "yellow"), f" {note}"), soft_wrap=True)
    _print_ways(advice.ways)
    for limit in advice.limits:
        out.print(Text(limit, style="dim"), soft_wrap=True)


def _print_ways(ways: Sequence[WayToRun]) -> None:
    table = Table("way", ["loss", "lost", "active", "parameters", "weights", "what"])
    for way in ways:
        losses = [or_dash(nats, ".3f") for nats in (way.loss, way.lost)]
        counts = ["-" if count is None else count_of(count) for count in (way.active, way.total)]
        table.add(way.name, *losses, *counts, "-" if way.bytes is None else bytes_of(way.bytes), way.said)
    out.print("\nWays to run the experts: held-out loss where each is chosen on its own text, and nats lost of its own model.")
    out.print(table)


def _inline(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_inline(entry)}" for key, entry in value.items()) + "}"
    return "[" + ", ".join(map(str, value)) + "]" if isinstance(value, list) else str(value)
