"""`modekit eval-translation OUT`: what base, experts, oracle and mixture write of held-out sources, scored by sacrebleu.

Every row translates the same sources in the same way. An expert's row is the mixture with all weight on it; the oracle has,
in each domain, what the domain's own expert wrote, and the mixture with a label by its gate what the label's wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.sources import why_not
from modekit.errors import MismatchError
from modekit.evaluation.domains import Domain, held_out_texts, known_and_unseen
from modekit.evaluation.identity import ReadText
from modekit.evaluation.labels import (
    Gain,
    Labels,
    check_labels,
    have_tags,
    label_notes,
    label_places,
    label_tags,
    longest_with_tag,
    with_tag,
)
from modekit.evaluation.results import Kind
from modekit.evaluation.translation.decoding import Decoding, Translations, first_token, set_decoding, together, translated
from modekit.evaluation.translation.results import (
    Compared,
    Scorer,
    TranslationExample,
    TranslationResults,
    TranslationRow,
    TranslationScore,
    TranslationSettings,
    compared,
    require_sacrebleu,
)
from modekit.loaded.experts import load_expert_source
from modekit.loaded.load import load_model, load_tokenizer
from modekit.loaded.shapes import mixture_of
from modekit.recipes.strict import BASE
from modekit.run import QUIET, ProgressCount, Run
from modekit.text.document import Pair
from modekit.text.held_out import HeldOutText
from modekit.text.sequences import TokenSequence, encode
from modekit.text.splits import text_record
from modekit.text.tags import labels_of

ORACLE, MIXTURE = "oracle", "mixture"
_LONGEST = 512  # tokens of a side, as `modekit eval` reads them


@dataclass(frozen=True)
class PairDomain(Domain):
    """A domain with the pairs that its sequences are of."""

    pairs: Sequence[Pair] = ()


@dataclass(frozen=True)
class WrittenRow:
    """A row before it is scored; `model`: what it is of, by name, where it got labels."""

    name: str
    kind: Kind
    written: Mapping[str, Translations]
    model: str = ""


def evaluate_translation(
    checkpoint: Checkpoint,
    *,
    pairs: int = 200,
    decoding: Decoding | None = None,
    labels: Labels | None = None,
    run: Run = QUIET,
    write: bool = True,
) -> TranslationResults:
    """Translate so many pairs per domain and, with `write`, write OUT/results/translate.json and translate.md.

    Raises MismatchError for a mixture without an encoder, or labels that cannot act on it, ModekitError without sacrebleu,
    TextError when a domain has no held-out pairs or none that fits into the model, SourceError when a model cannot be loaded.
    """
    family = checkpoint.shape.family
    if not family.pair:
        raise MismatchError(
            "only a model with an encoder translates",
            where=str(checkpoint.folder),
            found=f"a mixture of {family.model_type} models, which write a text on",
            expected="Bart, mBART, Marian, M2M100 or T5",
            remedy="run modekit eval, which scores such a mixture by its loss",
        )
    require_sacrebleu()
    notes: list[str] = []
    tokenizer = load_tokenizer(checkpoint.folder, run=run)
    positions: Any = checkpoint.config.get("max_position_embeddings")
    longest = min(_LONGEST, positions or _LONGEST)
    if labels is not None:
        check_labels(checkpoint, labels, tokenizer)
        longest = longest_with_tag(longest, checkpoint) if labels.by == "tag" else longest
    domains = [_domain(held, tokenizer, pairs, longest, notes) for held in held_out_texts(checkpoint)]
    decoding = decoding or Decoding()
    if positions is not None and decoding.max_new_tokens > positions:
        decoding = replace(decoding, max_new_tokens=positions)
    rows = _Translator(checkpoint, tokenizer, domains, decoding, run, notes).rows(labels)
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"processor, {torch.get_num_threads()} threads"
    settings = TranslationSettings(**vars(decoding), pairs=pairs, machine=machine)
    results = _results(checkpoint, domains, rows, settings, notes)
    if labels is not None:
        means = {row.name: mean for row in results.rows if (mean := row.mean(results.domains)) is not None}
        said = label_notes(labels, domains, checkpoint.record.recipe, means, _score_gains)
        results = replace(results, notes=[*results.notes, *said])
    if write:
        results.write(checkpoint)
    return results


def _domain(held: HeldOutText, tokenizer: PreTrainedTokenizerBase, count: int, longest: int, notes: list[str]) -> PairDomain:
    """The first pairs of a domain of which no side is too long."""
    pairs: list[Pair] = []
    encoded: list[TokenSequence] = []
    left_out = 0
    for document in held.documents:
        if not isinstance(document, Pair):
            raise held.text.nothing_left(
                "held-out text to translate must be pairs of source and target, and this is plain text",
                expected='{"source": "...", "target": "..."} per line of a .jsonl, or two files: news.en+news.fr',
                remedy="give parallel text",
            )
        found = encode(tokenizer, [document], max_tokens=2 * longest, sequence_length=longest)
        pairs += [document] if found else []
        encoded += found
        left_out += not found
        if len(pairs) == count:
            break
    if left_out:
        notes.append(f"{held.name}: {left_out} pairs left out, of which a side has no token, or more than {longest}")
    if not pairs:
        raise held.text.nothing_left(
            "no held-out pair fits into the model", expected=f"sides of at most {longest} tokens", remedy="give shorter pairs"
        )
    return PairDomain(held.name, held.expert, encoded, pairs=pairs)


@dataclass
class _Translator:
    """Runs every row over all domains; one model is in memory at a time."""

    _checkpoint: Checkpoint
    _tokenizer: PreTrainedTokenizerBase
    _domains: Sequence[PairDomain]
    _decoding: Decoding
    _run: Run
    _notes: list[str]

    def __post_init__(self) -> None:
        self._begins = first_token(self._tokenizer, (pair for domain in self._domains for pair in domain.sequences))
        self._folds_weights = self._checkpoint.record.recipe.mixture.weights is not None
        self._own = {domain.name: domain.expert for domain in self._domains}
        self._have_tags = have_tags(domain.sequences for domain in self._domains)

    def rows(self, labels: Labels | None) -> list[WrittenRow]:
        """In the order of the table."""
        passes = 2 + (0 if self._folds_weights else len(self._checkpoint.names))
        if labels is not None and labels.by == "tag":  # by gate nothing is written anew
            passes += sum(kind != "none" or self._have_tags for _, kind in labels.rows())
        self._work = ProgressCount(self._run, passes * sum(len(domain.pairs) for domain in self._domains))
        asked = labels or Labels(kinds=())
        base = list(self._base(asked))
        return [*base[:1], *self._mixtures(asked), *base[1:]]

    def _base(self, labels: Labels) -> Iterator[WrittenRow]:
        reason = why_not(self._checkpoint, None, run=self._run)
        if reason is None:
            model = self._ready(load_expert_source(self._checkpoint, None, run=self._run))
            plain = self._row(model, BASE, "base")
            yield from (plain, *self._labelled_by_tag(model, plain, labels))
        else:
            self._notes.append(f"base left out, and so the comparison with it: {reason}")

    def _mixtures(self, labels: Labels) -> Iterator[WrittenRow]:
        checkpoint = self._checkpoint
        model = self._ready(load_model(checkpoint.folder, run=self._run))
        experts: list[WrittenRow] = []
        if self._folds_weights:
            self._notes.append("experts and oracle left out: given weights are folded into the experts: none is whole")
        else:
            for place, name in enumerate(checkpoint.names):
                with mixture_of(model, checkpoint).forced(place):
                    experts.append(self._row(model, name, "expert"))
                yield experts[-1]
            own = {each.name: experts[each.expert].written[each.name] for each in self._domains if each.expert is not None}
            yield WrittenRow(ORACLE, "oracle", own)
        mixture = self._row(model, MIXTURE, "mixture")
        yield from (mixture, *self._labelled_by_gate(experts, mixture, labels), *self._labelled_by_tag(model, mixture, labels))

    def _labelled_by_gate(self, experts: Sequence[WrittenRow], mixture: WrittenRow, labels: Labels) -> Iterator[WrittenRow]:
        """All weight on the expert whose label a domain gets: what that has written already."""
        for kind in labels.kinds if labels.by == "gate" else ():
            places = label_places(kind, self._own, self._checkpoint.record.recipe)
            written = {name: (mixture if at is None else experts[at]).written[name] for name, at in places.items()}
            if written:
                yield WrittenRow(labels.row(MIXTURE, kind), "label", written, MIXTURE)

    def _labelled_by_tag(self, model: PreTrainedModel, plain: WrittenRow, labels: Labels) -> Iterator[WrittenRow]:
        """The tag of a label before every source; without one what the model wrote of it as it is, unless that has a tag."""
        recipe, known = self._checkpoint.record.recipe, labels_of(self._tokenizer)
        for kind in labels.kinds if labels.by == "tag" else ():
            places = label_places(kind, self._own, recipe)
            if not places:
                continue
            name, tags = labels.row(plain.name, kind), label_tags(places, recipe, known)
            sources = {
                each.name: with_tag(self._tokenizer, each.sequences, tags[each.name])
                for each in self._domains
                if each.name in tags
            }
            row = plain if kind == "none" and not self._have_tags else self._row(model, name, "label", sources)
            yield replace(row, name=name, kind="label", model=plain.name)

    def _ready(self, model: PreTrainedModel) -> PreTrainedModel:
        """A model that writes as is asked, and has written something: what is slow the first time is not measured."""
        forced = set_decoding(model, replace(self._decoding, max_new_tokens=1), self._begins)
        translated(model, self._tokenizer, self._domains[0].sequences[:1], 1)
        set_decoding(model, self._decoding, self._begins)
        begun = f"every translation is begun with {self._tokenizer.convert_ids_to_tokens(self._begins)!r}" if forced else ""
        if forced and not any(note.startswith(begun) for note in self._notes):
            self._notes.append(f"{begun}, as the tokenizer begins targets: the model's generation_config.json forces none")
        return model

    def _row(
        self, model: PreTrainedModel, name: str, kind: Kind, sources: Mapping[str, Sequence[TokenSequence]] | None = None
    ) -> WrittenRow:
        """A row of what a model writes of `sources` by domain, of every domain's as they are where none are given."""
        read = {domain.name: domain.sequences for domain in self._domains} if sources is None else sources
        advance, batch = partial(self._work.advance, f"translate: {name}"), self._decoding.batch
        advance(0)
        return WrittenRow(
            name, kind, {domain: translated(model, self._tokenizer, each, batch, advance) for domain, each in read.items()}
        )


