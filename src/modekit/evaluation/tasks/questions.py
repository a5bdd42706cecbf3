"""Questions made from held-out text: four answers each, one of them right.

A question is a passage's beginning, and which of four continuations of the domain's documents gains most by it. All is chosen
at random by domain, and by nothing else.

They are tasks of lm-evaluation-harness, a YAML and a JSONL each, in a folder that `lm_eval` itself can run:

    cd OUT/results/tasks
    lm_eval --model hf --model_args pretrained=MODEL --include_path . --tasks modekit_questions
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.errors import TextError
from modekit.evaluation.domains import held_out_texts
from modekit.text.document import text_of
from modekit.text.splits import digest_of

QUESTIONS = "questions"
"""Name that TASKS takes for them, and their mean has."""
CHOICES = 4
_BEGINNING, _CONTINUATION = 16, 16  # words of a passage
_MOST, _FEWEST = 200, 8  # of a domain; fewer say nothing
_WORD = re.compile(r"\S+")

Item = Mapping[str, str | int | Sequence[str]]
"""`document`; `beginning` and four `continuations`; place of the `answer` among these."""


@dataclass(frozen=True)
class Questions:
    """The items from one domain's held-out text; `unseen` domains have no expert of their own."""

    domain: str
    unseen: bool
    items: Sequence[Item]

    @property
    def name(self) -> str:
        """Of the task."""
        return f"modekit_{self.domain}_{QUESTIONS}"

    def files(self) -> dict[str, bytes]:
        """File name -> content, for `lm_eval`."""
        lines = [json.dumps(item, ensure_ascii=False, sort_keys=True) for item in self.items]
        said = yaml.safe_dump(self.config(Path()), sort_keys=False, allow_unicode=True)
        return {self._data: ("\n".join(lines) + "\n").encode(), f"{self.name}.yaml": said.encode()}

    def config(self, folder: Path) -> dict[str, object]:
        """What the task file says, with its data in a folder."""
        return {
            "task": self.name,
            "tag": f"modekit_{QUESTIONS}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / self._data)}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "beginning",
            "doc_to_choice": "continuations",
            "doc_to_target": "answer",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc_mutual_info", "aggregation": "mean", "higher_is_better": True}],
            "num_fewshot": 0,
            "metadata": {"version": 1.0},
        }

    @property
    def _data(self) -> str:
        return f"{self.domain}.jsonl"


def make_questions(checkpoint: Checkpoint) -> tuple[list[Questions], list[str]]:
    """Questions of all domains, and notes about a domain whose text is too little for them. Raises TextError when no domain's
    held-out text gives questions.
    """
    made: list[Questions] = []
    notes = []
    for held in held_out_texts(checkpoint):
        items = question_items(list(map(text_of, held.documents)), random.Random(f"0 {held.name} continuations"))
        if len(items) >= _FEWEST:
            made.append(Questions(held.name, held.expert is None, items))
        else:
            notes.append(f"{held.name}: no questions, its held-out text gives {len(items)} and {_FEWEST} is the fewest")
    if not made:
        raise TextError(
            "no domain has enough held-out text for questions",
            where="experts[].text, eval",
            found="; ".join(notes),
            expected=f"passages of {_BEGINNING + _CONTINUATION} words from {CHOICES} documents",
            remedy="give more or longer documents (one in ten is held out), or other text under eval",
        )
    return made, notes


def question_items(documents: Sequence[str], chance: random.Random) -> list[Item]:
    """Passages of the documents from their beginnings on, none overlapping, each with continuations of three others."""
    passages = [(digest_of(document), *passage) for document in documents for passage in _passages(document)]
    items: list[Item] = []
    for digest, beginning, own in chance.sample(passages, min(_MOST, len(passages))):
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
    for start in range(0, len(words) - _BEGINNING - _CONTINUATION + 1, _BEGINNING + _CONTINUATION):
        cut, end = words[start + _BEGINNING - 1].end(), words[start + _BEGINNING + _CONTINUATION - 1].end()
        yield document[words[start].start() : cut], document[cut:end]
