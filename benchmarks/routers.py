"""Routers set anew on one mixture, in one table: routers.md.

    modekit demo --out demo --seeds 3
    python benchmarks/routers.py demo context --seeds 3
    modekit demo --adapters --out demo-adapters --seeds 3
    python benchmarks/routers.py demo-adapters adapters --seeds 3
    python benchmarks/routers.py demo auto --seeds 3 [--documents 16] [--whole] [--split report]

For each seed the demo's mixture `logistic` is built once in the modekit architecture, and its router set anew by every
variant, as `modekit fit` does it. `context`: what the gate reads, on FFN specialists. `adapters`: every fit, on low-rank
experts. `auto` and `no text`: what a recipe could get that names no router (auto.md); `--documents` leaves the fit so many
documents per domain, `--whole` mixes whole models. Scored on the `select` split (the numbers of demo and README come from the
`report` split): gap closed, mean over the four domains, with the oracle (own expert forced) at 1.0; then the loss on the unseen
domain relative to the base's, the seconds that setting the router took, and the cross-entropy of the domain per token, mean
over routers. Last, where in a text a variant loses what it loses.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel

from modekit.building.build import build
from modekit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from modekit.demo.models import SEQUENCE_LENGTH
from modekit.demo.text import DOMAINS, UNSEEN
from modekit.evaluation.domains import Domain, held_out_domains
from modekit.evaluation.loss import score_domain
from modekit.loaded.load import load_model
from modekit.loaded.shapes import mixture_of
from modekit.planning.make import make_plan
from modekit.recipes.edit import changed_mixture, with_mixture
from modekit.recipes.fits import FITS
from modekit.recipes.read import parse_recipe
from modekit.routing.refit import refit
from modekit.text.sequences import make_batches
from modekit.text.splits import HeldOutSplit, split_of

EVAL_TOKENS = 16_384
PLACES = ((0, 4), (4, 16), (16, 64), (64, SEQUENCE_LENGTH))


def context(*decays: float, **router: Any) -> dict[str, Any]:
    """A change to a context router with these decays."""
    return {"router": {"granularity": "context", "decay": list(decays), **router}}


def fit(name: str, **router: Any) -> dict[str, Any]:
    """A change to another fit."""
    return {"router": {"fit": name, **router}}


VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "context": {
        "token": {},
        "token, 16,384 tokens per domain": {"router": {"tokens_per_domain": 16_384}},
        "context 0.9": context(0.9),
        "context 0.9, 16,384 tokens per domain": context(0.9, tokens_per_domain=16_384),
        "context 0.8": context(0.8),
        "context 0.95": context(0.95),
        "context 1 (mean so far)": context(1.0),
        "context 0 and 0.9": context(0.0, 0.9),
        "context 0.8 and 0.97": context(0.8, 0.97),
        "context 0.9, l2 0.01": context(0.9, l2=0.01),
        "context 0.9, ridge": context(0.9, fit="ridge"),
        "context 0.9, top_k 4": {**context(0.9), "top_k": 4},
        "context 0.9, top_k 1": {**context(0.9), "top_k": 1},
        "sequence, prefix 16": {"router": {"granularity": "sequence", "prefix": 16}},
        "sequence, prefix 64": {"router": {"granularity": "sequence", "prefix": 64}},
    },
    "adapters": {
        "random (noisy)": fit("random"),
        "arrow": fit("arrow"),
        "spectr": fit("spectr"),
        "seqr": fit("seqr"),
        "arrow, context 0.9": fit("arrow", granularity="context"),
        "seqr, context 0.9": fit("seqr", granularity="context"),
        "phatgoose, 100 steps": fit("phatgoose"),
        "centroid": fit("centroid"),
        "lda": fit("lda"),
        "ridge": fit("ridge"),
        "logistic": fit("logistic"),
        "ridge, context 0.9": fit("ridge", granularity="context"),
        "logistic, context 0.9": fit("logistic", granularity="context"),
        "logistic, sequence": fit("logistic", granularity="sequence"),
    },
    "auto": {
        "lexical": fit("lexical"),
        "lexical, top-1": {**fit("lexical"), "top_k": 1},
        "lexical, tokens and pairs": fit("lexical", orders=[1, 2]),
        "lexical, tokens and pairs, top-1": {**fit("lexical", orders=[1, 2]), "top_k": 1},
        "n-gram": fit("ngram"),
        "n-gram, top-1": {**fit("ngram"), "top_k": 1},
        "logistic": {},
        "logistic, top-1": {"top_k": 1},
        "logistic, context 0.9": context(0.9),
    },
    "no text": {
        "linear": {"method": "linear"},
        "random": fit("random"),
        "random, top-1": {**fit("random"), "top_k": 1},
        **{name: fit(name) for name in ("arrow", "spectr", "seqr")},
        **{f"{name}, context 0.9": fit(name, granularity="context") for name in ("arrow", "spectr", "seqr")},
    },
}
BY_PLACE = {"context": ("token", "context 0.9", "context 1 (mean so far)"), "adapters": ("logistic", "logistic, context 0.9")}

BY_TEXT = ("lexical", "ngram")
"""Fits that decide for whole models."""
Losses = dict[str, list[torch.Tensor]]
"""Domain -> loss of every predicted token, per text."""


def run_seed(folder: Path, what: str, split: HeldOutSplit, tokens: int, only: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Row -> gap closed per domain, loss relative to the base's of the unseen one, seconds, and what is lost by place."""
    checkpoint = _built(folder)
    shown = {each.name: each for which in ("report", split) for each in _held_out(checkpoint, which, tokens)}
    held_out = [shown[name] for name in (*DOMAINS, UNSEEN)]  # nothing chose by the unseen one, whose split is report alone
    base = losses_of(load_model(folder / "base"), held_out)
    own: Losses = {}
    mixture = load_model(checkpoint.folder)
    for domain in held_out:
        if domain.expert is not None:
            with mixture_of(mixture, checkpoint).forced(domain.expert):
                own |= losses_of(mixture, [domain])
    rows: dict[str, dict[str, Any]] = {}
    for name, changes in VARIANTS[what].items():
        if (only and name not in only) or (_is_whole(folder) and changes.get("router", {}).get("fit") not in BY_TEXT):
            continue
        started = time.perf_counter()
        router = {"fit": "logistic", **changes.get("router", {})}
        read = {"router": {**_reading(folder, router["fit"]), **router}} if changes.get("method") != "linear" else {}
        refitted = refit(_built(folder), {**changes, **read})
        seconds = time.perf_counter() - started
        model = load_model(refitted.folder)
        losses = losses_of(model, held_out)
        gaps = {
            domain: (_sum(base[domain]) - _sum(losses[domain])) / (_sum(base[domain]) - _sum(own[domain])) for domain in own
        }
        rows[name] = {**gaps, UNSEEN: _sum(losses[UNSEEN]) / _sum(base[UNSEEN]), "seconds": seconds}
        rows[name]["entropy"] = cross_entropy(model, refitted, held_out) if read else math.log(len(own))
        rows[name]["lost"] = [_lost(base, own, losses, *place) for place in PLACES]
        figures = f"{statistics.fmean(gaps.values()):.4f}, cross-entropy {rows[name]['entropy']:.3f} ({seconds:.0f} s)"
        print(f"{folder.name} {name}: {figures}", flush=True)
    return rows