def _results(
    checkpoint: Checkpoint,
    domains: Sequence[PairDomain],
    rows: Sequence[WrittenRow],
    settings: TranslationSettings,
    notes: Sequence[str],
) -> TranslationResults:
    scorer = Scorer()
    scored = [_scored(checkpoint, row, domains, scorer) for row in rows]
    differences, examples = _against_base(scorer, domains, rows)
    records = {each.name: ReadText(**text_record(each.pairs, sum(s.size for s in each.sequences))) for each in domains}
    return TranslationResults(
        scored,
        *known_and_unseen(domains),
        settings,
        scorer.signatures,
        records,
        differences,
        examples,
        [*notes, *_notes(domains, scored, settings)],
        checkpoint=checkpoint.identity,
    )


def _scored(checkpoint: Checkpoint, row: WrittenRow, domains: Sequence[PairDomain], scorer: Scorer) -> TranslationRow:
    scores = {
        domain.name: scorer.corpus(row.written[domain.name].texts, [pair.target for pair in domain.pairs])
        for domain in domains
        if domain.name in row.written
    }
    sizes, every = checkpoint.parameters, together(row.written.values())
    dense = row.kind in ("base", "expert") or row.model == BASE
    total, active = (sizes.dense, sizes.dense) if dense else (sizes.total, sizes.active)
    return TranslationRow(row.name, row.kind, total, active, scores, every.tokens, every.seconds, every.cut)


