"""One dense model of a mixture of four FFN specialists: densify.md.

    python benchmarks/whole.py train FOLDER --kind ffn --seeds 0 1 2      base and four experts, as `modekit demo` has
    python benchmarks/densify.py FOLDER --seeds 0 1 2 --only merges       weights alone: average, sums, best expert
    python benchmarks/densify.py FOLDER --seeds 0 1 2 --only distil       the best of them, distilled from the mixture
    python benchmarks/densify.py FOLDER --seeds 0 1 2 --only teacher      the same with none, a quarter or all of the teacher

Gap closed on the report split, mean over the four domains.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedModel

from modekit.building.build import build
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.conversion.densify import Densify, course_of, densify
from modekit.conversion.merges import Merge, Merger
from modekit.demo.text import DOMAINS
from modekit.evaluation.domains import Domain, held_out_domains
from modekit.loaded.experts import load_expert_source
from modekit.loaded.load import load_model
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.run import QUIET
from study import mean_losses
from whole import recipe

COURSE = {"batch_tokens": 3_072, "learning_rate": 2e-3, "select_tokens": 512}
NATIVE = {"output": {"format": "plain"}}
WHOLE = {"modules": "all", "output": {"format": "modekit"}}
MERGES = {
    "average": Merge(by="average"),
    **{f"sum, scale {scale:g}": Merge(by="sum", scale=scale) for scale in (0.375, 0.5, 0.75)},
    **{f"best: {name} alone": Merge(by="best", expert=name) for name in DOMAINS},
}


@dataclass(frozen=True)
class Pool:
    """Base and experts of one seed in FOLDER/seed<n>, and their mixture."""

    home: Path
    steps: int
    tokens: int
    kind: str = "ffn"

    @cached_property
    def mixture(self) -> Checkpoint:
        """Lexical router, one expert a token; plain for FFN specialists, whole models in the modekit architecture otherwise."""
        said = recipe(self.kind, NATIVE if self.kind == "ffn" else WHOLE)
        plan = make_plan(parse_recipe(said, where="densify"), self.home)
        return build(plan, self.home / "densify-mixture", overwrite=True)

    @cached_property
    def report(self) -> list[Domain]:
        """Text of the four domains."""
        found = held_out_domains(self.mixture, tokens_per_domain=self.tokens, sequence_length=512)
        return [domain for domain in found if domain.expert is not None]

    @cached_property
    def ends(self) -> tuple[Mapping[str, float], Mapping[str, float]]:
        """Losses of the base, and of each domain's own expert."""
        base = mean_losses(load_expert_source(self.mixture, None), self.report)
        experts: dict[str, float] = {}
        for domain in self.report:
            experts |= mean_losses(load_expert_source(self.mixture, domain.expert), [domain])
        return base, experts

    def gap(self, model: PreTrainedModel) -> float:
        """Mean gap closed."""
        base, own = self.ends
        return sum((base[name] - loss) / (base[name] - own[name]) for name, loss in self.losses(model).items()) / len(own)

    def losses(self, model: PreTrainedModel) -> Mapping[str, float]:
        """Of the four domains."""
        return mean_losses(model, self.report)


def merges(pool: Pool) -> None:
    """A row per rule."""
    checkpoint = pool.mixture
    plan = make_plan(checkpoint.record.recipe, checkpoint.recipe_root)
    chooser = Merger(checkpoint, plan, [], QUIET)
    print(f"| mixture | {pool.gap(load_model(checkpoint.folder)):.3f} |", flush=True)
    for name, merge in MERGES.items():
        print(f"| {name} | {pool.gap(chooser.set(merge)):.3f} |", flush=True)


def teacher(pool: Pool) -> None:
    """A row per share of the text in the loss; the teacher has the rest."""
    for text in (1.0, 0.75, 0.5, 0.25, 0.0):
        print(f"text {text:g}", end=" ")
        distil(pool, text)


def distil(pool: Pool, text: float = 0.75) -> None:
    """One row: before, after, and what it cost."""
    start = time.process_time()
    course = course_of(**COURSE, weights=text, steps=pool.steps, evaluate_every=pool.steps // 2)
    asked = Densify("distil", course, {}, Path(), None, pool.tokens, overwrite=True)
    record = densify(pool.mixture, asked, pool.home / "dense")
    took, row = time.process_time() - start, record.gap_closed
    print(
        f"| {record.merge.said} | {row['merge']:.3f} | {row['dense']:.3f} | {row['mixture']:.3f} | {record.kept:.2f} "
        f"| {record.parameters:,} | {took:.0f} s |",
        flush=True,
    )


STEPS: dict[str, Callable[[Pool], None]] = {"merges": merges, "distil": distil, "teacher": teacher}


def main() -> None:
    """Rows of every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=60, help="of a distillation")
    parser.add_argument("--tokens", type=int, default=4_096, help="of each domain that a row is scored on")
    parser.add_argument("--kind", choices=("ffn", "adapters", "full"), default="ffn", help="of experts; whole.py trains them")
    parser.add_argument("--only", choices=list(STEPS), required=True)
    said = parser.parse_args()
    for seed in said.seeds:
        print(f"\nseed {seed}", flush=True)
        STEPS[said.only](Pool(said.folder.resolve() / f"seed{seed}", said.steps, said.tokens, said.kind))


if __name__ == "__main__":
    main()
