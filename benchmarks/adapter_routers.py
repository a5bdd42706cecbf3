"""Every router fit on a mixture of low-rank experts, in one table: adapter_routers.md.

    modekit demo --adapters --out demo-adapters --seeds 3
    python benchmarks/adapter_routers.py demo-adapters --seeds 3

For each seed of the demo the mixture `routing` is built once and its router set anew by every fit, as `modekit fit` does it.
Scored on the `select` split (the numbers of demo and README come from the `report` split): gap closed, mean over the four
domains, with the oracle (own expert forced) at 1.0; the last columns are the loss on the unseen domain relative to the
base's, and the seconds that setting the router took.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import yaml

from modekit.build import build
from modekit.checkpoint import Checkpoint, open_checkpoint
from modekit.demo.models import SEQUENCE_LENGTH
from modekit.demo.text import DOMAINS, UNSEEN
from modekit.evaluate import Domain, held_out_domains, score_domain
from modekit.models import forced_expert, load_model
from modekit.plan import make_plan
from modekit.recipe import parse_recipe
from modekit.routing.fit import refit

EVAL_TOKENS = 8_192
CONTEXT = {"granularity": "context"}
VARIANTS: dict[str, dict[str, Any]] = {
    "random (noisy)": {"fit": "random"},
    "arrow": {"fit": "arrow"},
    "spectr": {"fit": "spectr"},
    "seqr": {"fit": "seqr"},
    "arrow, context": {"fit": "arrow", **CONTEXT},
    "seqr, context": {"fit": "seqr", **CONTEXT},
    "phatgoose, 100 steps": {"fit": "phatgoose"},
    "centroid": {"fit": "centroid"},
    "lda": {"fit": "lda"},
    "ridge": {"fit": "ridge"},
    "logistic": {"fit": "logistic"},
    "ridge, context": {"fit": "ridge", **CONTEXT},
    "logistic, context": {"fit": "logistic", **CONTEXT},
    "logistic, sequence": {"fit": "logistic", "granularity": "sequence"},
}


def run_seed(folder: Path) -> dict[str, dict[str, float]]:
    """Row -> gap closed per domain, loss relative to the base's of the unseen one, and seconds."""
    checkpoint = _built(folder)
    held_out = held_out_domains(checkpoint, tokens_per_domain=EVAL_TOKENS, sequence_length=SEQUENCE_LENGTH, split="select")
    base = {domain.name: score_domain(load_model(folder / "base"), domain, print_nothing).loss for domain in held_out}
    mixture = load_model(checkpoint.folder)
    own = {}
    for domain in held_out:
        if domain.expert is not None:
            with forced_expert(mixture, checkpoint, domain.expert):
                own[domain.name] = score_domain(mixture, domain, print_nothing).loss
    rows = {}
    for name, router in VARIANTS.items():
        started = time.perf_counter()
        # Each variant from the same start: what only the one before it set must not reach this one.
        refitted = refit(_built(folder), {"router": router})
        seconds = time.perf_counter() - started
        rows[name] = {**_scores(refitted, held_out, base, own), "seconds": seconds}
        print(f"{folder.name} {name}: {statistics.fmean(rows[name][d] for d in DOMAINS):.3f} ({seconds:.0f} s)", flush=True)
    return rows


def _built(folder: Path) -> Checkpoint:
    recipe = yaml.safe_load((folder / "routing.yaml").read_text())
    recipe["mixture"]["router"] = {**recipe["mixture"]["router"], "fit": "random", "keep_tokens": 32_768}
    out = folder / "routers"
    parsed = parse_recipe(recipe)
    if out.exists() and open_checkpoint(out).record.recipe_digest == parsed.digest():
        return open_checkpoint(out)
    return build(make_plan(parsed, folder), out, overwrite=True)


def _scores(checkpoint: Checkpoint, held_out: list[Domain], base: dict[str, float], own: dict[str, float]) -> dict[str, float]:
    model = load_model(checkpoint.folder)
    scores = {}
    for domain in held_out:
        loss, dense = score_domain(model, domain, print_nothing).loss, base[domain.name]
        scores[domain.name] = (dense - loss) / (dense - own[domain.name]) if domain.name in own else loss / dense
    return scores


def print_nothing(_done: int) -> None:
    """No progress."""


def table(per_seed: list[dict[str, dict[str, float]]]) -> str:
    lines = [f"| fit | gap closed | {' | '.join(DOMAINS)} | {UNSEEN} / base | seconds |", "|---" * (len(DOMAINS) + 4) + "|"]
    for name in per_seed[0]:
        rows = [seed[name] for seed in per_seed]
        means = [statistics.fmean(row[domain] for domain in DOMAINS) for row in rows]
        spread = f" ± {max(abs(mean - statistics.fmean(means)) for mean in means):.3f}" if len(rows) > 1 else ""
        cells = [f"{statistics.fmean(row[domain] for row in rows):.2f}" for domain in DOMAINS]
        cells += [f"{statistics.fmean(row[UNSEEN] for row in rows):.3f}", f"{statistics.fmean(r['seconds'] for r in rows):.0f}"]
        lines.append(f"| {name} | {statistics.fmean(means):.3f}{spread} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    per_seed = []
    for seed in range(arguments.seeds):
        per_seed.append(run_seed(arguments.demo.resolve() / f"seed{seed}"))
        (arguments.demo / "results" / "adapter_routers.json").write_text(json.dumps(per_seed, indent=1))
    print(table(per_seed))


if __name__ == "__main__":
    main()
