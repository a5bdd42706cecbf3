"""What `unseen: base` is worth on the demo's FFN specialists: losses on text of the domains and of none; unseen.md.

    modekit demo --out demo --seeds 2
    python benchmarks/unseen_mixtures.py wheels demo --seeds 0 1          (wheels: see unseen.py)

Every mixture is built twice: of the four experts, and of these and the base, whose text is the demo's general one, with
`unseen: base`. Gap closed, mean over the four domains (report split), with the oracle (own expert forced) at 1.0. Then losses
over the base's: on the demo's music, on dictionaries in English, German and French, and on other styles of the domains.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from chat import spread
from modekit.building.build import build
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.demo.models import SEQUENCE_LENGTH
from modekit.demo.text import DOMAINS, GENERAL
from modekit.evaluation.domains import Domain, held_out_domains
from modekit.evaluation.inspection.unseen import detect_unseen
from modekit.loaded.load import load_model, load_tokenizer
from modekit.loaded.shapes import mixture_of
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.text.sequences import TokenSequence
from routers import EVAL_TOKENS, losses_of
from unseen import other_texts

MIXTURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "native lexical, top-1": ({"top_k": 1}, {"fit": "lexical"}),
    "native lexical, top-2": ({"top_k": 2}, {"fit": "lexical"}),
    "modekit lexical, top-2": ({"top_k": 2}, {"fit": "lexical"}),
    "modekit lexical, top-2, 5 % false alarms": ({"top_k": 2}, {"fit": "lexical", "false_alarms": 0.05}),
    "modekit n-gram, top-2": ({"top_k": 2}, {"fit": "ngram"}),
}


@dataclass(frozen=True)
class Scored:
    """Loss of each text in nats, and AUROC at 256 tokens and share of tokens to the base, where there are any."""

    losses: dict[str, float]
    auroc: dict[str, float]
    to_base: dict[str, float]


def built(folder: Path, name: str, unseen: bool) -> Checkpoint:
    says, router = MIXTURES[name]
    recipe = yaml.safe_load((folder / "routing.yaml").read_text())
    router = {**router, "sequence_length": SEQUENCE_LENGTH}
    mixture = {"method": "routing", **says, "router": router}
    if unseen:
        mixture["unseen"] = "base"
        recipe["experts"] = [*recipe["experts"], {"name": GENERAL, "model": "base", "text": f"../text/{GENERAL}.jsonl"}]
    else:
        router.pop("false_alarms", None)
    recipe = {**recipe, "mixture": mixture, "output": {"format": name.partition(" ")[0]}}
    out = folder / "unseen" / "".join(letter if letter.isalnum() else "-" for letter in f"{name} {unseen}")
    out.parent.mkdir(exist_ok=True)
    return build(make_plan(parse_recipe(recipe, where=name), folder), out, overwrite=True)


def texts_of(checkpoint: Checkpoint, wheels: Path) -> list[Domain]:
    """The domains' report split, the demo's music, and texts of the wheels."""
    said = {"tokens_per_domain": EVAL_TOKENS, "sequence_length": SEQUENCE_LENGTH}
    domains = [each for each in held_out_domains(checkpoint, **said) if each.name != GENERAL]
    for name, ids in other_texts(wheels, load_tokenizer(checkpoint.folder)).items():
        sequences: list[TokenSequence] = []
        while ids and sum(len(each.ids) for each in sequences) < EVAL_TOKENS:
            sequences.append(TokenSequence(tuple(ids.pop(0).tolist()), 0))
        domains.append(Domain(name, None, sequences))
    return domains


def scored(checkpoint: Checkpoint, domains: Sequence[Domain]) -> Scored:
    losses = losses_of(load_model(checkpoint.folder), domains)
    told = detect_unseen(checkpoint, domains)
    assert told is not None
    auroc = {name: row[-1] for name, row in told.auroc.get("experts over base", {}).items()}
    return Scored({name: total(texts) for name, texts in losses.items()}, auroc, told.to_base or {})


def total(texts: Sequence[torch.Tensor]) -> float:
    return float(sum(text.double().sum() for text in texts))


def run_seed(folder: Path, wheels: Path, only: Sequence[str]) -> dict[str, dict[str, float]]:
    """Row -> column -> number."""
    rows: dict[str, dict[str, float]] = {}
    base: dict[str, float] = {}
    own: dict[str, float] = {}
    for name in only or MIXTURES:
        closed = {}
        for unseen in (False, True):
            checkpoint = built(folder, name, unseen)
            domains = texts_of(checkpoint, wheels)
            if not base:
                base = {each: total(texts) for each, texts in losses_of(load_model(folder / "base"), domains).items()}
                model = load_model(checkpoint.folder)
                for domain in domains[: len(DOMAINS)]:
                    assert domain.expert is not None
                    with mixture_of(model, checkpoint).forced(domain.expert):
                        own |= {each: total(texts) for each, texts in losses_of(model, [domain]).items()}
            found = scored(checkpoint, domains)
            closed[unseen] = statistics.fmean((base[each] - found.losses[each]) / (base[each] - own[each]) for each in DOMAINS)
            others = {f"loss, {each}": found.losses[each] / base[each] for each in base if each not in DOMAINS}
            row = {"gap closed": closed[unseen], **others}
            if unseen:
                row["share of the gap kept"] = closed[True] / closed[False]
                row |= {f"AUROC, {each}": value for each, value in found.auroc.items()}
                row |= {f"to the base, {each}": value for each, value in found.to_base.items()}
            rows[f"{name}{', unseen: base' if unseen else ''}"] = row
            print(f"{folder.name} {name} {unseen}: {row}", flush=True)
    return rows


def table(per_seed: Sequence[dict[str, dict[str, float]]], prefix: str) -> str:
    """The columns that begin so, mean over seeds and largest deviation."""
    titles = [title for title in max((row for row in per_seed[0].values()), key=len) if title.startswith(prefix)]
    lines = [f"| mixture | {' | '.join(title.removeprefix(prefix) for title in titles)} |", "|---" * (len(titles) + 1) + "|"]
    for name, first in per_seed[0].items():
        if titles[0] in first:
            cells = [spread([seed[name][title] for seed in per_seed], 4) if title in first else "" for title in titles]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="numbers of seeds")
    parser.add_argument("--only", nargs="*", default=[], choices=MIXTURES, help="mixtures, by name")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    demo = arguments.demo.resolve()
    per_seed = [run_seed(demo / f"seed{seed}", arguments.wheels, arguments.only) for seed in arguments.seeds]
    for prefix in ("gap closed", "share of the gap kept", "loss, ", "AUROC, ", "to the base, "):
        print(table(per_seed, prefix))


if __name__ == "__main__":
    main()
