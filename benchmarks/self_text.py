"""How good is a router that was fitted on text which the experts wrote themselves? The table of self_text.md.

    python benchmarks/self_text.py FOLDER --kind adapters --seeds 0 1 2

FOLDER has the models of `python benchmarks/whole.py train FOLDER --kind adapters --seeds 0 1 2`. For each seed two mixtures are
built with a lexical router, on the experts' real text and on self-written text, and scored on the same held-out real text.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from modekit.building.build import build
from modekit.checkpoint.checkpoint import open_checkpoint
from modekit.evaluation.evaluate import evaluate
from modekit.evaluation.results import Results
from modekit.files.output import is_there
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from whole import DOMAINS, EVAL_TOKENS, SEQUENCE_LENGTH, UNSEEN, recipe

FORMS: dict[str, dict[str, Any]] = {
    "adapters": {"output": {"format": "modekit"}},
    "full": {"output": {"format": "modekit"}, "modules": "all"},
}


def said(kind: str, text: str) -> dict[str, Any]:
    """The recipe of whole.py, on real text or on `self`."""
    made = recipe(kind, FORMS[kind])
    experts = [{**each, "text": "self" if text == "self" else each["text"]} for each in made["experts"]]
    given = {each["name"]: each["text"] for each in made["experts"]}
    return {**made, "experts": experts, "eval": {**made["eval"], **given}}


def measure(folder: Path, kind: str, seed: int, tokens: int) -> None:
    """Two rows of the table: the gap closed with real text and with self-written text."""
    home, known = folder / f"seed{seed}", list[Results]()
    gaps = dict[str, float]()
    for text in ("real", "self"):
        start = time.process_time()
        plan = make_plan(parse_recipe(said(kind, text), where=text), home)
        out = home / f"{kind}-{text}"
        kept = text == "real" and is_there(out)
        checkpoint = open_checkpoint(out) if kept else build(plan, out, overwrite=True)
        took = time.process_time() - start
        found = evaluate(
            checkpoint, tokens_per_domain=tokens, sequence_length=SEQUENCE_LENGTH, known=known[0] if known else None
        )
        known.append(found)
        base, mixed = found.row("base"), found.row("mixture")
        gaps[text] = mixed.mean_gap(DOMAINS) or 0.0
        each = " / ".join(f"{mixed.scores[name].gap_closed:.3f}" for name in DOMAINS)
        unseen = mixed.scores[UNSEEN].loss / base.scores[UNSEEN].loss
        share = gaps[text] / gaps["real"]
        print(f"| {kind} | {seed} | {text} | {gaps[text]:.3f} | {share:.3f} | {each} | {unseen:.3f} | {took:.0f} |", flush=True)


def main() -> None:
    """The rows of a kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=[*FORMS], required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tokens", type=int, default=EVAL_TOKENS)
    options = parser.parse_args()
    print(f"| experts | seed | text | gap closed | of real | {' / '.join(DOMAINS)} | unseen / base | build s |")
    print("|---|---|---|---|---|---|---|---|")
    for seed in options.seeds:
        measure(options.folder.resolve(), options.kind, seed, options.tokens)


if __name__ == "__main__":
    main()
