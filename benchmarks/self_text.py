"""How good is a router that was fitted on text which the experts wrote themselves? The table of self_text.md.

    python benchmarks/self_text.py FOLDER --kind adapters --seeds 0 1 2

FOLDER has the models of `python benchmarks/whole.py train FOLDER --kind adapters --seeds 0 1 2`. For each seed two mixtures are
built with a lexical router, on the experts' real text and on self-written text, and scored on the same held-out real text. Of
strangers there is one set of models, seed0, and seeds are those of the written text.
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
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.evidence import read_table
from modekit.checkpoint.open import open_checkpoint
from modekit.demo.models import SEQUENCE_LENGTH
from modekit.demo.text import UNSEEN
from modekit.evaluation.evaluate import evaluate
from modekit.evaluation.results import Results
from modekit.files.change import is_there
from modekit.loaded.load import load_tokenizer
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.routing.evidence import averaged
from modekit.text.documents import read_documents
from modekit.text.sequences import encode
from modekit.text.splits import Split, documents_of_split, mark_of
from whole import EVAL_TOKENS, NATIVE, recipe

FORMS: dict[str, dict[str, dict[str, Any]]] = {
    "adapters": {"documents": {"output": {"format": "modekit"}}},
    "ffn": {"documents": {"output": {"format": "modekit"}}},
    "full": {"documents": {"output": {"format": "modekit"}, "modules": "all"}},
    "strangers": {
        "documents": {"output": {**NATIVE, "carry": "all"}, "router": {"fit": "lexical", "chat": False}},
        "chats": {"output": {**NATIVE, "carry": "all"}},
    },
}
"""How the experts of a kind are mixed."""


def said(kind: str, form: dict[str, Any], seed: int | None) -> dict[str, Any]:
    """The recipe of whole.py on real text, or with a seed on text that the experts write."""
    made = recipe(kind, form)
    given = {each["name"]: each["text"] for each in made["experts"]}
    if seed is not None:
        made["experts"] = [{**each, "text": "self"} for each in made["experts"]]
        made["mixture"]["router"] = {**made["mixture"]["router"], "seed": seed}
    return {**made, "eval": {**made["eval"], **given}}


def seen_of(kind: str, texts: Path) -> set[str]:
    """Marks of all real documents but those of the report split: strangers do not say what they were trained on."""
    names = [each["name"] for each in recipe(kind, next(iter(FORMS[kind].values())))["experts"]]
    read = [read_documents([str(texts / f"{name}.jsonl")], root=texts, where=name) for name in names]
    splits: tuple[Split, ...] = ("fit", "select")
    return {mark_of(each) for documents in read for split in splits for each in documents_of_split(documents, split)}


def accuracy(checkpoint: Checkpoint, texts: Path) -> float:
    """On how many tokens of held-out real text the own expert leads."""
    tokenizer, names, channels = load_tokenizer(checkpoint.folder), checkpoint.names, checkpoint.shape.channels
    table_VE = torch.from_numpy(checkpoint.gates()[0].T if channels is None else read_table(*checkpoint.carrier))
    decays = checkpoint.record.recipe.mixture.router.decays if channels is None else channels.decays
    shares = []
    for place, name in enumerate(names):
        documents = read_documents([str(texts / f"{name}.jsonl")], root=texts, where=name)
        held = [each for split in ("select", "report") for each in documents_of_split(documents, split)]
        sequences = encode(tokenizer, held, max_tokens=2**20, sequence_length=SEQUENCE_LENGTH)
        leads = [averaged(table_VE[list(each.ids)][None, :, None], decays)[0].argmax(-1) == place for each in sequences]
        shares.append(float(torch.cat(leads).float().mean()))
    return sum(shares) / len(shares)


def measure(folder: Path, kind: str, form: str, seed: int, known: Results | None) -> Results:
    """Two rows of the table: the gap closed with real text and with self-written text; `known` rows are not scored again."""
    home, real = folder / ("seed0" if kind == "strangers" else f"seed{seed}"), 1.0
    sampling = seed if kind == "strangers" else 0
    for text in ("real", "self"):
        start = time.process_time()
        plan = make_plan(parse_recipe(said(kind, FORMS[kind][form], None if text == "real" else sampling), where=text), home)
        out = home / f"{kind}-{text}-{form}"
        kept = text == "real" and is_there(out)
        checkpoint = open_checkpoint(out) if kept else build(plan, out, overwrite=True)
        took = time.process_time() - start
        known = evaluate(
            checkpoint,
            tokens_per_domain=EVAL_TOKENS[kind],
            sequence_length=SEQUENCE_LENGTH,
            known=known,
            seen=seen_of(kind, folder / "text"),
        )
        base, mixed = known.row("base"), known.row("mixture")
        gaps = {name: score.gap_closed for name, score in mixed.scores.items() if score.gap_closed is not None}
        each = " / ".join(f"{name} {gap:.3f}" for name, gap in gaps.items())
        mean = mixed.mean_gap(known.domains) or 0.0
        real = mean if text == "real" else real
        unseen = mixed.scores[UNSEEN].loss / base.scores[UNSEEN].loss
        print(
            f"| {kind} {form} | {seed} | {text} | {accuracy(checkpoint, folder / 'text'):.3f} | {mean:.3f} | {mean / real:.3f} "
            f"| {each} | {unseen:.3f} | {took:.0f} |",
            flush=True,
        )
    assert known is not None
    return known


def main() -> None:
    """The rows of a kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=[*FORMS], required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    print("| experts | seed | text | accuracy | gap closed | of real | each | unseen / base | build s |")
    print("|---|---|---|---|---|---|---|---|---|")
    known: Results | None = None
    for seed in options.seeds:
        for form in FORMS[options.kind]:
            known = measure(options.folder.resolve(), options.kind, form, seed, known)


if __name__ == "__main__":
    main()
