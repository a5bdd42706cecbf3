"""What training adds to a mixture, and the paper's ablation in miniature: training.md.

    modekit demo --out demo --seeds 3
    python benchmarks/training.py targets demo --seeds 3         FFN specialists
    modekit demo full --out demo-full
    python benchmarks/training.py full demo-full                 ordinary fine-tunes, 5 % of their text
    python benchmarks/training.py ablation demo-full             method x backbone x top_k, by domain

Every variant is built, fitted and trained as the command line does it, in a folder of its own beside the demo's models;
what is there is kept. Scored on the `report` split: gap closed per domain and their mean, the loss on the unseen domain
relative to the base's, and the seconds of the training (everything but the tables).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from modekit.building.build import build
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.demo.text import DOMAINS, UNSEEN
from modekit.evaluation.domains import Domain, held_out_domains, score_domain
from modekit.loaded.experts import load_expert_source
from modekit.loaded.load import load_model
from modekit.planning.make import make_plan
from modekit.recipes.fits import FITS
from modekit.recipes.read import parse_recipe
from modekit.training.settings import TrainSettings, checked_settings
from modekit.training.train import train

TOKENS = 16_384
FIT = {"tokens_per_domain": 131_072, "keep_tokens": 16_384}
TOP2 = {"method": "routing", "top_k": 2}
TOKEN = {**TOP2, "router": FIT}
CONTEXT = {**TOP2, "router": {**FIT, "granularity": "context"}}
LEXICAL = {**TOP2, "router": {"fit": "lexical", "orders": [1, 2]}}

FULL = {"steps": 150, "batch_tokens": 3072, "learning_rate": 6e-3, "patience": 8}
ATTENTION = {
    **FULL,
    "what": ["routers", "attention"],
    "steps": 180,
    "learning_rate": 3e-3,
    "backbone_learning_rate": 2e-3,
    "weight_decay": 0.01,
}
ROBUST = {
    **ATTENTION,
    "losses": {"lm": 1.0, "label": 0.1},
    "randomise": 0.2,
    "generic": ["../text/general.jsonl"],
    "generic_share": 0.1,
}
FIVE_PERCENT = {
    "what": ["routers", "attention", "embeddings", "head", "norms"],
    "losses": {"forward_kl": 1.0},
    "share": 0.05,
    "steps": 240,
    "batch_tokens": 3072,
    "learning_rate": 1e-3,
    "backbone_learning_rate": 3e-3,
    "patience": 6,
}

Variant = tuple[dict[str, Any], dict[str, Any] | None]
"""What the recipe says of the mixture, and the settings of its training."""

TARGETS: dict[str, Variant] = {
    "token": (TOKEN, None),
    "token, routers": (TOKEN, FULL),
    "token, routers and attention": (TOKEN, ATTENTION),
    "context": (CONTEXT, None),
    "context, routers": (CONTEXT, FULL),
    "lexical": (LEXICAL, None),
    "lexical, routers": (LEXICAL, {**FULL, "learning_rate": 1e-3}),
    "lexical, routers and attention": (LEXICAL, ATTENTION),
    "token, routers and attention, domain randomisation": (TOKEN, ROBUST),
}
AVERAGE = {**LEXICAL, "backbone": "average"}
MOST = {**AVERAGE, "modules": ["q", "k", "v", "o", "mlp"]}
FIVE: dict[str, Variant] = {
    "FFN experts, average": (AVERAGE, None),
    "FFN experts, average, distill, 480 steps": (AVERAGE, {**FIVE_PERCENT, "steps": 480}),
    "FFN experts, average, distill, all text": (AVERAGE, {**FIVE_PERCENT, "share": 1.0}),
    "FFN experts, average, lm": (AVERAGE, {**FIVE_PERCENT, "losses": {"lm": 1.0}}),
    "FFN experts, average, lm and distill": (AVERAGE, {**FIVE_PERCENT, "losses": {"lm": 0.5, "forward_kl": 1.0}}),
    "FFN experts, average, distill": (AVERAGE, FIVE_PERCENT),
    "FFN experts, average, distill, token router": ({**TOKEN, "backbone": "average"}, FIVE_PERCENT),
    "attention and FFN experts, average": (MOST, None),
    "attention and FFN experts, average, distill": (
        MOST,
        {**FIVE_PERCENT, "what": ["embeddings", "head", "norms"], "learning_rate": None},
    ),
    "whole models": ({**LEXICAL, "modules": "all"}, None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["targets", "full", "ablation"])
    parser.add_argument("demo", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--only", nargs="*", help="only variants whose names begin so")
    options = parser.parse_args()
    for seed in range(options.first, options.first + options.seeds):
        folder = (options.demo / f"seed{seed}").resolve()
        variants = {"targets": TARGETS, "full": FIVE, "ablation": ablation()}[options.table]
        for name, variant in variants.items():
            if options.only and not any(name.startswith(start) for start in options.only):
                continue
            result(folder, name, variant)
    print_table(options.demo, options.table, list({"targets": TARGETS, "full": FIVE, "ablation": ablation()}[options.table]))


def ablation() -> dict[str, Variant]:
    """Linear, noisy, centroid, trained routers, trained routers and attention x backbone x top_k."""
    short = {"steps": 30, "batch_tokens": 3072, "learning_rate": 6e-3, "evaluate_every": 10, "select_tokens": 4096}
    more = {**short, "what": ["routers", "attention"], "backbone_learning_rate": 2e-3, "weight_decay": 0.01}
    few = {"tokens_per_domain": 16_384}
    variants: dict[str, Variant] = {}
    for backbone in ("base", "average", {"expert": "medicine"}):
        named = backbone if isinstance(backbone, str) else "medicine's"
        variants[f"linear | {named} | 4"] = ({"method": "linear", "backbone": backbone}, None)
        for top_k in (1, 2, 4):
            mixture = {"method": "routing", "top_k": top_k, "backbone": backbone}
            for name, fit in (("noisy", "random"), ("centroid", "centroid")):
                router = {"fit": fit, **(few if FITS[fit].reads_text else {})}
                variants[f"{name} | {named} | {top_k}"] = ({**mixture, "router": router}, None)
            trained = {**mixture, "router": {"fit": "logistic", **few}}
            variants[f"trained routers | {named} | {top_k}"] = (trained, short)
            variants[f"trained routers and attention | {named} | {top_k}"] = (trained, more)
    return variants


def result(folder: Path, name: str, variant: Variant) -> dict[str, Any]:
    """Scores of one variant of one seed, from its file if it is there."""
    mixture, training = variant
    work = folder / "training" / name.replace(" ", "-").replace(",", "").replace("|", "").replace("'", "")
    path = work.with_suffix(".json")
    if path.exists():
        return dict(json.loads(path.read_text()))
    recipe = yaml.safe_load((folder / "linear.yaml").read_text()) | {"mixture": mixture, "output": {}}
    started = time.perf_counter()
    checkpoint = build(make_plan(parse_recipe(recipe), folder), work, overwrite=True)
    seconds = time.perf_counter() - started
    notes: list[str] = []
    steps = 0
    if training is not None:
        values = {key: value for key, value in training.items() if value is not None}
        started = time.perf_counter()
        done = train(checkpoint, checked_settings(values, TrainSettings, where=name), root=folder, evaluate_tokens=None)
        seconds = time.perf_counter() - started
        checkpoint, notes, steps = done.checkpoint, list(done.record.notes), done.record.steps
    domains = held_out_domains(checkpoint, tokens_per_domain=TOKENS, sequence_length=512)
    data = {**scores(checkpoint, domains, reference(folder, checkpoint, domains)), "seconds": seconds, "notes": notes}
    path.write_text(json.dumps({**data, "steps": steps, "settings": training, "mixture": mixture}, indent=1))
    print(f"{folder.name}  {name:<52} {data['gap']:.3f}  {data['unseen']:.3f}  {seconds:6.0f} s", flush=True)
    return data


def reference(folder: Path, checkpoint: Checkpoint, domains: Sequence[Domain]) -> dict[str, dict[str, float]]:
    """Loss of the base and of each domain's own expert, once per seed."""
    path = folder / "training" / "reference.json"
    if not path.exists():
        base = load_model((checkpoint.folder / checkpoint.record.sources[0].folder).resolve())
        losses = {"base": {domain.name: score_domain(base, domain, lambda _: None).loss for domain in domains}, "own": {}}
        for domain in domains:
            if domain.expert is not None:
                own = load_expert_source(checkpoint, domain.expert)
                assert own is not None
                losses["own"][domain.name] = score_domain(own, domain, lambda _: None).loss
        path.write_text(json.dumps(losses))
    return dict(json.loads(path.read_text()))


