"""fusion_bench's published pool, Flan-T5 base with eight GLUE adapters, mixed and scored as its tables are.

    cp benchmarks/glue.yaml FOLDER/glue.yaml
    python benchmarks/glue.py text FOLDER                 GLUE as pairs in FOLDER/text (train) and FOLDER/held-out (validation)
    modekit build FOLDER/glue.yaml FOLDER/mixture
    python benchmarks/glue.py score FOLDER [--pairs 500]  each task: mixture, own adapter, and the first over the second

`text` and the recipe need the model hub. Prompts and answers are those of fusion_bench 0.2.33 (MIT), spelling included. Score
of a task: share of answers that are exactly right, of STS-B Spearman's rank correlation; normalised: over the own adapter's.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.stats import spearmanr
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import modekit  # noqa: F401  its architecture opens in transformers

TRAIN_PAIRS, SEED, BATCH = 2_000, 0, 32
"""Pairs of a task that the router may read, drawn with this seed; sources answered together."""
LONGEST = 10
"""Tokens of an answer with the one that starts it, as in fusion_bench."""
YES = ("yes", "no")


@dataclass(frozen=True)
class Task:
    """How a row of GLUE becomes a pair; without `answers` the label is a number."""

    prompt: str
    answers: tuple[str, ...] = ()
    held_out: str = "validation"

    def pair(self, row: Mapping[str, str | float]) -> dict[str, str]:
        """Source and target."""
        answer = self.answers[int(row["label"])] if self.answers else f"{row['label']:.1f}"
        return {"source": self.prompt.format(**row), "target": answer}

    def score(self, written: Sequence[str], targets: Sequence[str]) -> float:
        """Of answers, as fusion_bench has it."""
        if self.answers:
            return statistics.fmean(said == target for said, target in zip(written, targets, strict=True))
        return float(spearmanr([_number(each) for each in written], [_number(each) for each in targets])[0])


TASKS = {
    "cola": Task(
        'Indicate if the following sentence is grammatically correct or not: "{sentence}". '
        "Answere 'acceptable' or 'unacceptable'.",
        ("unacceptable", "acceptable"),
    ),
    "mnli": Task(
        "Does the premise: '{premise}' logically imply, contradict, or is neutral to the hypothesis: '{hypothesis}'? "
        "Answere with 'entailment', 'contradiction', or 'neutral'.",
        ("entailment", "neutral", "contradiction"),
        "validation_matched",
    ),
    "mrpc": Task(
        "Are the following sentences '{sentence1}' and '{sentence2}' conveying the same meaning? Answere with 'yes' or 'no'.",
        YES[::-1],
    ),
    "qnli": Task(
        "Given the context: '{sentence}', does the question '{question}' have an answer based on the information provided? "
        "Answer with 'yes' or 'no'.",
        YES,
    ),
    "qqp": Task(
        "Do the questions '{question1}' and '{question2}' have the same intent? Answere with 'yes' or 'no'.", YES[::-1]
    ),
    "rte": Task("Does the text: '{sentence1}' entail that '{sentence2}' is true? Provide 'yes' or 'no'.", YES),
    "sst2": Task(
        "Given the sentence '{sentence}', determine the sentiment. Is it positive or negative?", ("negative", "positive")
    ),
    "stsb": Task(
        "Consider the sentences '{sentence1}' and '{sentence2}'. On a scale from 1 (completely different) to 5 "
        "(completely similar), rate the similarity."
    ),
}


def write_text(folder: Path) -> None:
    """From the hub."""
    from datasets import load_dataset

    for name, task in TASKS.items():
        data = load_dataset("nyu-mll/glue", name)
        train = random.Random(SEED).sample(range(len(data["train"])), min(TRAIN_PAIRS, len(data["train"])))
        for part, rows in (("text", data["train"].select(train)), ("held-out", data[task.held_out])):
            path = folder / part / f"{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(task.pair(row)) + "\n" for row in rows), encoding="utf-8")


@dataclass(frozen=True)
class Scored:
    """One task: the mixture, and the expert that was made for it."""

    mixture: float
    own: float

    @property
    def normalised(self) -> float:
        """As fusion_bench's tables say it."""
        return self.mixture / self.own


@torch.inference_mode()
def score(mixture: Path, held_out: Path, pairs: int | None = None) -> dict[str, Scored]:
    """Each task of `held_out` that the mixture has an expert for."""
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(mixture).eval(), AutoTokenizer.from_pretrained(mixture)
    found = {}
    for path in sorted(held_out.glob("*.jsonl")):
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][:pairs]
        scores = []
        for expert in (None, path.stem):
            model.use_expert(expert)
            written = _written(model, tokenizer, [each["source"] for each in records])
            scores.append(TASKS[path.stem].score(written, [each["target"] for each in records]))
        found[path.stem] = Scored(*scores)
    return found


def _written(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sources: Sequence[str]) -> list[str]:
    """Greedily."""
    found: list[str] = []
    for start in range(0, len(sources), BATCH):
        batch = tokenizer(list(sources[start : start + BATCH]), return_tensors="pt", padding=True, truncation=True)
        ids = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_length=LONGEST)
        found += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def table(found: Mapping[str, Scored]) -> str:
    """A row per task, and their mean."""
    rows = [(name, each.mixture, each.own, each.normalised) for name, each in found.items()]
    rows.append(("mean", *(statistics.fmean(row[place] for row in rows) for place in (1, 2, 3))))
    head = "| task | mixture | own adapter | normalised |\n|---|---|---|---|\n"
    return head + "\n".join(f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} |" for name, *values in rows)


def main() -> None:
    """One step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["text", "score"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, help="of each task, to score")
    said = parser.parse_args()
    if said.step == "text":
        write_text(said.folder)
    else:
        print(table(score(said.folder / "mixture", said.folder / "held-out", said.pairs)))


if __name__ == "__main__":
    main()
