"""One dense model of a mixture of four FFN specialists, and six experts of eight: densify.md.

    python benchmarks/whole.py train FOLDER --kind ffn --seeds 0 1 2      base and four experts, as `modekit demo` has
    python benchmarks/densify.py FOLDER --seeds 0 1 2 --only merges       weights alone: average, sums, svd, best expert
    python benchmarks/densify.py FOLDER --seeds 0 1 2 --only distil       the best of them, distilled from the mixture
    python benchmarks/densify.py FOLDER --seeds 0 1 2 --only teacher      the same with none, a quarter or all of the teacher
    python benchmarks/densify.py FOLDER --seeds 0 1 2 --only shrink       each expert twice, near duplicates merged

Gap closed on the report split, mean over the four domains.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from modekit.building.build import build
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.conversion.choice import Chooser
from modekit.conversion.dense_record import Merge
from modekit.conversion.densify import Densify, densify
from modekit.conversion.distilled import course_of
from modekit.conversion.shrink import Shrinking, shrink
from modekit.demo.text import DOMAINS
from modekit.evaluation.domains import Domain, held_out_domains
from modekit.experts.specialist import held_out_losses
from modekit.loaded.experts import load_expert_source
from modekit.loaded.load import load_model
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.run import QUIET
from peers.pool import read_text, write_text
from whole import recipe

COURSE = {"batch_tokens": 3_072, "learning_rate": 2e-3, "select_tokens": 512}
NOISE = 0.2
"""Of a duplicate, as a share of what its expert changed of the base."""
NATIVE = {"output": {"format": "native"}}
WHOLE = {"modules": "all", "output": {"format": "modekit"}}
MERGES = {
    "average": Merge(by="average"),
    **{f"sum, scale {scale:g}": Merge(by="sum", scale=scale) for scale in (0.375, 0.5, 0.75)},
    "svd, scale 0.5": Merge(by="svd", scale=0.5),
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
        base = held_out_losses(load_expert_source(self.mixture, None), self.report, "the base", QUIET)
        experts = {}
        for domain in self.report:
            experts |= held_out_losses(load_expert_source(self.mixture, domain.expert), [domain], domain.name, QUIET)
        return base, experts

    def gap(self, model: PreTrainedModel) -> float:
        """Mean gap closed."""
        base, own = self.ends
        return sum((base[name] - loss) / (base[name] - own[name]) for name, loss in self.losses(model).items()) / len(own)

    def losses(self, model: PreTrainedModel) -> Mapping[str, float]:
        """Of the four domains."""
        return held_out_losses(model, self.report, "a model", QUIET)


def merges(pool: Pool) -> None:
    """A row per rule."""
    checkpoint = pool.mixture
    plan = make_plan(checkpoint.record.recipe, checkpoint.recipe_root)
    chooser = Chooser(checkpoint, plan, [], QUIET)
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
    asked = Densify("distil", course, tokens=pool.tokens, overwrite=True)
    record = densify(pool.mixture, asked, pool.home / "dense")
    took, row = time.process_time() - start, record.gap_closed
    print(
        f"| {record.merge.said} | {row('merge'):.3f} | {row('dense'):.3f} | {row('mixture'):.3f} | {record.kept:.2f} "
        f"| {record.parameters:,} | {took:.0f} s |",
        flush=True,
    )


def shrink_eight(pool: Pool) -> None:
    """Rows of eight experts, six and four."""
    home, experts = pool.home, []
    for name in DOMAINS:
        again = _noisy(home / "base", home / f"ffn-{name}", home / f"ffn-{name}-again")
        documents = read_text(home.parent / "text" / f"{name}.jsonl")
        for place, (called, model) in enumerate(((name, home / f"ffn-{name}"), (f"{name}-again", again))):
            text = write_text(documents[place::2], home / "halves" / f"{called}.jsonl")
            experts.append({"name": called, "model": str(model), "text": str(text)})
    said = {**recipe("ffn", NATIVE), "experts": experts, "eval": {}}
    eight = build(make_plan(parse_recipe(said, where="eight"), home), home / "densify-eight", overwrite=True)
    gaps = {8: pool.gap(load_model(eight.folder))}
    for to in (6, 4):
        texts = [str(home.parent / "text" / f"{name}.jsonl") for name in DOMAINS]
        record = shrink(eight.folder, Shrinking(to, texts, home, pool.tokens, overwrite=True), home / f"densify-{to}")
        gaps[to] = pool.gap(load_model(home / f"densify-{to}"))
        merged = [" + ".join(eight.names[e] for e in group) for group in record.groups[0] if len(group) > 1]
        print(f"| {to} | {gaps[8]:.3f} | {gaps[to]:.3f} | {gaps[to] / gaps[8]:.3f} | {', '.join(merged)} |", flush=True)


def _noisy(base: Path, expert: Path, out: Path) -> Path:
    """A copy whose changes of the base have Gaussian noise."""
    if not (out / "config.json").exists():
        origin = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
        model = AutoModelForCausalLM.from_pretrained(expert, dtype=torch.float32)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                size = (parameter - origin[name]).std() * NOISE
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
        model.save_pretrained(out)
        AutoTokenizer.from_pretrained(expert).save_pretrained(out)
    return out


STEPS: dict[str, Callable[[Pool], None]] = {"merges": merges, "distil": distil, "teacher": teacher, "shrink": shrink_eight}


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
