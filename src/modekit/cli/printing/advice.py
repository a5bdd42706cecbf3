"""What `modekit advise` draws on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from modekit.cli.printing.console import out, shows_bold
from modekit.cli.printing.mixtures import fit_said, print_notes
from modekit.cli.printing.table import OWN, Cell, Table
from modekit.files.figures import bytes_of, count_of, three_digits

if TYPE_CHECKING:
    from modekit.search.advise.advice import Advice
    from modekit.search.advise.findings import Finding
    from modekit.search.advise.gain import Figure

_COLOURS = {"error": "red", "warning": "yellow", "note": "dim"}


def print_advice(advice: Advice) -> None:
    """Draw what was found, from the files to the recipe."""
    moved = [place for place in advice.usable if advice.drift.moved[place]]
    if moved:
        _print_drift(advice, moved)
    if len(moved) > 1:
        _print_cosines(advice, moved)
    if advice.measured.gains is not None:
        _print_losses(advice)
        _print_gains(advice)
    if advice.measured.confusion is not None:
        _print_words(advice)
    print_findings(advice.findings)
    _print_choices(advice)


def _print_drift(advice: Advice, moved: Sequence[int]) -> None:
    drift = advice.drift
    table = Table("expert", ["all", *drift.groups])
    for place in moved:
        cells = []
        for group in drift.groups:
            relative, share = drift.relative(place, group), drift.share(place, group)
            cells.append("0" if share == 0 else f"{'-' if relative is None else three_digits(relative)}  {share:4.0%}")
        table.add(advice.name(place), three_digits(drift.total(place)), *cells)
    out.print("How far experts moved: |difference| / |base|, and the group's share of the squared difference.")
    out.print(table)


def _print_cosines(advice: Advice, moved: Sequence[int]) -> None:
    table = Table("expert", [advice.name(place) for place in moved])
    for place in moved:
        cosines = ((other, advice.drift.cosine(place, other)) for other in moved)
        table.add(
            advice.name(place),
            *("" if other == place or cosine is None else f"{cosine:.2f}" for other, cosine in cosines),
        )
    out.print("\nWhether they moved the same way: cosine of their differences from the base.")
    out.print(table)


def _print_losses(advice: Advice) -> None:
    gains = advice.measured.gains
    assert gains is not None
    domains = list(next(iter(gains.whole.values())))
    table = Table("model", [advice.name(place) for place in domains])
    for model, row in gains.whole.items():
        table.add(advice.name(model), *(Cell(f"{row[domain].mean:.3f}", own=domain == model) for domain in domains))
    tokens = [advice.measured.texts[place]["tokens"] for place in domains]
    size = f"{min(tokens):,}" + (f" to {max(tokens):,}" if min(tokens) < max(tokens) else "")
    own = "in bold" if shows_bold(out) else f"marked {OWN}"
    out.print(f"\nHeld-out loss in nats per token ({size} tokens per domain of the select split), an expert's own text {own}.")
    out.print(table)


def _print_gains(advice: Advice) -> None:
    gains = advice.measured.gains
    assert gains is not None
    columns = {place: shares for place in gains.parts if (shares := advice.shares(place)) is not None}
    if not columns:
        return
    table = Table("put into the base", [advice.name(place) for place in columns])
    for part in next(iter(columns.values())):
        table.add(part, *(_with_error(shares[part]) for shares in columns.values()))
    if gains.on_average:
        on_average = (gains.share(place, gains.on_average[place]) for place in columns)
        table.add("ffn, rest averaged", *map(_with_error, on_average))
    out.print("\nWhere the gain sits: share of an expert's gain on its own text, with its standard error.")
    out.print(table)
    without = [advice.name(place) for place, shares in columns.items() if any(share.error is None for share in shares.values())]
    if without:
        print_notes([f"too little text to say how sure the figures of {', '.join(without)} are: give more, or more --tokens"])


def _with_error(share: Figure) -> str:
    return f"{share.value:.2f}" + (f" ± {share.error:.2f}" if share.error else "")


def _print_words(advice: Advice) -> None:
    words = advice.measured.confusion
    assert words is not None
    table = Table("text of", [advice.name(place) for place in words.domains])
    for row, place in enumerate(words.domains):
        table.add(advice.name(place), *(f"{share:.2f}" for share in words.named[row]))
    out.print("\nWhich domain n-grams take a token for, knowing the text so far: share of held-out tokens.")
    out.print(table)


def print_findings(findings: Sequence[Finding]) -> None:
    """Draw findings, the gravest first."""
    if findings:
        out.print("\nFindings")
    for finding in sorted(findings, key=lambda finding: [*_COLOURS].index(finding.level)):
        found = f": {finding.found}" if finding.found else ""
        colour = _COLOURS[finding.level]
        text = Text.assemble((finding.level, colour), "  ", (finding.about, "bold"), f"  {finding.what}{found}")
        out.print(text, soft_wrap=True)
        if finding.to_do:
            out.print(Text(f"  to do: {finding.to_do}", style="dim"), soft_wrap=True)


def _print_choices(advice: Advice) -> None:
    out.print("\nAdvice")
    if advice.recipe is None:
        out.print("  Nothing is left to mix: no expert can be used and differs from the base for the better.")
        return
    for choice in advice.choices:
        keys = ", ".join(f"{key}: {_inline(value)}" for key, value in choice.mixture.items())
        out.print(Text(keys, style="bold green"), soft_wrap=True)
        out.print(Text(f"  {choice.why}"), soft_wrap=True)
        out.print(Text(f"  {choice.source}", style="dim"), soft_wrap=True)
    plan = advice.plan
    assert plan is not None
    sizes = plan["parameters"]
    numbers = f"{count_of(sizes['total'])} parameters, {count_of(sizes['active'])} active per token"
    gives = f" {plan['architecture']}, {numbers}, {bytes_of(plan['bytes']['written'])}"
    out.print(Text.assemble(("gives", "bold"), gives), soft_wrap=True)
    out.print(Text.assemble(("fit", "bold"), f" {fit_said(plan['fit'])}"), soft_wrap=True)
    for note in plan["notes"]:
        out.print(Text.assemble(("  note:", "yellow"), f" {note}"), soft_wrap=True)
    for limit in advice.limits:
        out.print(Text(limit, style="dim"), soft_wrap=True)


def _inline(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_inline(entry)}" for key, entry in value.items()) + "}"
    return "[" + ", ".join(map(str, value)) + "]" if isinstance(value, list) else str(value)
