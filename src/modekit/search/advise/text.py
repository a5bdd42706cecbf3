"""What the text of a recipe shows of its experts: everything of advice that runs a model or counts words.

It reads the select split, which is for choosing, and for the n-gram table the fit split; the report split is `modekit eval`'s.

Shape legend: E experts, S tokens of a sequence.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from modekit.errors import TextError
from modekit.evaluation.identity import ReadSequences
from modekit.recipes.recipe import Expert, Recipe
from modekit.recipes.router import Router
from modekit.run import Run
from modekit.search.advise.gains import ON_AVERAGE, Gains
from modekit.search.advise.models import ComparedModels
from modekit.search.advise.result import Finding, finding_of
from modekit.search.advise.rules import NEARLY_ALL
from modekit.sources.contents import OpenFiles
from modekit.sources.tokenizer import TOKENIZER_FILES
from modekit.text.document import Document
from modekit.text.held_out import RecipeTexts
from modekit.text.sequences import TokenSequence, encode
from modekit.text.splits import text_record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SEQUENCE_LENGTH = 512
_NGRAM = Router(fit="ngram", chat=False)


@dataclass(frozen=True)
class DomainText:
    """Of one domain: select text to score, its size, and the documents that a router may be fitted on."""

    sequences: Sequence[TokenSequence]
    record: ReadSequences
    fit: Sequence[Document]


@dataclass(frozen=True)
class Confusion:
    """What `fit: ngram` would decide on select text, knowing the text so far.

    `named[i, j]`: share of the tokens of domain i at which the table prefers domain j; `domains` are indices of experts.
    """

    domains: tuple[int, ...]
    named: npt.NDArray[np.float64]

    @property
    def accuracy(self) -> float:
        """Mean share of tokens at which a domain's own expert is preferred."""
        return float(np.diagonal(self.named).mean())

    def between(self, first: int, second: int) -> float:
        """Of tokens given to one of two domains, the share given to the wrong one: 0.5 when they are the same text."""
        i, j = self.domains.index(first), self.domains.index(second)
        pair = self.named[np.ix_([i, j], [i, j])]
        return float((pair[0, 1] + pair[1, 0]) / pair.sum()) if pair.sum() else 0.0


@dataclass(frozen=True)
class TextMeasurements:
    """What text said. `gains` and `confusion` are None where there is none. `speed`: floating-point operations per second of
    the passes that were run here.
    """

    texts: Mapping[int, ReadSequences]
    unread: frozenset[int]
    fittable: frozenset[int]
    gains: Gains | None
    confusion: Confusion | None
    speed: float | None = None


NOTHING = TextMeasurements({}, frozenset(), frozenset(), None, None)
_NO_TOKENIZER = Finding(
    "warning",
    "base_model",
    "it has no tokenizer, so modekit cannot read text",
    to_do="save the tokenizer into the base model's folder",
)


def measure_text(compared: ComparedModels, *, tokens: int, run: Run) -> tuple[TextMeasurements, list[Finding]]:
    """Read what text there is and measure what it allows."""
    recipe, base = compared.recipe, compared.base
    if not any((base.folder / name).exists() for name in TOKENIZER_FILES):
        return NOTHING, [_NO_TOKENIZER]
    from modekit.loaded.load import load_tokenizer

    tokenizer = load_tokenizer(base.folder, run=run)
    folders = [base.folder, *(source.folder for source in compared.experts.values())]
    texts, findings = read_texts(recipe, compared.root, folders, tokenizer, tokens)
    unread = frozenset(index for index, expert in enumerate(recipe.experts) if expert.text and index not in texts)
    fittable = frozenset(index for index, text in texts.items() if text.fit)
    texts = {index: text for index, text in texts.items() if index in compared.usable}
    confusion = measure_confusion(tokenizer, recipe.experts, texts)
    scored = {index: text.sequences for index, text in texts.items() if text.sequences}
    gains = speed = None
    if scored:
        gains, speed = _gains(compared, scored, run)
    records = {index: text.record for index, text in texts.items()}
    return TextMeasurements(records, unread, fittable, gains, confusion, speed), findings


