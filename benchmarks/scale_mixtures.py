"""Mixtures of 4 to 32 trained experts: gap closed, loss on text of no domain, time per token; scale.md.

    mkdir packages, and fill it as scale.py says; apt-get download manpages-{id,vi} as well
    modekit demo --out demo
    python benchmarks/scale_mixtures.py packages demo FOLDER [--seeds 0]

One FFN specialist of the demo's base for each of scale.py's domains, its music left out and pages in Indonesian in its place,
all taught the same number of steps. Native mixtures of the first 4, 8, 16 and 32 under a lexical router, with one and with two
experts per token. Losses are of the report split; the oracle is each domain's own expert. Of music and of pages in Vietnamese
no mixture has an expert.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

import scale
from chat import spread
from modekit.building.build import build
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.demo.kinds import SMALL
from modekit.demo.models import SEQUENCE_LENGTH
from modekit.demo.text import UNSEEN
from modekit.evaluation.domains import Domain, held_out_domains
from modekit.experts.specialize import specialize
from modekit.loaded.load import load_model
from modekit.loaded.shapes import mixture_of
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from routers import mean_losses

ORDER = tuple("man id" if name == UNSEEN else name for name in scale.ORDER)
NOBODYS = (UNSEEN, "man vi")
COUNTS, TOP_K = (4, 8, 16, 32), (1, 2)
TOKENS, ROUNDS = 4_096, 15


def write_texts(packages: Path, folder: Path) -> dict[str, Path]:
    """Every domain's documents as a file of records."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{slug(name)}.jsonl" for name in (*ORDER, *NOBODYS)}
    if not all(path.exists() for path in paths.values()):
        for name, documents in scale.texts_of(packages, folder / "unpacked", (*ORDER, *NOBODYS)).items():
            paths[name].write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return paths


def train_experts(base: Path, texts: Mapping[str, Path], folder: Path, steps: int, seed: int) -> None:
    """Those that are not there yet."""
    for place, name in enumerate(ORDER):
        training = SMALL.expert_training.with_(steps=steps, seed=1000 * seed + place)
        if not (folder / slug(name)).exists():
            specialize(base, folder / slug(name), [str(texts[name])], root=folder, train="mlp", training=training)


def slug(name: str) -> str:
    """A domain's name for files and recipes."""
    return name.replace(" ", "-")


