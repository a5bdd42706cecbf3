"""Full fine-tunes kept within a budget: gap closed against bytes, expert_budget.md.

    python benchmarks/expert_budget.py train FOLDER --seeds 0 1 2       base and four full fine-tunes, as `modekit demo --full`
    python benchmarks/expert_budget.py ways FOLDER --seeds 0            ways to store a difference, own expert forced
    python benchmarks/expert_budget.py mixtures FOLDER --seeds 0 1 2    mixtures that `modekit build` makes, lexical router

All are scored on the report split. `train` keeps models that are there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from modekit.building.build import build
from modekit.demo.kinds import SMALL
from modekit.demo.models import SEQUENCE_LENGTH, make_base
from modekit.demo.text import DOMAINS, UNSEEN, unpack_text
from modekit.evaluation.evaluate import evaluate
from modekit.evaluation.results import Results
from modekit.experts.specialize import specialize
from modekit.files.output import is_there
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.run import QUIET

EVAL_TOKENS = 8_192
VARIANTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "0.25x": {"as": "lora", "budget": 0.25},
    "0.125x": {"as": "lora", "budget": 0.125},
    "0.125x of bfloat16": {"as": "lora", "budget": 0.125, "dtype": "bfloat16"},
    "0.0625x": {"as": "lora", "budget": 0.0625},
    "0.03125x": {"as": "lora", "budget": 0.03125},
}
"""How each of the four experts is kept."""


def train(folder: Path, seed: int) -> None:
    """Base and experts of one seed."""
    texts, home = unpack_text(folder / "text"), folder / f"seed{seed}"
    home.mkdir(parents=True, exist_ok=True)
    if not is_there(home / "base"):
        make_base(home / "base", texts, steps=SMALL.base_steps, seed=seed, run=QUIET)
    for place, name in enumerate(DOMAINS):
        if not is_there(home / name):
            training = SMALL.expert_training.with_(seed=1000 * seed + place)
            specialize(home / "base", home / name, [str(texts[name])], root=home, train="full", training=training, run=QUIET)


def mixtures(folder: Path, seed: int, only: str) -> dict[str, dict[str, float]]:
    """Variant -> parameters over the base's, gap closed by the mixture and with the own expert forced."""
    home, found, known = folder / f"seed{seed}", dict[str, dict[str, float]](), list[Results]()
    for name, kept in VARIANTS.items():
        if only and name not in only.split(","):
            continue
        plan = make_plan(parse_recipe(recipe(kept), where=name), home)
        checkpoint = build(plan, home / f"mixture-{name.replace(' ', '-')}", overwrite=True)
        said = evaluate(
            checkpoint, tokens_per_domain=EVAL_TOKENS, sequence_length=SEQUENCE_LENGTH, known=known[0] if known else None
        )
        known.append(said)
        itemsize = 2 if "bfloat16" in name else 4
        size = sum(ref.nbytes for ref in checkpoint.tensors.values())
        found[name] = {
            "total bytes over the base's": size / (itemsize * checkpoint.record.dense_parameters),
            "mixture": said.row("mixture").mean_gap(DOMAINS) or 0.0,
            "forced": said.row("oracle").mean_gap(DOMAINS) or 0.0,
        }
        print(f"seed {seed}, {name}: {found[name]}", flush=True)
    return found


def recipe(kept: dict[str, Any]) -> dict[str, Any]:
    """Four full fine-tunes under a lexical router that decides for the whole model."""
    output = {"format": "modekit", "dtype": kept.get("dtype", "source")}
    low = {key: value for key, value in kept.items() if key != "dtype"}
    experts = [{"name": name, "model": f"./{name}", "text": f"../text/{name}.jsonl", **low} for name in DOMAINS]
    mixture = {"modules": "all", "top_k": 2, "router": {"fit": "lexical"}}
    seen = {UNSEEN: f"../text/{UNSEEN}.jsonl"}
    return {"base_model": "./base", "experts": experts, "mixture": mixture, "output": output, "eval": seen}


def main() -> None:
    """Run a part of the study."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=["train", "ways", "mixtures"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", default="", help="Names of variants, separated by commas.")
    said = parser.parse_args()
    for seed in said.seeds:
        if said.part == "train":
            train(said.folder.resolve(), seed)
        elif said.part == "mixtures":
            mixtures(said.folder.resolve(), seed, said.only)


if __name__ == "__main__":
    main()