def scores(checkpoint: Checkpoint, domains: Sequence[Domain], known: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Gap closed per domain, mean gap, and the unseen loss relative to the base's."""
    model = load_model(checkpoint.folder)
    losses = {domain.name: score_domain(model, domain, lambda _: None).loss for domain in domains}
    base, own = known["base"], known["own"]
    gaps = {name: (base[name] - losses[name]) / (base[name] - own[name]) for name in DOMAINS}
    return {"gaps": gaps, "gap": statistics.fmean(gaps.values()), "unseen": losses[UNSEEN] / base[UNSEEN], "losses": losses}


def print_table(demo: Path, table: str, names: Sequence[str]) -> None:
    """Markdown of what is there, mean over seeds and largest deviation."""
    print(f"\n| variant | seeds | gap closed | {' | '.join(DOMAINS)} | {UNSEEN} / base | seconds |")
    print("|" + " --- |" * (len(DOMAINS) + 5))
    for name in names:
        stem = name.replace(" ", "-").replace(",", "").replace("|", "").replace("'", "")
        files = sorted(demo.glob(f"seed*/training/{stem}.json"))
        found = [json.loads(path.read_text()) for path in files]
        if not found:
            continue
        gap = statistics.fmean(each["gap"] for each in found)
        spread = max(abs(each["gap"] - gap) for each in found)
        shown = f" ± {spread:.3f}" if len(found) > 1 else ""
        cells = [f"{statistics.fmean(each['gaps'][domain] for each in found):.2f}" for domain in DOMAINS]
        unseen = statistics.fmean(each["unseen"] for each in found)
        seconds = statistics.fmean(each["seconds"] for each in found)
        print(f"| {name} | {len(found)} | {gap:.3f}{shown} | {' | '.join(cells)} | {unseen:.3f} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
