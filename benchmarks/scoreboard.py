"""Every way to put fine-tunes together, side by side, on the same experts, text and tokens: scoreboard.md.

    python benchmarks/whole.py train FOLDER --kind adapters --seeds 0 1 2     (and --kind full, --kind ffn)
    python benchmarks/scoreboard.py FOLDER --seeds 0 1 2                      rows that are not there yet
    python benchmarks/scoreboard.py FOLDER --only "peft" --again              rows whose name or source has these words, anew
    python benchmarks/scoreboard.py FOLDER --kinds adapters-eight             pools that are hard to route: peers/parts.py
    python benchmarks/scoreboard.py FOLDER --page [OTHER ...]                 the tables of scoreboard.md, and the rows beside

A row is made and scored in a process of its own and kept in FOLDER/scoreboard; the command goes on where it was stopped. Two
that run at once share the rows. It is no command of modekit, since peers bring packages and environments of their own, which it
makes in FOLDER/scoreboard/environments.
"""

from __future__ import annotations

import argparse
import os
import sys
from itertools import product
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))  # draws the pictures of docs, too
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a forked process must not wait for threads of its parent

from filelock import FileLock
from transformers.utils import logging

from peers.every import PEERS
from peers.page import write_page
from peers.parts import PARTS
from peers.pool import SMOLLM2, open_pool
from peers.row import path_of, run

KINDS = ("ffn", "adapters", "full")
HARD = ("adapters-twice", *(f"adapters-{how}" for how in PARTS), SMOLLM2)


def main() -> None:
    """Rows, or the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=KINDS + HARD, default=KINDS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="*", default=[], help="words of a peer's name or source")
    parser.add_argument("--without", nargs="*", default=[], help="words of peers to leave out")
    parser.add_argument("--again", action="store_true", help="make rows anew that are there")
    parser.add_argument("--tokens", type=int, default=4_096, help="of each text, to score")
    parser.add_argument("--minutes", type=float, default=15, help="most time of a row")
    parser.add_argument("--page", nargs="*", type=Path, help="write the page; rows of other FOLDERs, too")
    said = parser.parse_args()
    logging.disable_progress_bar()
    results = said.folder.resolve() / "scoreboard"
    if said.page is not None:
        write_page([results, *(folder.resolve() / "scoreboard" for folder in said.page)])
        return
    results.mkdir(exist_ok=True)
    for seed in said.seeds:
        with FileLock(results / "pools.lock"):
            pools = [open_pool(said.folder.resolve(), kind, seed, results) for kind in said.kinds]
        for peer, scored in product(PEERS, pools):
            words = f"{peer.name} {peer.source}"
            if (said.only and not any(each in words for each in said.only)) or any(each in words for each in said.without):
                continue
            if said.again:
                path_of(results, peer, scored).unlink(missing_ok=True)
            run(peer, scored, results, tokens=said.tokens, minutes=said.minutes)


if __name__ == "__main__":
    main()
