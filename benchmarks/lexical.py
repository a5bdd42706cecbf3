"""Lexical routers on the demo's FFN specialists, in one table: lexical.md.

    modekit demo --out demo --seeds 3
    python benchmarks/lexical.py demo --seeds 3 [--split report] [--only "native, top-2"]

Every variant is built (native) or set anew on one mixture (modekit), and scored on held-out text of the demo: gap closed, mean
over the four domains, with the oracle (own expert forced) at 1.0, and the loss on the unseen domain relative to the base's. For
texts whose topic changes, 256 tokens of one domain and then of another, it counts after how many tokens the new
domain's expert leads in most layers and goes on to lead for eight more: median, and what 90 % of the pairs need.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel

from modekit.building.build import build
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.demo.models import SEQUENCE_LENGTH
from modekit.demo.text import DOMAINS, GENERAL, UNSEEN
from modekit.evaluation.domains import Domain, held_out_domains, recipe_texts
from modekit.loaded.load import load_model, load_tokenizer
from modekit.loaded.shapes import mixture_of
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.text.sequences import encode
from study import EVAL_TOKENS, Losses, gaps_closed, losses_of, spread, total

HALF = 256
STAYS = 8


def lexical(top_k: int = 2, form: str = "native", **router: Any) -> dict[str, Any]:
    """A mixture under a lexical router."""
    return {
        "mixture": {"method": "routing", "top_k": top_k, "router": {"fit": "lexical", **router}},
        "output": {"format": form},
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "native, top-2": lexical(),
    "native, top-1": lexical(1),
    "native, base as an expert, top-2": {**lexical(), "base": True},
    "native, base as an expert, top-1": {**lexical(1), "base": True},
    "native, top-2, decay 0.99": lexical(decay=[0.99]),
    "native, top-2, decay 1 (mean so far)": lexical(decay=[1.0]),
    "modekit, tokens": lexical(form="modekit"),
    "modekit, tokens and pairs": lexical(form="modekit", orders=[1, 2]),
    "modekit, tokens to triples": lexical(form="modekit", orders=[1, 2, 3]),
}


def run_seed(folder: Path, split: Any, only: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Row -> gap closed per domain, loss relative to the base's of the unseen one, tokens until a new topic leads."""
    rows: dict[str, dict[str, Any]] = {}
    base: Losses = {}
    own: Losses = {}
    for name, says in VARIANTS.items():
        if only and name not in only:
            continue
        checkpoint = _built(folder, name, says)
        shown = {each.name: each for which in ("report", split) for each in _held_out(checkpoint, which)}
        held_out = [shown[name] for name in (*DOMAINS, UNSEEN)]  # nothing chose by the unseen one, whose split is report alone
        model = load_model(checkpoint.folder)
        if not base:
            base = losses_of(load_model(folder / "base"), held_out)
            for domain in held_out:
                if domain.expert is not None:
                    with mixture_of(model, checkpoint).forced(domain.expert):
                        own |= losses_of(model, [domain])
        losses = losses_of(model, held_out)
        gaps = gaps_closed(base, own, losses)
        waits = sorted(waiting_times(model, checkpoint, held_out))
        rows[name] = {
            **gaps,
            UNSEEN: total(losses[UNSEEN]) / total(base[UNSEEN]),
            "median": statistics.median(waits),
            "most": waits[int(0.9 * (len(waits) - 1))],
        }
        print(f"{folder.name} {name}: {statistics.fmean(gaps.values()):.4f} {rows[name]}", flush=True)
    return rows


def _held_out(checkpoint: Checkpoint, split: Any) -> Sequence[Domain]:
    if split == "report":
        return held_out_domains(checkpoint, tokens_per_domain=EVAL_TOKENS, sequence_length=SEQUENCE_LENGTH)
    texts, tokenizer = recipe_texts(checkpoint), load_tokenizer(checkpoint.folder)
    owns = [(place, name, texts.own(place)) for place, name in enumerate(checkpoint.names)]
    return [
        Domain(name, at, encode(tokenizer, texts.select_of(own), max_tokens=EVAL_TOKENS, sequence_length=SEQUENCE_LENGTH))
        for at, name, own in owns
        if own is not None
    ]


def waiting_times(model: PreTrainedModel, checkpoint: Checkpoint, domains: Sequence[Domain]) -> Iterator[int]:
    """Per ordered pair of domains, over a few of their texts, tokens until the second one's expert leads and stays."""
    long = {
        domain.expert: [each.ids for each in domain.sequences if len(each.ids) > HALF][:4]
        for domain in domains
        if domain.expert is not None
    }
    for first, second in ((a, b) for a in long for b in long if a != b):
        for before, after in zip(long[first], long[second], strict=False):
            ids = torch.tensor([[*before[:HALF], *after[1 : HALF + 1]]])
            with torch.inference_mode(), mixture_of(model, checkpoint).traced() as trace:
                model(input_ids=ids, use_cache=False)
                leaders = torch.stack([said.reshape(ids.shape[1], -1).argmax(-1) for said in trace])
            leads = ((leaders == second).float().mean(0) > 0.5)[HALF:].tolist()
            yield next((place for place in range(HALF) if all(leads[place : place + STAYS])), HALF)


def _built(folder: Path, name: str, says: Mapping[str, Any]) -> Checkpoint:
    recipe = yaml.safe_load((folder / "routing.yaml").read_text())
    if says.get("base"):
        general = {"name": GENERAL, "model": "base", "text": f"../text/{GENERAL}.jsonl"}
        recipe["experts"] = [*recipe["experts"], general]
    router = {"sequence_length": SEQUENCE_LENGTH, **says["mixture"]["router"]}
    recipe = {**recipe, "mixture": {**says["mixture"], "router": router}, "output": says["output"]}
    out = folder / "routers-lexical" / "".join(letter if letter.isalnum() else "-" for letter in name)
    out.parent.mkdir(exist_ok=True)
    return build(make_plan(parse_recipe(recipe), folder), out, overwrite=True)


def table(per_seed: list[dict[str, dict[str, Any]]]) -> str:
    lines = [
        f"| router | gap closed | {' | '.join(DOMAINS)} | {UNSEEN} / base | a new topic leads after: median / 90 % |",
        "|---" * (len(DOMAINS) + 4) + "|",
    ]
    for name in per_seed[0]:
        rows = [seed[name] for seed in per_seed]
        means = [statistics.fmean(row[domain] for domain in DOMAINS) for row in rows]
        cells = [spread(means, 3), *(f"{statistics.fmean(row[domain] for row in rows):.3f}" for domain in DOMAINS)]
        cells += [spread([row[UNSEEN] for row in rows], 4)]
        cells += [
            f"{statistics.fmean(row['median'] for row in rows):.0f} / {statistics.fmean(row['most'] for row in rows):.0f}"
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--split", choices=["select", "report"], default="select")
    parser.add_argument("--only", nargs="*", default=[], help="variants, by name")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folders = [arguments.demo.resolve() / f"seed{seed}" for seed in range(arguments.seeds)]
    print(table([run_seed(folder, arguments.split, arguments.only) for folder in folders]))


if __name__ == "__main__":
    main()
