"""Ways of the survey to choose and to train experts, on the same models, text and tokens: taxonomy.md.

    python benchmarks/whole.py train FOLDER --kind ffn --seeds 0 1 2     the models
    python benchmarks/taxonomy.py FOLDER --seeds 0 1 2                   rows that are not there yet
    python benchmarks/taxonomy.py FOLDER --only "trained: base" --again  rows with these words, anew
    python benchmarks/taxonomy.py FOLDER --claims --seeds 0 1 2          what the survey's claims come to in miniature
    python benchmarks/taxonomy.py FOLDER --page                          the tables of taxonomy.md

Rows are made as those of the scoreboard (peers/row.py), and kept in FOLDER/taxonomy.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))  # draws the pictures of docs, too
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a forked process must not wait for threads of its parent

from transformers.utils import logging

from modekit.demo.text import UNSEEN
from peers.claims import CLAIMS, claims
from peers.every import PEERS
from peers.gates import LEARNT, SET, Gate
from peers.measured import BASE, OWN, Measured, measured
from peers.page import lines, put, rounded
from peers.pool import open_pool
from peers.row import path_of, read_rows, run

PAGE = Path(__file__).with_suffix(".md")
KEPT = PAGE.with_suffix("") / "rows.jsonl"
TOKENS = 4_096
HEADS = ("way", "source", "gap closed", "largest share", "active", "ms / token", f"{UNSEEN} / base")
BOUNDS = [peer for peer in PEERS if peer.name in (BASE, OWN)]


def main() -> None:
    """Rows, claims, or the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="*", default=[], help="words of a row's name")
    parser.add_argument("--again", action="store_true", help="make rows anew that are there")
    parser.add_argument("--minutes", type=float, default=15, help="most time of a row")
    parser.add_argument("--claims", action="store_true")
    parser.add_argument("--page", action="store_true")
    said = parser.parse_args()
    logging.disable_progress_bar()
    results = said.folder.resolve() / "taxonomy"
    if said.page:
        write_page(results)
        return
    for seed in said.seeds:
        scored = open_pool(said.folder.resolve(), "ffn", seed, results)
        if said.claims:
            found = claims(scored, results / f"claims-seed{seed}")
            (results / f"claims-seed{seed}.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
            continue
        for peer in (*BOUNDS, *SET, *LEARNT):
            if said.only and not any(each in peer.name for each in said.only):
                continue
            if isinstance(peer, Gate) and (missing := peer.missing()):
                print(f"skipped, not in this version: {peer.name}: {missing.splitlines()[0]}")
                continue
            if said.again:
                path_of(results, peer, scored).unlink(missing_ok=True)
            run(peer, scored, results, tokens=TOKENS, minutes=said.minutes)


def write_page(results: Path) -> None:
    """Keep the rows of a run beside the page, and write its tables anew; what the run has not stays as it is."""
    text = PAGE.read_text(encoding="utf-8")
    if rows := read_rows(results):
        KEPT.parent.mkdir(exist_ok=True)
        KEPT.write_text("".join(json.dumps(rounded(asdict(row))) + "\n" for row in rows), encoding="utf-8")
        ways = measured(rows, "ffn")
        for mark, peers in (("set", [*BOUNDS, *SET]), ("trained", LEARNT)):
            found = [ways[peer.name] for peer in peers if peer.name in ways]
            found.sort(key=lambda each: -statistics.fmean(each.gaps()))
            text = put(text, mark, "\n".join(lines(HEADS, [_line(each, ways[BASE]) for each in found])))
    by_seed = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("claims-seed*.json"))]
    PAGE.write_text(put(text, "claims", claims_table(by_seed)) if by_seed else text, encoding="utf-8")


def _line(each: Measured, base: Measured) -> list[str]:
    row = each.first
    load = f"{each.mean('load'):.2f}" if row.load else ""
    return [
        *(f"**{row.peer}**" if row.peer in (BASE, OWN) else row.peer, row.source, spread(each.gaps()), load),
        *(f"{row.active / base.first.total:.2f}", f"{each.mean('ms_per_token'):.2f}", f"{each.unseen():.3f}"),
    ]


def spread(values: Sequence[float]) -> str:
    """Mean and largest deviation from it; one value alone has none."""
    mean = statistics.fmean(values)
    return f"{round(mean, 3) + 0:.3f}" + (f" ± {max(abs(value - mean) for value in values):.3f}" if len(values) > 1 else "")


def claims_table(by_seed: Sequence[Mapping[str, float]]) -> str:
    """The figures of CLAIMS that were found, over seeds."""
    rows = [
        [name, spread([found[name] for found in by_seed if name in found])]
        for name in CLAIMS
        if any(name in f for f in by_seed)
    ]
    return "\n".join(lines(("figure", "found"), rows))


if __name__ == "__main__":
    main()
