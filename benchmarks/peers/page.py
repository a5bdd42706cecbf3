"""scoreboard.md: its tables, written between marks, and the rows that they are made of, kept beside."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import exp
from pathlib import Path

from modekit.demo.text import UNSEEN
from peers.row import Row, read_rows

PAGE = Path(__file__).resolve().parents[1] / "scoreboard.md"
ROWS = PAGE.parent / "scoreboard" / "rows.jsonl"
BASE, OWN, OURS = "base", "own expert (oracle)", "modekit, plain checkpoint"
HEADS = (
    *("way", "source", "gap closed", "over ours", "domains", f"{UNSEEN} / base", "specialist's share", "normalised accuracy"),
    *("total", "active", "MB", "make s", "peak MB", "ms / token", "runs in", "note"),
)


@dataclass(frozen=True)
class Measured:
    """One peer on one kind of experts, by seed; `base` and `own` are the rows of the same seeds."""

    rows: Sequence[Row]
    base: Sequence[Row]
    own: Sequence[Row]

    @property
    def first(self) -> Row:
        """Of the smallest seed."""
        return self.rows[0]

    def gaps(self) -> list[float]:
        """Gap closed by seed, mean over domains."""
        return [statistics.fmean(of.values()) for of in self.gaps_by_domain()]

    def gaps_by_domain(self) -> list[dict[str, float]]:
        """By seed."""
        return [
            {name: (base.losses[name] - row.losses[name]) / (base.losses[name] - own.losses[name]) for name in _domains(row)}
            for row, base, own in zip(self.rows, self.base, self.own, strict=True)
        ]

    def share(self) -> float:
        """Perplexity of the own expert over that of this model: what DUME's paper calls retained."""
        pairs = zip(self.rows, self.own, strict=True)
        return statistics.fmean(exp(own.losses[name] - row.losses[name]) for row, own in pairs for name in _domains(row))

    def normalised_accuracy(self) -> float:
        """Right guesses over those of the own expert, as fusion_bench has it for classes."""
        pairs = zip(self.rows, self.own, strict=True)
        return statistics.fmean(row.accuracy[name] / own.accuracy[name] for row, own in pairs for name in _domains(row))

    def unseen(self) -> float:
        """Loss on unseen text over the base's."""
        pairs = zip(self.rows, self.base, strict=True)
        return statistics.fmean(row.losses[UNSEEN] / base.losses[UNSEEN] for row, base in pairs)

    def mean(self, of: str) -> float:
        """Over seeds."""
        return statistics.fmean(getattr(row, of) for row in self.rows)


def _domains(row: Row) -> list[str]:
    return [name for name in row.losses if name != UNSEEN]


def measured(rows: Iterable[Row], kind: str) -> dict[str, Measured]:
    """Peer -> what was measured of experts of a kind."""
    found = [row for row in rows if row.kind == kind and not row.failure]
    by_seed = {name: {row.seed: row for row in found if row.peer == name} for name in (BASE, OWN)}
    peers: dict[str, list[Row]] = {}
    for row in sorted(found, key=lambda row: row.seed):
        if all(row.seed in of for of in by_seed.values()):
            peers.setdefault(row.peer, []).append(row)
    return {
        name: Measured(of, *([by_seed[which][row.seed] for row in of] for which in (BASE, OWN))) for name, of in peers.items()
    }


def table(rows: Iterable[Row], kind: str) -> str:
    """Markdown, the best first; bold: what closes more than our plain checkpoint, and ours where it closes more than others."""
    peers = measured(rows, kind)
    lines = [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
    order = sorted(peers, key=lambda name: -statistics.fmean(peers[name].gaps()))
    return "\n".join([*lines, *(f"| {' | '.join(_cells(peers, name))} |" for name in order)])


def over_ours(peers: Mapping[str, Measured], name: str) -> float | None:
    """Gap closed above our plain checkpoint's, mean over the seeds that both have."""
    if OURS not in peers:
        return None
    ours = dict(zip((row.seed for row in peers[OURS].rows), peers[OURS].gaps(), strict=True))
    pairs = [(gap, ours.get(row.seed)) for row, gap in zip(peers[name].rows, peers[name].gaps(), strict=True)]
    differences = [gap - mine for gap, mine in pairs if mine is not None]
    return statistics.fmean(differences) if differences else None


def _cells(peers: Mapping[str, Measured], name: str) -> list[str]:
    each, base = peers[name], peers[BASE].first
    gaps, over, row = each.gaps(), over_ours(peers, name), each.first
    mean = statistics.fmean(gaps)
    spread = f" ± {max(abs(gap - mean) for gap in gaps):.3f}" if len(gaps) > 1 else ""
    bold = "**" if name.startswith("modekit") or (over is not None and over > 0) else ""
    domains = ", ".join(f"{statistics.fmean(by[of] for by in each.gaps_by_domain()):.2f}" for of in _domains(row))
    return [
        *(
            f"{bold}{name}{bold}",
            row.source,
            f"{bold}{mean:.3f}{spread}{bold}",
            "" if over is None else f"{over:+.3f}",
            domains,
        ),
        *(f"{each.unseen():.3f}", f"{each.share():.3f}", f"{each.normalised_accuracy():.3f}"),
        *(f"{row.total / base.total:.2f}", f"{row.active / base.total:.2f}", f"{row.nbytes / 1e6:.1f}"),
        *(f"{each.mean('seconds'):.0f}", f"{each.mean('peak_mb'):.0f}", f"{each.mean('ms_per_token'):.2f}"),
        *(row.engines, row.note.replace("|", "/")),
    ]


def failures(rows: Iterable[Row]) -> str:
    """What gave no row, and why."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.failure:
            found.setdefault((row.peer, row.failure), []).append(f"{row.kind} {row.seed}")
    lines = [f"| {peer} | {', '.join(where)} | {why} |" for (peer, why), where in sorted(found.items())]
    return "\n".join(["| way | experts, seed | reason |", "|---|---|---|", *lines]) if lines else "None."


def write_page(results: Path) -> None:
    """Keep the rows of a run beside the page, and write its tables anew."""
    rows = read_rows(results)
    ROWS.parent.mkdir(exist_ok=True)
    ROWS.write_text("".join(json.dumps(_rounded(asdict(row))) + "\n" for row in rows), encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    for kind in dict.fromkeys(row.kind for row in rows):
        text = put(text, kind, table(rows, kind))
    PAGE.write_text(put(text, "failures", failures(rows)), encoding="utf-8")


def put(page: str, mark: str, text: str) -> str:
    """The page with a text between `<!-- mark -->` and `<!-- end -->`; as it was where the mark is missing."""
    return re.sub(
        rf"(<!-- {mark} -->\n).*?(<!-- end -->)", lambda found: f"{found[1]}{text}\n{found[2]}", page, flags=re.DOTALL
    )


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return round(value, 5)
    return {key: _rounded(each) for key, each in value.items()} if isinstance(value, dict) else value
