"""Questions made from held-out text: four answers each, one of them right.

    glosses        a gloss, and which of four heads of the domain makes it likeliest: the noisy channel of arXiv:2108.04106
    continuations  a passage's beginning, and which of four continuations of the domain's documents gains most by it

Dictionary entries give glosses. Their split is by term: an entry of which any synonym is a head word in text that a model or
a router was made from is no question. All is chosen at random by seed, domain and form, and by nothing else.

They are tasks of lm-evaluation-harness, a YAML and a JSONL each, in a folder that `lm_eval` itself can run:

    cd OUT/results/tasks
    lm_eval --model hf --model_args pretrained=MODEL --include_path . --tasks modekit_glosses
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.errors import TextError
from modekit.evaluation.domains import held_out_texts, recipe_texts
from modekit.text.document import text_of

GROUPS: Mapping[str, tuple[str, ...]] = {
    "glosses": ("glosses",),
    "continuations": ("continuations",),
    "questions": ("glosses", "continuations"),
}
"""Names that TASKS takes for the questions -> forms."""
_SAYS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "glosses": (
        "acc",
        {"doc_to_text": "answer", "doc_to_choice": "heads", "doc_to_target": "gloss", "target_delimiter": " "},
    ),
    "continuations": (
        "acc_mutual_info",
        {"doc_to_text": "beginning", "doc_to_choice": "continuations", "doc_to_target": "answer", "target_delimiter": ""},
    ),
}
"""Form -> metric, and what else its task file says besides names and data."""
CHOICES = 4
BEGINNING, CONTINUATION = 16, 16  # words of a passage
QUESTIONS = 200  # of a domain and form at most
_FEWEST = 8  # of a domain and form: fewer say nothing
_WORD = re.compile(r"\S+")


Item = Mapping[str, str | int | Sequence[str]]
"""`gloss` and four `heads`, or `beginning` and four `continuations`; place of the `answer` among these."""


@dataclass(frozen=True)
class Questions:
    """The items of one form from one domain's held-out text; `unseen` domains have no expert of their own."""

    form: str
    domain: str
    unseen: bool
    items: Sequence[Item]

    @property
    def name(self) -> str:
        """Of the task."""
        return f"modekit_{self.domain}_{self.form}"

    def files(self) -> dict[str, bytes]:
        """File name -> content, for `lm_eval`."""
        lines = [json.dumps(item, ensure_ascii=False, sort_keys=True) for item in self.items]
        said = yaml.safe_dump(self.config(Path()), sort_keys=False, allow_unicode=True)
        return {self._data: ("\n".join(lines) + "\n").encode(), f"{self.name}.yaml": said.encode()}

    def config(self, folder: Path) -> dict[str, object]:
        """What the task file says, with its data in a folder."""
        metric, says = _SAYS[self.form]
        return {
            "task": self.name,
            "tag": f"modekit_{self.form}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / self._data)}},
            "test_split": "test",
            "output_type": "multiple_choice",
            **says,
            "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
            "num_fewshot": 0,
            "metadata": {"version": 1.0},
        }

    @property
    def _data(self) -> str:
        return f"{self.domain}_{self.form}.jsonl"


def make_questions(checkpoint: Checkpoint) -> tuple[list[Questions], list[str]]:
    """All forms for all domains, and notes about what a domain's text was too little for. Raises TextError when no domain's
    held-out text gives questions.
    """
    fit = recipe_texts(checkpoint).fit
    known = head_words(text_of(document) for place in range(len(checkpoint.names)) for document in fit(place))
    made: list[Questions] = []
    notes = []
    for held in held_out_texts(checkpoint):
        texts = list(map(text_of, held.documents))
        forms = {
            "glosses": gloss_items(texts, known, random.Random(f"0 {held.name} glosses")),
            "continuations": continuation_items(texts, random.Random(f"0 {held.name} continuations")),
        }
        made += [Questions(form, held.name, held.expert is None, each) for form, each in forms.items() if len(each) >= _FEWEST]
        if len(forms["continuations"]) < _FEWEST:
            notes.append(f"{held.name}: its held-out text is too short for continuations")
    if not made:
        raise TextError(
            "no domain has enough held-out text for questions",
            where="experts[].text, eval",
            expected=f"passages of {BEGINNING + CONTINUATION} words from {CHOICES} documents, or dictionary entries",
            remedy="give more or longer documents (one in ten is held out), or other text under eval",
        )
    return made, notes


def gloss_items(documents: Sequence[str], known: Collection[str], chance: random.Random) -> list[Item]:
    """One item per entry that is not `known`: its gloss, and four heads."""
    entries: list[Entry] = []
    taken = set(known)
    for entry in (entry for document in documents for entry in entries_of(document)):
        marks = {*entry.keys, f": {entry.gloss}"}
        if entry.gloss and not marks & taken:  # no question has two right answers
            taken |= marks
            entries.append(entry)
    chance.shuffle(entries)
    items: list[Item] = []
    for entry in entries[:QUESTIONS] if len(entries) >= CHOICES else ():
        choices = [entry, *chance.sample([other for other in entries if other is not entry], CHOICES - 1)]
        chance.shuffle(choices)
        heads = [f"{choice.head}:" for choice in choices]
        items.append({"gloss": entry.gloss + ".", "heads": heads, "answer": choices.index(entry)})
    return items


def continuation_items(documents: Sequence[str], chance: random.Random) -> list[Item]:
    """Passages of the documents from their beginnings on, none overlapping, each with continuations of three others."""
    passages = [(document, *passage) for document in documents for passage in _passages(document)]
    items: list[Item] = []
    for home, beginning, own in chance.sample(passages, min(QUESTIONS, len(passages))):
        continuations = [own]
        for other, _, continuation in chance.sample(passages, len(passages)):
            if len(continuations) == CHOICES:
                break
            if other != home and continuation.split() not in [each.split() for each in continuations]:
                continuations.append(continuation)
        if len(continuations) == CHOICES:
            chance.shuffle(continuations)
            items.append({"beginning": beginning, "continuations": continuations, "answer": continuations.index(own)})
    return items


def _passages(document: str) -> Iterator[tuple[str, str]]:
    """Beginning and continuation, cut behind whole words; white space is kept as it is and begins the continuation."""
    words = list(_WORD.finditer(document))
    for start in range(0, len(words) - BEGINNING - CONTINUATION + 1, BEGINNING + CONTINUATION):
        cut, end = words[start + BEGINNING - 1].end(), words[start + BEGINNING + CONTINUATION - 1].end()
        yield document[words[start].start() : cut], document[cut:end]


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
