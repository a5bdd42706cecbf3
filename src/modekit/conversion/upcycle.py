"""`modekit upcycle BASE OUT`: a dense model as a mixture in its family's native architecture, with the same logits.

Every expert is the base's FFN, under a random gate (sparse upcycling, arXiv 2212.05055).
Weights of the chosen experts must sum to 1: a softmax before top-k, without dividing by the sum, changes the model
(Skywork-MoE, arXiv 2406.06563). What is written is a recipe's checkpoint, whose experts are all the base: train, inspect and
eval take it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from modekit.building.build import build
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.recipes.strict import BASE, RecipeData
from modekit.run import QUIET, Run


@dataclass(frozen=True)
class Upcycling:
    """What is asked for: `copies` of the FFN, `top_k` copies per token, a gate drawn from `seed`.

    `overwrite`: whether another result may go.
    """

    copies: int = 4
    top_k: int = 2
    seed: int = 0
    overwrite: bool = False

    def recipe(self, base: str) -> RecipeData:
        """Of the mixture."""
        experts = [{"name": f"copy-{copy + 1}", "model": BASE} for copy in range(self.copies)]
        router = {"fit": "random", "seed": self.seed}
        mixture = {"method": "routing", "top_k": self.top_k, "router": router}
        return {"base_model": base, "experts": experts, "mixture": mixture, "output": {"format": "plain"}}


def upcycle(base: str, asked: Upcycling, out: Path, *, root: Path, run: Run = QUIET) -> Checkpoint:
    """Write the mixture of a model that is named as in a recipe, relative to `root`.

    Raises what `build` raises, UnsupportedError for a family without a plain one.
    """
    recipe = parse_recipe(asked.recipe(base), where="modekit upcycle")
    return build(make_plan(recipe, root, run=run), out, overwrite=asked.overwrite, run=run)
