"""`modekit eval-translation OUT`: what base, experts, oracle and mixture write of held-out sources, scored by sacrebleu.

Every row translates the same sources in the same way. An expert's row is the mixture with all weight on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from modekit.evaluation.jobs import RowJob, label_jobs, mixture_jobs
from modekit.evaluation.labels import Gain, Labels, check_labels, label_notes, longest_with_tag
from modekit.evaluation.loss import only_finite
from modekit.evaluation.translation.decoding import Decoding, first_token, set_decoding, together, translated
from modekit.evaluation.translation.results import (
    Scorer,
    TranslationResults,
    TranslationRow,
    TranslationScore,
    TranslationSettings,
    require_sacrebleu,
)
from modekit.loaded.experts import load_recorded
from modekit.loaded.load import load_tokenizer
from modekit.recipes.strict import BASE
from modekit.run import QUIET, ProgressCount, Run
from modekit.text.document import Pair
from modekit.text.held_out import HeldOutText
from modekit.text.sequences import TokenSequence, encode
from modekit.text.splits import text_record

_LONGEST = 512  # tokens of a side, as `modekit eval` reads them


@dataclass(frozen=True)
class PairDomain(Domain):
    """A domain with the pairs that its sequences are of."""

    pairs: Sequence[Pair] = ()


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
    TextError when a domain has no held-out pairs or none that fits into the model, SourceError when a model cannot be loaded,
    CheckpointError where the output of a model is not finite.
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
    longest, decoding = min(_LONGEST, positions or _LONGEST), decoding or Decoding()
    if positions is not None and decoding.max_new_tokens > positions:
        decoding = replace(decoding, max_new_tokens=positions)
    if labels is not None:
        check_labels(checkpoint, labels, tokenizer)
        longest = longest_with_tag(longest, checkpoint) if labels.by == "tag" else longest
    domains = [_domain(held, tokenizer, pairs, longest, notes) for held in held_out_texts(checkpoint)]
    jobs = list(_jobs(checkpoint, notes, run))
    jobs += [] if labels is None else label_jobs(checkpoint, labels, domains, tokenizer, jobs)
    scorer = Scorer()
    rows = list(_Translator(checkpoint, tokenizer, domains, decoding, run, notes).rows(jobs, scorer))
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"processor, {torch.get_num_threads()} threads"
    settings = TranslationSettings(**vars(decoding), pairs=pairs, machine=machine)
    notes += _notes(domains, rows, settings)
    known, unseen = known_and_unseen(domains)
    if labels is not None:
        means = {row.name: mean for row in rows if (mean := row.mean(known)) is not None}
        notes += label_notes(labels, domains, checkpoint.record.recipe, means, _score_gains)
    records = {each.name: ReadText(**text_record(each.pairs, sum(s.size for s in each.sequences))) for each in domains}
    results = TranslationResults(
        rows, known, unseen, settings, scorer.signatures, records, notes=notes, checkpoint=checkpoint.identity
    )
    if write:
        results.write(checkpoint)
    return results


def _jobs(checkpoint: Checkpoint, notes: list[str], run: Run) -> Iterator[RowJob]:
    """The base, while it is there, and the mixture: forced on every expert, on each domain's own, and as it is."""
    reason = why_not(checkpoint, None, run=run)
    if reason is None:
        yield RowJob(BASE, "base", "", partial(load_recorded, checkpoint, 0, run=run), dense=True)
    else:
        notes.append(f"base left out: {reason}")
    if checkpoint.record.recipe.mixture.weights is not None:
        notes.append("experts and oracle left out: given weights are folded into the experts: none is whole")
    yield from mixture_jobs(checkpoint, run, experts=True)


def _domain(held: HeldOutText, tokenizer: PreTrainedTokenizerBase, count: int, longest: int, notes: list[str]) -> PairDomain:
    """The first pairs of a domain of which no side is too long."""
    pairs: list[Pair] = []
    encoded: list[TokenSequence] = []
    left_out = 0
    for document in held.documents:
        if not isinstance(document, Pair):
            raise held.text.nothing_left(
                "held-out text to translate must be pairs of source and target, and this is plain text",
                expected='{"source": "...", "target": "..."} per line of a .jsonl',
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

    def rows(self, jobs: Sequence[RowJob], scorer: Scorer) -> Iterator[TranslationRow]:
        """In the order of the jobs. Several of one model load it once."""
        texts = [{each.name: text for each in self._domains if (text := job.text(each)) is not None} for job in jobs]
        work = ProgressCount(self._run, sum(len(text.sequences) for read in texts for text in read.values()))
        sizes, loaded, model = self._checkpoint.parameters, None, None
        for job, read in zip(jobs, texts, strict=True):
            advance = partial(work.advance, f"translate: {job.name}")
            advance(0)
            if model is None or job.load is not loaded:
                model = None
                model, loaded = self._ready(job.load()), job.load
            written = {}
            for name, text in read.items():
                with job.within(model, text), only_finite(model, job.name):
                    written[name] = translated(model, self._tokenizer, text.sequences, self._decoding.batch, advance)
            scores = {
                each.name: scorer.corpus(written[each.name].texts, [pair.target for pair in each.pairs])
                for each in self._domains
                if each.name in written
            }
            every = together(written.values())
            total, active = (sizes.dense, sizes.dense) if job.dense or job.kind == "expert" else (sizes.total, sizes.active)
            yield TranslationRow(job.name, job.kind, total, active, scores, every.tokens, every.seconds, every.cut)

    def _ready(self, model: PreTrainedModel) -> PreTrainedModel:
        """A model that writes as is asked, and has written something: what is slow the first time is not measured."""
        forced = set_decoding(model, replace(self._decoding, max_new_tokens=1), self._begins)
        translated(model, self._tokenizer, self._domains[0].sequences[:1], 1)
        set_decoding(model, self._decoding, self._begins)
        begun = f"every translation is begun with {self._tokenizer.convert_ids_to_tokens(self._begins)!r}" if forced else ""
        if forced and not any(note.startswith(begun) for note in self._notes):
            self._notes.append(f"{begun}, as the tokenizer begins targets: the model's generation_config.json forces none")
        return model


def _notes(domains: Sequence[PairDomain], rows: Sequence[TranslationRow], settings: TranslationSettings) -> Iterator[str]:
    """What has to be said of every such table."""
    yield f"pairs: {', '.join(f'{domain.name} {len(domain.pairs)}' for domain in domains)}"
    yield "mean: the arithmetic mean of the domains that have an expert"
    if any(row.kind == "expert" for row in rows):
        yield "an expert's row is the mixture with all weight on it; oracle: each domain by its own expert"
    yield f"tokens per second were measured on this machine ({settings.machine}), {settings.batch} sources at a time"
    cut = [f"{row.name} {row.cut}" for row in rows if row.cut and row.kind != "oracle"]
    if cut:
        yield f"translations that ended at the limit of {settings.max_new_tokens} tokens: {'; '.join(cut)}"


def _score_gains(with_label: TranslationScore, without: TranslationScore) -> list[Gain]:
    return [Gain(with_label.bleu - without.bleu, "BLEU", 1), Gain(with_label.chrf - without.chrf, "chrF", 1)]