def _gains(compared: ComparedModels, scored: Mapping[int, Sequence[TokenSequence]], run: Run) -> tuple[Gains, float | None]:
    """Losses of parts of every expert; of FFNs on the average of all, too, where the FFN alone does not carry the gain. And
    how fast the passes were.
    """
    from modekit.loaded.experts import give_rows
    from modekit.loaded.load import load_model
    from modekit.search.advise.part_scores import PatchedBase, measure, on_average

    with OpenFiles() as opened:
        base = compared.base
        model = load_model(base.folder, run=run)
        give_rows(model, base, base)
        patched = PatchedBase(model, [base, *compared.sources], compared.groups, compared.drift.moved, opened)
        started = time.perf_counter()
        gains = measure(patched, scored, compared.usable, run=run)
        seconds = time.perf_counter() - started
        own = [index for index in compared.moved if gains.helps(index)]
        ffn = [gains.share(index, gains.parts[index]["ffn"]).value for index in own if index in gains.parts]
        if ffn and min(ffn) < NEARLY_ALL:
            for index, losses in on_average(patched, scored, own, run=run).items():
                gains.parts[index][ON_AVERAGE] = losses
        return gains, gains.tokens * 2 * _weights(model) / seconds if seconds > 0 else None


def _weights(model: PreTrainedModel) -> int:
    """Weights that every token passes: all but an embedding that is looked up and is not the head as well."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    every = sum(parameter.numel() for parameter in model.parameters())
    return int(every - (0 if embedding is head else embedding.numel()))


def read_texts(
    recipe: Recipe, root: Path, folders: Sequence[Path], tokenizer: PreTrainedTokenizerBase, tokens: int
) -> tuple[dict[int, DomainText], list[Finding]]:
    """By place of the expert: its text, for experts that have some; and what is wrong with the others'.

    `folders` are those of the models; documents that `modekit specialize` trained one of them on are not scored, nor are
    prompts, which set routers.
    """
    own = RecipeTexts(recipe, root, models=folders)
    texts: dict[int, DomainText] = {}
    findings: list[Finding] = []
    for place, expert in enumerate(recipe.experts):
        if not expert.text and not expert.prompts:
            what = "no text: what helps it is not known, and no router can be fitted for it"
            to_do = "add experts[].text; a few hundred documents are enough for advice"
            findings.append(Finding("warning", expert.name, what, to_do=to_do))
            continue
        try:
            text, fit = own.own(place), own.fit(place)
        except TextError as error:
            findings.append(finding_of(error, expert.name))
            continue
        chosen = own.select_of(text) if text is not None else []
        sequences = encode(tokenizer, chosen, max_tokens=tokens, sequence_length=SEQUENCE_LENGTH)
        count = sum(sequence.size for sequence in sequences)
        if count < tokens / 2:
            what = "little text to measure on" if count else "no text to measure on"
            found = f"{count} of {tokens} tokens in the select split (one document in ten)"
            findings.append(Finding("note", expert.name, what, found, "give more documents"))
        record = ReadSequences(**text_record(chosen, count), sequence_length=SEQUENCE_LENGTH)
        texts[place] = DomainText(sequences, record, fit)
    return texts, findings


def measure_confusion(
    tokenizer: PreTrainedTokenizerBase, experts: Sequence[Expert], texts: Mapping[int, DomainText]
) -> Confusion | None:
    """Of the domains with text of both splits; None when fewer than two have some."""
    import torch

    from modekit.architecture.modekit_router import causal_average, ngram_rows
    from modekit.routing.ngram import NgramOdds, count_domain, ngram_gate

    statistics = {}
    for index, text in texts.items():
        try:
            if text.sequences:
                statistics[index] = count_domain(tokenizer, text.fit, experts[index], _NGRAM, {}, where=f"experts[{index}]")
        except TextError:  # nothing in the fit split
            continue
    if len(statistics) < 2:
        return None
    domains = tuple(statistics)
    gate_EH = ngram_gate(NgramOdds([*statistics.values()], _NGRAM))
    decay = _NGRAM.decays[0]
    named = np.zeros((len(domains), len(domains)))
    for row, index in enumerate(domains):
        for sequence in texts[index].sequences:
            ids = torch.tensor([sequence.ids])
            rows = ngram_rows(ids, torch.ones_like(ids), None, _NGRAM.order, _NGRAM.buckets)[0][0]
            scores_SE = causal_average(gate_EH[:, rows].T[None], torch.ones(ids.shape), decay, None, add_up=True)[0][0]
            named[row] += torch.bincount(scores_SE.argmax(-1), minlength=len(domains)).numpy()
    return Confusion(domains, named / named.sum(1, keepdims=True))