def _against_base(
    scorer: Scorer, domains: Sequence[PairDomain], rows: Sequence[WrittenRow]
) -> tuple[dict[str, Compared], list[TranslationExample]]:
    """Per domain how often the mixture is better and worse than the base, and examples of both."""
    by_kind: dict[str, WrittenRow] = {row.kind: row for row in rows if row.kind != "expert"}
    if "base" not in by_kind:
        return {}, []
    counted: dict[str, Compared] = {}
    examples: list[TranslationExample] = []
    for domain in domains:
        texts = {each: by_kind[each].written[domain.name].texts for each in ("base", "mixture")}
        if "oracle" in by_kind and domain.name in by_kind["oracle"].written:
            texts["own"] = by_kind["oracle"].written[domain.name].texts
        counted[domain.name], found = compared(scorer, domain.name, domain.pairs, texts)
        examples += found
    return counted, examples


def _notes(domains: Sequence[PairDomain], rows: Sequence[TranslationRow], settings: TranslationSettings) -> Iterator[str]:
    """What has to be said of every such table."""
    yield f"pairs: {', '.join(f'{domain.name} {len(domain.pairs)}' for domain in domains)}"
    yield "scores are of a domain's whole corpus, by sacrebleu; mean: the arithmetic mean of the domains that have an expert"
    if any(row.kind == "expert" for row in rows):
        yield "an expert's row is the mixture with all weight on it; oracle: each domain by its own expert"
    yield f"tokens per second were measured on this machine ({settings.machine}), {settings.batch} sources at a time"
    cut = [f"{row.name} {row.cut}" for row in rows if row.cut and row.kind != "oracle"]
    if cut:
        yield f"translations that ended at the limit of {settings.max_new_tokens} tokens: {'; '.join(cut)}"


def _score_gains(with_label: TranslationScore, without: TranslationScore) -> list[Gain]:
    return [Gain(with_label.bleu - without.bleu, "BLEU", 1), Gain(with_label.chrf - without.chrf, "chrF", 1)]
