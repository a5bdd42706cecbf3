"""scoreboard.md: its tables, written between marks, and the rows that they are made of, kept beside."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from modekit.demo.text import UNSEEN
from peers.measured import BASE, OTHER, OWN, Measured, domains_of, measured, over_ours
from peers.plot import picture
from peers.row import Row, read_rows

PAGE = Path(__file__).resolve().parents[1] / "scoreboard.md"
ROWS = PAGE.parent / "scoreboard" / "rows.jsonl"
ELSEWHERE = "the package alone"
"""Runs in another process, whose processor time is not seen."""
FIRST = (
    *("way", "gap closed", "over ours", "domains", f"{UNSEEN} / base", "specialist's share", "normalised accuracy", "active"),
    "runs in",
)
SECOND = ("way", "source", "total", "MB", "make s", "peak MB", "ms / token", "note")
POOL = ("way", "gap closed", "over ours", "domains", f"{UNSEEN} / base", "total", "active", "MB", "make s", "runs in")
"""Of a pool that is hard to route, in one table."""
SHOWN_DOMAINS = 6
"""Of more, the lowest and the highest gap."""
ALIKE = 0.95
"""Experts gain nothing over each other where the best other one closes as much of the gap."""


def table(rows: Iterable[Row], kind: str) -> str:
    """One table in Markdown for a pool of parts, two for others, the best first; bold: ours, and what closes more than our
    plain checkpoint.
    """
    peers = measured(rows, kind)
    order = sorted(peers, key=lambda name: -statistics.fmean(peers[name].gaps()))
    results, costs = [_result(peers, name) for name in order], [_cost(peers[name], peers[BASE]) for name in order]
    if "-" in kind:
        pairs = zip(results, costs, strict=True)
        both = [[*result[:5], cost[2], result[7], *cost[3:5], result[8]] for result, cost in pairs]
        return "\n".join([_gains(peers), "", *lines(POOL, both)])
    return "\n".join([*lines(FIRST, results), "", *lines(SECOND, costs)])


def _gains(peers: Mapping[str, Measured]) -> str:
    """What own experts gain over the base, and how much of it other experts do."""
    if OWN not in peers:
        return "No row of the own experts yet."
    said = f"Own experts: {peers[OWN].gain():.2f} nats per token below the base."
    if OTHER not in peers:
        return said
    other = statistics.fmean(peers[OTHER].gaps())
    alike = " **These experts gain nothing over each other.**" if other >= ALIKE else ""
    return f"{said} The best other expert closes {other:.2f} of that.{alike}"


def lines(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    return [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def _result(peers: Mapping[str, Measured], name: str) -> list[str]:
    each, over, gaps = peers[name], over_ours(peers, name), peers[name].gaps()
    mean = statistics.fmean(gaps)
    spread = f" ± {max(abs(gap - mean) for gap in gaps):.3f}" if len(gaps) > 1 else ""
    bold = "**" if name.startswith("modekit") or (over is not None and over > 0) else ""
    found = [statistics.fmean(by[of] for by in each.gaps_by_domain()) for of in domains_of(each.first)]
    shown_gaps = found if len(found) <= SHOWN_DOMAINS else [min(found), max(found)]
    domains = (", " if shown_gaps is found else " to ").join(f"{gap:.2f}" for gap in shown_gaps)
    shown = "" if over is None else f"{over:+.3f}"
    return [
        *(f"{bold}{name}{bold}", f"{bold}{mean:.3f}{spread}{bold}", shown, domains, f"{each.unseen():.3f}"),
        *(f"{each.share():.3f}", f"{each.normalised_accuracy():.3f}"),
        *(f"{each.first.active / peers[BASE].first.total:.2f}", each.first.engines),
    ]


def _cost(each: Measured, base: Measured) -> list[str]:
    row = each.first
    time = "" if row.engines == ELSEWHERE else f"{each.mean('ms_per_token'):.2f}"
    return [
        *(row.peer, row.source, f"{row.total / base.first.total:.2f}", f"{row.nbytes / 1e6:.1f}"),
        *(f"{each.mean('seconds'):.0f}", f"{each.mean('peak_mb'):.0f}", time, row.note.replace("|", "/")),
    ]


def failures(rows: Iterable[Row]) -> str:
    """What gave no row, and why."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.failure:
            found.setdefault((row.peer, row.failure), []).append(f"{row.kind} {row.seed}")
    lines = [f"| {peer} | {', '.join(where)} | {why} |" for (peer, why), where in sorted(found.items())]
    return "\n".join(["| way | experts, seed | reason |", "|---|---|---|", *lines]) if lines else "None."


def write_page(results: Sequence[Path]) -> None:
    """Keep the rows of some runs beside the page, and write its tables anew.

    A row of an earlier folder goes first. Where no folder has a kind of experts, its rows and tables stay.
    """
    new = [row for folder in reversed(results) for row in read_rows(folder)]
    kinds, kept = {row.kind for row in new}, ROWS.read_text(encoding="utf-8").splitlines() if ROWS.exists() else []
    old = [row for row in (Row(**json.loads(line)) for line in kept) if row.kind not in kinds]
    found = {(row.kind, row.seed, row.peer): row for row in [*old, *new]}
    rows = [found[key] for key in sorted(found)]
    ROWS.parent.mkdir(exist_ok=True)
    ROWS.write_text("".join(json.dumps(rounded(asdict(row))) + "\n" for row in rows), encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    for kind in sorted(kind for kind in kinds if measured(rows, kind)):
        text = put(text, kind, table(rows, kind))
        (ROWS.parent / f"{kind}.svg").write_text(picture(rows, kind), encoding="utf-8")
    PAGE.write_text(put(text, "failures", failures(rows)), encoding="utf-8")


def put(page: str, mark: str, text: str) -> str:
    """The page with a text between `<!-- mark -->` and `<!-- end -->`; as it was where the mark is missing."""
    return re.sub(
        rf"(<!-- {mark} -->\n).*?(<!-- end -->)", lambda found: f"{found[1]}{text}\n{found[2]}", page, flags=re.DOTALL
    )


def rounded(value: object) -> object:
    """Figures with five digits behind the point."""
    if isinstance(value, float):
        return round(value, 5)
    return {key: rounded(each) for key, each in value.items()} if isinstance(value, dict) else value
