"""The tables of translation.md: mean and largest deviation over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from study import spread

COLUMNS = ("right", "wrong", "none", "unseen, no label", "unseen, a label")
LOSSES = ("| losses", "| by column")
Scores = Mapping[str, Any]
"""What is known of one seed."""


def tables(part: str, seeds: Sequence[Scores]) -> None:
    """Of one part, nothing where no seed has any."""
    if not seeds:
        return
    print(f"\n## {part}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}; {seeds[0]['signatures']}\n")
    names = [name for name in dict.fromkeys(name for seed in seeds for name in seed) if name.count(" | ") >= 3]
    for beams in (False, True):
        rows = [name for name in names if name.endswith("| beams") == beams and not name.endswith(LOSSES)]
        if rows:
            print("\n" + ("By beams" if beams else "Greedily") + ": BLEU / chrF\n")
            _matrix(rows, seeds)
    with_losses = [name for name in names if name.endswith("| losses")]
    if with_losses:
        print("\nLosses\n")
        _losses(with_losses, seeds)
    print("\nLosses by column, nats per token\n")
    _by_column([name for name in names if name.endswith("| by column")], seeds)
    _by_domain([name for name in names if not name.endswith((*LOSSES, "| beams"))], seeds)


def _matrix(rows: Sequence[str], seeds: Sequence[Scores]) -> None:
    header = ["model", "domain", "randomised", "generic", *COLUMNS, "tokens/s", "total", "active"]
    print(f"| {' | '.join(header)} |\n{'|---' * len(header)}|")
    for name in rows:
        found = [seed[name] for seed in seeds if name in seed]
        model, *says = name.split(" | ")[:4]
        cells = [f"{model}{_of_how_many(found, seeds)}", *says]
        for column in COLUMNS:
            scores = [[mean(each, column, key) for each in found if column in each] for key in ("bleu", "chrf")]
            cells.append(" / ".join(spread(values, 1) for values in scores) if scores[0] else "")
        cells.append(f"{statistics.fmean(each['sources per second'] for each in found):,.0f}")
        cells += [f"{statistics.fmean(each[size] for each in found) / 1e6:.2f}M" for size in ("total", "active")]
        print(f"| {' | '.join(cells)} |")


def _losses(rows: Sequence[str], seeds: Sequence[Scores]) -> None:
    domains = list(seeds[0][rows[0]]["closed"])
    header = ["mixture", "of the mean gap", "mean of the shares", *domains, "loss: base", "own expert", "mixture"]
    print(f"| {' | '.join(header)} |\n{'|---' * len(header)}|")
    for name in rows:
        found = [seed[name] for seed in seeds if name in seed]
        cells = [spread([_of_the_mean(each["losses"], domains) for each in found], 3)]
        cells.append(spread([statistics.fmean(each["closed"].values()) for each in found], 3))
        cells += [spread([each["closed"][domain] for each in found]) for domain in domains]
        for row in ("base", "own", "mixture"):
            cells.append(spread([statistics.fmean(each["losses"][row][domain] for domain in domains) for each in found]))
        says = name.split(" | ")
        many = _of_how_many(found, seeds)
        print(f"| {says[0]}{many}, randomised: {says[2]}, generic: {says[3]} | {' | '.join(cells)} |")


def _of_how_many(found: Sequence[Any], seeds: Sequence[Any]) -> str:
    """What a row says that not all seeds have."""
    return "" if len(found) == len(seeds) else f" ({len(found)} of {len(seeds)} seeds)"


def _by_column(rows: Sequence[str], seeds: Sequence[Scores]) -> None:
    header = ["model", "domain", "randomised", "generic", *COLUMNS]
    print(f"| {' | '.join(header)} |\n{'|---' * len(header)}|")
    for name in rows:
        found = [seed[name] for seed in seeds if name in seed]
        means = [[statistics.fmean(each[column].values()) for each in found if column in each] for column in COLUMNS]
        model, *says = name.split(" | ")[:4]
        cells = [spread(values) if values else "" for values in means]
        print(f"| {' | '.join([f'{model}{_of_how_many(found, seeds)}', *says, *cells])} |")


def _of_the_mean(losses: Mapping[str, Mapping[str, float]], domains: Sequence[str]) -> float:
    """The share of the gap between means over the domains: a domain with hardly a gap does not decide it."""
    base, own, mixture = (statistics.fmean(losses[row][name] for name in domains) for row in ("base", "own", "mixture"))
    return (base - mixture) / (base - own)


def _by_domain(rows: Sequence[str], seeds: Sequence[Scores]) -> None:
    """BLEU of every domain under its right label, else under none."""
    first = seeds[0][rows[0]]
    domains = [*first["none"], *first["unseen, no label"]]
    print("\nBLEU by domain, under the right label where there is one\n")
    print(f"| | {' | '.join(domains)} |\n{'|---' * (len(domains) + 1)}|")
    for name in rows:
        found = [seed[name] for seed in seeds if name in seed]
        merged = [{**each.get("right", each["none"]), **each["unseen, no label"]} for each in found]
        cells = [spread([each[domain]["bleu"] for each in merged], 1) for domain in domains]
        print(f"| {name.replace(' | ', ', ')}{_of_how_many(found, seeds)} | {' | '.join(cells)} |")


def mean(row: Mapping[str, Any], column: str, key: str) -> float:
    """Over the domains of a column."""
    return statistics.fmean(each[key] for each in row[column].values())