def mixture_of_first(count: int, top_k: int, base: Path, texts: Mapping[str, Path], folder: Path) -> tuple[Checkpoint, float]:
    """The mixture of the first domains, and the seconds that it took to build."""
    recipe = {
        "base_model": str(base),
        "experts": [{"name": slug(name), "model": f"./{slug(name)}", "text": str(texts[name])} for name in ORDER[:count]],
        "mixture": {"method": "routing", "top_k": top_k, "router": {"fit": "lexical", "sequence_length": SEQUENCE_LENGTH}},
        "eval": {slug(name): str(texts[name]) for name in NOBODYS},
    }
    out = folder / f"first-{count}-top-{top_k}"
    out.with_suffix(".yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    started = time.perf_counter()
    checkpoint = build(make_plan(parse_recipe(recipe, where=out.name), folder), out, overwrite=True)
    return checkpoint, time.perf_counter() - started


def own_losses(model: Any, checkpoint: Checkpoint, domains: Sequence[Domain]) -> dict[str, float]:
    """Every domain under its own expert."""
    found: dict[str, float] = {}
    for domain in domains:
        if domain.expert is not None:
            with mixture_of(model, checkpoint).forced(domain.expert):
                found |= mean_losses(model, [domain])
    return found


def run_seed(base: Path, texts: Mapping[str, Path], folder: Path) -> dict[str, dict[str, float]]:
    """Row -> column -> number."""
    base_losses: dict[str, float] = {}
    own: dict[str, float] = {}
    rows: dict[str, dict[str, float]] = {}
    timed: dict[str, Any] = {}
    for count in sorted(COUNTS, reverse=True):
        for top_k in TOP_K:
            checkpoint, seconds = mixture_of_first(count, top_k, base, texts, folder)
            domains = held_out_domains(checkpoint, tokens_per_domain=TOKENS, sequence_length=SEQUENCE_LENGTH)
            model = load_model(checkpoint.folder)
            if not own:
                base_losses = mean_losses(load_model(base), domains)
                own = own_losses(model, checkpoint, domains)
            found = mean_losses(model, domains)
            closed = {
                each: (base_losses[each] - found[each]) / (base_losses[each] - own[each]) for each in map(slug, ORDER[:count])
            }
            least = min(closed, key=closed.__getitem__)
            row = rows[f"{count} experts, top-{top_k}"] = {
                "gap closed": statistics.fmean(closed.values()),
                "least": closed[least],
                **{f"{name}, loss / base": found[slug(name)] / base_losses[slug(name)] for name in NOBODYS},
                "build, seconds": seconds,
            }
            print(json.dumps({"experts": count, "top_k": top_k, **row, "least of": least, "closed": closed}), flush=True)
            timed[f"{count} experts, top-{top_k}"] = model
    print(json.dumps({"base": base_losses, "own": own}), flush=True)
    timed["base"] = load_model(base)
    for what, texts_of_all in (("text", longest(domains)), ("drawn", [drawn()])):
        seconds_of = per_token(timed, texts_of_all)
        for name, row in rows.items():
            four = f"4 experts, {name.partition(', ')[2]}"
            row[f"{what}: time over 4 experts"] = ratio(seconds_of[name], seconds_of[four])
            row[f"{what}: over the base"] = ratio(seconds_of[name], seconds_of["base"])
    return dict(reversed(rows.items()))


def ratio(some: Sequence[float], others: Sequence[float]) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(one / other for one, other in zip(some, others, strict=True))


def longest(domains: Sequence[Domain]) -> list[torch.Tensor]:
    """The longest held-out document (1, S) of each of the domains that all mixtures have an expert for."""
    texts = [max((each.ids for each in domain.sequences), key=len) for domain in domains[: COUNTS[0]]]
    return [torch.tensor([ids]) for ids in texts]


def drawn() -> torch.Tensor:
    """512 tokens (1, S) of no text, which go to as many experts as there are."""
    return torch.randint(3, 3_000, (1, 512), generator=torch.Generator().manual_seed(0))


def per_token(models: Mapping[str, Any], texts: Sequence[torch.Tensor]) -> dict[str, list[float]]:
    """Seconds of a forward pass of every model over some texts, in turns, text by text and round by round."""
    found: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for ids_BS in [ids for _ in range(ROUNDS) for ids in texts]:
            for name, model in models.items():
                model(input_ids=ids_BS, use_cache=False)  # its own weights are in the cache as far as they fit
                started = time.perf_counter()
                model(input_ids=ids_BS, use_cache=False)
                found[name].append(time.perf_counter() - started)
    return found


def main() -> None:
    """Train what is not there, build, score, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path)
    parser.add_argument("demo", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    said = parser.parse_args()
    torch.set_num_threads(said.threads)
    texts = write_texts(said.packages.resolve(), said.folder.resolve() / "text")
    per_seed = []
    for seed in said.seeds:
        folder, base = said.folder.resolve() / f"seed{seed}", said.demo.resolve() / f"seed{seed}" / "base"
        folder.mkdir(exist_ok=True)
        train_experts(base, texts, folder, said.steps, seed)
        per_seed.append(run_seed(base, texts, folder))
    titles = list(next(iter(per_seed[0].values())))
    print(f"| | {' | '.join(titles)} |\n{'|---' * (len(titles) + 1)}|")
    for name in per_seed[0]:
        print(f"| {name} | {' | '.join(spread([rows[name][title] for rows in per_seed], 3) for title in titles)} |")


if __name__ == "__main__":
    main()