def _held_out(checkpoint: Checkpoint, split: HeldOutSplit, tokens: int) -> Sequence[Domain]:
    return held_out_domains(checkpoint, tokens_per_domain=tokens, sequence_length=SEQUENCE_LENGTH, split=split)


def cross_entropy(model: PreTrainedModel, checkpoint: Checkpoint, domains: Sequence[Domain]) -> float:
    """What a token costs the router in naming the domain, in nats: mean over routers, tokens, and then domains."""
    found: list[float] = []
    with torch.inference_mode():
        for domain in (each for each in domains if each.expert is not None):
            costs = []
            for batch in make_batches(domain.sequences):
                with mixture_of(model, checkpoint).traced() as trace:
                    model(input_ids=batch.input_ids, attention_mask=batch.mask.long(), use_cache=False)
                    said = [logits.reshape(*batch.mask.shape, -1).float().log_softmax(-1) for logits in trace]
                costs.append(torch.stack([-each[batch.mask.bool()][:, domain.expert] for each in said]).mean(0))
            found.append(float(torch.cat(costs).mean()))
    return statistics.fmean(found)


def prepared(folder: Path, documents: int | None, whole: bool) -> Path:
    """A folder beside the seed's with a recipe of the same models: with so many documents for the fit, and of whole models."""
    if documents is None and not whole:
        return folder
    recipe, home = yaml.safe_load((folder / "logistic.yaml").read_text()), folder / f"auto-{documents or 'all'}-{whole}"
    home.mkdir(exist_ok=True)
    recipe["base_model"] = f"../{recipe['base_model']}"
    for expert in recipe["experts"]:
        which = "model" if "model" in expert else "adapter"
        expert[which] = f"../{expert[which]}"
        lines = (folder / expert["text"]).read_text().splitlines()
        splits = [split_of(json.loads(line)["text"]) for line in lines]
        fit_lines = [line for line, split in zip(lines, splits, strict=True) if split == "fit"][:documents]
        kept = [*fit_lines, *(line for line, split in zip(lines, splits, strict=True) if split != "fit")]
        expert["text"] = f"./{expert['name']}.jsonl"
        (home / expert["text"]).write_text("\n".join(kept) + "\n")
    recipe["eval"] = {name: f"../{path}" for name, path in recipe["eval"].items()}
    if whole:
        recipe["mixture"]["modules"] = "all"
    (home / "logistic.yaml").write_text(yaml.safe_dump(recipe))
    (home / "base").exists() or (home / "base").symlink_to(folder / "base")
    return home


