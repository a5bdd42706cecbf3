"""What a search costs against scoring every candidate from scratch, and what it finds: tune.md.

    modekit demo --out demo --seeds 3
    python benchmarks/tune.py demo --seeds 3

Per seed: `modekit tune` on the demo's models; then each of its candidates alone, as a user would without it (build with its
fit, load, score on the same select text). Of the candidates every n-th is done from scratch (`--every`, 1 for all), and the sum
is scaled up.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import yaml

from modekit.building.build import build
from modekit.loaded.load import load_model
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.recipes.recipe import Recipe
from modekit.search.tune.results import Candidate, TuneSettings, describe, mean_of
from modekit.search.tune.selection import losses_of, read_selections
from modekit.search.tune.study import candidate_recipe
from modekit.search.tune.tune import tune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=8_192)
    parser.add_argument("--every", type=int, default=4)
    options = parser.parse_args()
    for seed in range(options.first, options.first + options.seeds):
        folder = (options.demo / f"seed{seed}").resolve()
        raw = yaml.safe_load((folder / "linear.yaml").read_text()) | {"mixture": {}, "output": {}}
        recipe = parse_recipe(raw)
        out = folder / "tuned"
        for path in (out, out.with_name("tuned.tuning")):
            shutil.rmtree(path, ignore_errors=True)
        settings = TuneSettings(trials=options.trials, tokens_per_domain=options.tokens)
        started = time.perf_counter()
        results = tune(recipe, folder, out, settings=settings)
        whole = time.perf_counter() - started
        search = results.seconds
        scored = [each for each in results.candidates if each.status != "refused"]
        sample = scored[:: options.every]
        seconds = [from_scratch(recipe, folder, each, options.tokens) for each in sample]
        scratch = sum(seconds) * len(scored) / len(sample)
        named = {each.name: each.report.mean_loss for each in results.candidates if each.name and each.report is not None}
        best_fixed = min(named, key=lambda name: named[name])
        best = results.best.report
        assert best is not None
        line = {
            "seed": seed,
            "candidates": len(scored),
            "dropped": len([e for e in scored if e.status == "dropped"]),
            "search_seconds": search,
            "with_report_and_build": whole,
            "scratch_seconds": scratch,
            "share": search / scratch,
            "best": results.best.description,
            "best_report": best.mean_loss,
            "best_gap_closed": best.gap_closed,
            "best_fixed": best_fixed,
            "best_fixed_report": named[best_fixed],
        }
        print(json.dumps(line), flush=True)


def from_scratch(recipe: Recipe, folder: Path, candidate: Candidate, tokens: int) -> float:
    """Seconds of one candidate alone; fully scored ones must come to the same loss."""
    started = time.perf_counter()
    out = folder / "from-scratch"
    plan = make_plan(candidate_recipe(recipe, candidate.mixture), folder)
    build(plan, out, overwrite=True)
    bases = [source.folder for source in plan.sources]
    select = read_selections(recipe, folder, bases, tokens_per_domain=tokens, sequence_length=512)["select"]
    losses = losses_of(load_model(out), select.domains, "from scratch")
    seconds = time.perf_counter() - started
    shutil.rmtree(out)
    worst = max(abs(losses[name] - loss) for name, loss in candidate.losses.items())
    same = f"within {worst:.1e} of the search's" if candidate.status == "scored" else "dropped in the search"
    print(f"{seconds:6.1f} s  {mean_of(losses):.5f}  {same}  {describe(candidate.mixture)}", flush=True)
    return seconds


if __name__ == "__main__":
    main()
