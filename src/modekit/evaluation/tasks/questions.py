"""Questions made from held-out text: four answers each, one of them right; and beginnings to go on from.

    glosses        a gloss, and which of four heads of the domain it belongs to
    continuations  a passage's beginning, and which of four continuations of the domain's documents is its own
    generation     a head to explain, or a beginning to continue, and what the text says

Dictionary entries give glosses. Their split is by term: an entry of which any synonym is a head word in text that a model or
a router was made from is no question. All is chosen at random by seed, domain and kind, and by nothing else.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.errors import TextError
from modekit.evaluation.domains import held_out_texts, recipe_texts
from modekit.text.document import text_of
from modekit.text.documents import read_documents
from modekit.text.splits import digest_of

CHOICES = 4
BEGINNING, CONTINUATION = 16, 16  # words of a passage
QUESTIONS, GENERATIONS = 200, 50  # of a domain and kind at most
_FEWEST = 8  # of a domain and kind: fewer say nothing
_WORD = re.compile(r"\S+")


class GlossItem(TypedDict):
    """A gloss, four heads of which that of `answer` is its own, and the same question with bare terms."""

    document: str
    gloss: str
    heads: list[str]
    asked: str
    terms: list[str]
    answer: int


class ContinuationItem(TypedDict):
    """A passage's beginning, and four continuations of which that of `answer` is its own."""

    document: str
    beginning: str
    continuations: list[str]
    answer: int


class GenerationItem(TypedDict):
    """What to go on from, and what the text says; of the answer so many `words` are compared, all where that is 0."""

    document: str
    prompt: str
    reference: str
    words: int


Items = Sequence[GlossItem] | Sequence[ContinuationItem] | Sequence[GenerationItem]


@dataclass(frozen=True)
class Questions:
    """The items of one kind from one domain's held-out text; `unseen` domains have no expert of their own."""

    kind: str
    domain: str
    unseen: bool
    items: Items


def make_questions(checkpoint: Checkpoint, *, seen: Sequence[str] = (), seed: int = 0) -> tuple[list[Questions], list[str]]:
    """All kinds for all domains, and notes about what a domain's text was too little for.

    `seen` is further text (files, folders) that the base model was trained on, relative to the working folder of the recipe.
    Raises TextError when no domain's held-out text gives questions.
    """
    known = seen_terms(checkpoint, seen)
    made: list[Questions] = []
    notes = []
    for held in held_out_texts(checkpoint):
        texts = list(map(text_of, held.documents))
        glosses = gloss_items(texts, known, random.Random(f"{seed} {held.name} glosses"))
        continuations = continuation_items(texts, random.Random(f"{seed} {held.name} continuations"))
        kinds: dict[str, Items] = {
            "glosses": glosses,
            "continuations": continuations,
            "generation": generation_items(glosses, continuations),
        }
        for kind, items in kinds.items():
            if len(items) >= _FEWEST:
                made.append(Questions(kind, held.name, held.expert is None, items))
            elif kind == "continuations" or any(map(entries_of, texts)):
                notes.append(f"{held.name}: no {kind}, its held-out text gives {len(items)} and {_FEWEST} is the fewest")
    if not made:
        raise TextError(
            "no domain has enough held-out text for questions",
            where="experts[].text, eval",
            found="; ".join(notes),
            expected=f"passages of {BEGINNING + CONTINUATION} words from {CHOICES} documents, or dictionary entries",
            remedy="give more or longer documents (one in ten is held out), or other text under eval",
        )
    return made, notes


def seen_terms(checkpoint: Checkpoint, seen: Sequence[str] = ()) -> set[str]:
    """Head words of every expert's documents for a fit, which experts, base and router saw, and of `seen` whole."""
    texts = recipe_texts(checkpoint)
    terms = head_words(map(text_of, read_documents(seen, root=checkpoint.recipe_root, where="--seen"))) if seen else set()
    return terms.union(*(head_words(map(text_of, texts.fit(place))) for place in range(len(checkpoint.names))))


def gloss_items(documents: Sequence[str], known: Collection[str], chance: random.Random) -> list[GlossItem]:
    """One item per entry that is not `known`: its gloss, four heads, and the same question with bare terms."""
    entries = [(digest_of(document), entry) for document in documents for entry in entries_of(document)]
    entries = _first_of_each([(digest, entry) for digest, entry in entries if not entry.keys & set(known)])
    chance.shuffle(entries)
    items: list[GlossItem] = []
    for digest, entry in entries[:QUESTIONS]:
        others = [other for _, other in entries if other is not entry]
        others = chance.sample(others, min(CHOICES - 1, len(others)))
        if len(others) == CHOICES - 1:
            choices = [entry, *others]
            chance.shuffle(choices)
            items.append(
                {
                    "document": digest[:16],
                    "gloss": entry.gloss + ".",
                    "heads": [f"{choice.head}:" for choice in choices],
                    "asked": f"{entry.gloss[:1].upper()}{entry.gloss[1:]}:",
                    "terms": [choice.terms[0] for choice in choices],
                    "answer": choices.index(entry),
                }
            )
    return items


