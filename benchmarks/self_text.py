"""How good is a router that was fitted on text which the experts wrote themselves? The table of self_text.md.

    python benchmarks/self_text.py FOLDER --kind adapters --seeds 0 1 2

FOLDER has the models of `python benchmarks/whole.py train FOLDER --kind adapters --seeds 0 1 2`; of kind ffn those of
`modekit demo`, linked as FOLDER/seed0/base, FOLDER/seed0/ffn-medicine and so on. For each seed two mixtures are
built with a lexical router, on the experts' real text and on self-written text, and scored on the same held-out real text.
`accuracy`: share of the tokens of all real text that set nothing (splits select and report) on which the own expert leads, the
mean of the domains, from the router's table alone.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from modekit.building.build import build
from modekit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from modekit.evaluation.evaluate import evaluate
from modekit.evaluation.results import Results
from modekit.files.output import is_there
from modekit.loaded.load import load_tokenizer
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.routing.evidence import Averaging
from modekit.text.documents import read_documents
from modekit.text.sequences import encode
from modekit.text.splits import documents_of_split
from whole import DOMAINS, EVAL_TOKENS, SEQUENCE_LENGTH, UNSEEN, recipe

FORMS: dict[str, dict[str, Any]] = {
    "adapters": {"output": {"format": "modekit"}},
    "ffn": {"output": {"format": "modekit"}},
    "full": {"output": {"format": "modekit"}, "modules": "all"},
}


def said(kind: str, text: str) -> dict[str, Any]:
    """The recipe of whole.py, on real text or on `self`."""
    made = recipe(kind, FORMS[kind])
    experts = [{**each, "text": "self" if text == "self" else each["text"]} for each in made["experts"]]
    given = {each["name"]: each["text"] for each in made["experts"]}
    return {**made, "experts": experts, "eval": {**made["eval"], **given}}


def accuracy(checkpoint: Checkpoint, texts: Path) -> float:
    """On how many tokens of held-out real text the own expert leads."""
    tokenizer, names = load_tokenizer(checkpoint.folder), checkpoint.record.recipe.names
    table_EV = torch.from_numpy(checkpoint.gates()[0])
    averaging = Averaging(tuple(checkpoint.record.recipe.mixture.router.decays))
    shares = []
    for place, name in enumerate(names):
        documents = read_documents([str(texts / f"{name}.jsonl")], root=texts, where=name)
        held = [each for split in ("select", "report") for each in documents_of_split(documents, split)]
        sequences = encode(tokenizer, held, max_tokens=2**20, sequence_length=SEQUENCE_LENGTH)
        leads = [(averaging.matrices(len(each.ids))[0] @ table_EV[:, each.ids].T).argmax(-1) == place for each in sequences]
        shares.append(float(torch.cat(leads).float().mean()))
    return sum(shares) / len(shares)


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
        share, right = gaps[text] / gaps["real"], accuracy(checkpoint, folder / "text")
        print(
            f"| {kind} | {seed} | {text} | {right:.3f} | {gaps[text]:.3f} | {share:.3f} | {each} | {unseen:.3f} | {took:.0f} |",
            flush=True,
        )


def main() -> None:
    """The rows of a kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=[*FORMS], required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tokens", type=int, default=EVAL_TOKENS["adapters"])
    options = parser.parse_args()
    print(f"| experts | seed | text | accuracy | gap closed | of real | {' / '.join(DOMAINS)} | unseen / base | build s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for seed in options.seeds:
        measure(options.folder.resolve(), options.kind, seed, options.tokens)


if __name__ == "__main__":
    main()