def _built(folder: Path) -> Checkpoint:
    """The mixture with a random router: every variant starts from it, so that none sees what another has set."""
    recipe = yaml.safe_load((folder / "logistic.yaml").read_text())
    mixture = changed_mixture(recipe["mixture"], {"router": {"fit": "lexical" if _is_whole(folder) else "random"}})
    out = folder / "routers"
    parsed = parse_recipe({**with_mixture(recipe, mixture), "output": {"format": "modekit"}})
    if out.exists() and open_checkpoint(out).record.recipe_digest == parsed.digest():
        return open_checkpoint(out)
    return build(make_plan(parsed, folder), out, overwrite=True)


def _is_whole(folder: Path) -> bool:
    return yaml.safe_load((folder / "logistic.yaml").read_text())["mixture"].get("modules") == "all"


def _reading(folder: Path, fit: str) -> dict[str, Any]:
    """How the demo's own router reads text, as far as this fit reads any."""
    router = yaml.safe_load((folder / "logistic.yaml").read_text())["mixture"].get("router", {})
    return {key: value for key, value in router.items() if key in FITS[fit].settings}


def mean_losses(model: PreTrainedModel, domains: Sequence[Domain]) -> dict[str, float]:
    """Domain -> mean loss of its tokens, in nats."""
    return {domain.name: score_domain(model, domain, lambda _: None).loss for domain in domains}


def losses_of(model: PreTrainedModel, domains: Sequence[Domain]) -> Losses:
    losses: Losses = {}
    with torch.inference_mode():
        for domain in domains:
            losses[domain.name] = []
            for batch in make_batches(domain.sequences):
                logits = model(input_ids=batch.input_ids, attention_mask=batch.mask.long(), use_cache=False).logits[:, :-1]
                rows = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), batch.input_ids[:, 1:].flatten(), reduction="none"
                )
                lengths = batch.mask.sum(1).tolist()
                losses[domain.name] += [
                    row[: length - 1] for row, length in zip(rows.view(logits.shape[:2]), lengths, strict=True)
                ]
    return losses


def _sum(texts: Sequence[torch.Tensor], first: int = 0, last: int | None = None) -> float:
    return float(sum(text[first:last].double().sum() for text in texts))


def _lost(base: Losses, own: Losses, losses: Losses, first: int, last: int) -> float:
    """What a variant loses to the oracle on the tokens at these places, as a share of the whole gap; mean over domains."""
    return statistics.fmean(
        (_sum(losses[domain], first, last) - _sum(own[domain], first, last)) / (_sum(base[domain]) - _sum(own[domain]))
        for domain in own
    )


def table(per_seed: list[dict[str, dict[str, Any]]]) -> str:
    lines = [f"| router | gap closed | {' | '.join(DOMAINS)} | {UNSEEN} / base | seconds | cross-entropy |"]
    lines.append("|---" * (len(DOMAINS) + 5) + "|")
    for name in per_seed[0]:
        rows = [seed[name] for seed in per_seed]
        means = [statistics.fmean(row[domain] for domain in DOMAINS) for row in rows]
        spread = f" ± {max(abs(mean - statistics.fmean(means)) for mean in means):.3f}" if len(rows) > 1 else ""
        cells = [f"{statistics.fmean(row[domain] for row in rows):.2f}" for domain in DOMAINS]
        cells += [f"{statistics.fmean(row[UNSEEN] for row in rows):.3f}", f"{statistics.fmean(r['seconds'] for r in rows):.0f}"]
        cells.append(f"{statistics.fmean(row['entropy'] for row in rows):.3f}")
        lines.append(f"| {name} | {statistics.fmean(means):.3f}{spread} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table_by_place(per_seed: list[dict[str, dict[str, Any]]], names: Sequence[str]) -> str:
    places = [f"tokens {first + 1} to {last}" for first, last in PLACES]
    lines = [f"| lost of the gap | {' | '.join(places)} |", "|---" * (len(places) + 1) + "|"]
    for name in names:
        lost = [statistics.fmean(seed[name]["lost"][place] for seed in per_seed) for place in range(len(PLACES))]
        lines.append(f"| {name} | {' | '.join(f'{share:.3f}' for share in lost)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("what", choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--split", choices=["select", "report"], default="select")
    parser.add_argument("--tokens", type=int, default=EVAL_TOKENS, help="per domain, to score")
    parser.add_argument("--documents", type=int, help="per domain, for the fit")
    parser.add_argument("--whole", action="store_true", help="mix whole models")
    parser.add_argument("--only", nargs="*", default=[], help="variants, by name")
    arguments = parser.parse_args()
    per_seed = []
    for seed in range(arguments.seeds):
        folder = prepared(arguments.demo.resolve() / f"seed{seed}", arguments.documents, arguments.whole)
        per_seed.append(run_seed(folder, arguments.what, arguments.split, arguments.tokens, arguments.only))
    print(table(per_seed))
    if arguments.what in BY_PLACE:
        print()
        print(table_by_place(per_seed, BY_PLACE[arguments.what]))


if __name__ == "__main__":
    main()