def _first_of_each(entries: Sequence[tuple[str, Entry]]) -> list[tuple[str, Entry]]:
    """Entries none of which shares a term or a gloss with one before it: no question has two right answers."""
    taken: set[str] = set()
    kept = []
    for digest, entry in entries:
        marks = {*entry.keys, f": {entry.gloss}"}
        if entry.gloss and not marks & taken:
            taken |= marks
            kept.append((digest, entry))
    return kept


def continuation_items(documents: Sequence[str], chance: random.Random) -> list[ContinuationItem]:
    """Passages of the documents from their beginnings on, none overlapping, each with continuations of three others."""
    passages = [(digest_of(document), *passage) for document in documents for passage in _passages(document)]
    items: list[ContinuationItem] = []
    for digest, beginning, own in chance.sample(passages, min(QUESTIONS, len(passages))):
        continuations = [own]
        for other, _, continuation in chance.sample(passages, len(passages)):
            if len(continuations) == CHOICES:
                break
            if other != digest and " ".join(continuation.split()) not in {" ".join(c.split()) for c in continuations}:
                continuations.append(continuation)
        if len(continuations) == CHOICES:
            chance.shuffle(continuations)
            items.append(
                {
                    "document": digest[:16],
                    "beginning": beginning,
                    "continuations": continuations,
                    "answer": continuations.index(own),
                }
            )
    return items


def _passages(document: str) -> Iterator[tuple[str, str]]:
    """Beginning and continuation, cut behind whole words; white space is kept as it is and begins the continuation."""
    words = list(_WORD.finditer(document))
    for start in range(0, len(words) - BEGINNING - CONTINUATION + 1, BEGINNING + CONTINUATION):
        cut, end = words[start + BEGINNING - 1].end(), words[start + BEGINNING + CONTINUATION - 1].end()
        yield document[words[start].start() : cut], document[cut:end]


def generation_items(glosses: Sequence[GlossItem], continuations: Sequence[ContinuationItem]) -> list[GenerationItem]:
    """What a model should write: glosses where there are entries, else continuations (`words`: as many are compared)."""
    if len(glosses) >= _FEWEST:
        return [
            {"document": item["document"], "prompt": item["heads"][item["answer"]], "reference": item["gloss"], "words": 0}
            for item in glosses[:GENERATIONS]
        ]
    return [
        {
            "document": item["document"],
            "prompt": item["beginning"],
            "reference": item["continuations"][item["answer"]].strip(),
            "words": CONTINUATION,
        }
        for item in continuations[:GENERATIONS]
    ]


_INITIAL = r"(?<=\b\w)\.|(?<=\b[A-Z]\w)\."  # T.B., L. H. Down, St. Lawrence: these stops end no gloss
_HEAD = re.compile(rf"(?:\A|(?<=\. ))([^\W_](?:[^:;.\"()\n]|{_INITIAL}){{0,119}}): (?=\S)")
_FEWEST_ENTRIES = 3  # entries of a document that reads like a dictionary


@dataclass(frozen=True)
class Entry:
    """One entry. `head` is what stands before the colon, `terms` its synonyms as written, `gloss` without its full stop."""

    head: str
    terms: tuple[str, ...]
    gloss: str

    @property
    def keys(self) -> frozenset[str]:
        """The terms as they are compared: case-folded."""
        return frozenset(map(key_of, self.terms))


def key_of(term: str) -> str:
    """A term as it is compared."""
    return " ".join(term.casefold().split())


def entries_of(document: str) -> list[Entry]:
    """The entries of a document that consists of them; none of any other.

    Such a document begins with a head, has three at least, and a capital or digit begins each.
    """
    heads = [match for match in _HEAD.finditer(document) if not match[1][0].islower()]
    if len(heads) < _FEWEST_ENTRIES or heads[0].start() != 0:
        return []
    ends = [*(match.start() for match in heads[1:]), len(document)]
    entries = []
    for match, end in zip(heads, ends, strict=True):
        terms = tuple(term.strip() for term in match[1].split(", ") if term.strip())
        entries.append(Entry(match[1], terms, document[match.end() : end].strip().removesuffix(".")))
    return entries


def head_words(documents: Iterable[str]) -> set[str]:
    """Every term, as it is compared, that is a head word in any of the documents."""
    return {key for document in documents for entry in entries_of(document) for key in entry.keys}
