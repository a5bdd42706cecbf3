"""`modekit eval-translation OUT`: what base, experts, oracle and mixture write of held-out sources, scored by sacrebleu.

Every row translates the same sources in the same way, greedily or by beams. An expert's row is the mixture with all weight on
it. Sources of similar length share a batch. Pads are masked, so that who shares a batch with whom decides nothing but ties.

Shape legend: B batch, S tokens of a source, W written tokens with what the decoder starts with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.sources import why_not
from modekit.errors import MismatchError, check_packages
from modekit.evaluation.domains import Advance, Domain, held_out_texts, known_and_unseen, only_finite
from modekit.evaluation.rows import Labels, RowJob, label_jobs, mixture_jobs, run_jobs
from modekit.evaluation.translation.results import Decoding, TranslationResults, TranslationRow, TranslationScore
from modekit.loaded.experts import load_expert_source
from modekit.loaded.load import load_tokenizer
from modekit.recipes.strict import BASE
from modekit.run import QUIET, Run
from modekit.text.document import Pair
from modekit.text.held_out import HeldOutText
from modekit.text.sequences import TokenSequence, encode

_LONGEST = 512  # tokens of a side, as `modekit eval` reads them
_NEUTRAL: dict[str, Any] = {
    "do_sample": False,
    "min_length": 0,
    "min_new_tokens": None,
    "length_penalty": 1.0,
    "early_stopping": False,
    "no_repeat_ngram_size": 0,
    "repetition_penalty": 1.0,
    "num_return_sequences": 1,
}
"""In place of what generation_config.json says; which tokens a translation may have, and where, stays as it says."""


class Scorer:
    """sacrebleu's BLEU and chrF with its own defaults. Raises ModekitError when the extra is not installed."""

    def __init__(self) -> None:
        check_packages(("sacrebleu.metrics",), "pip install 'modekit[translation]'")
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF

        self._metrics = BLEU(force=True), CHRF()  # force: no warning of text that looks tokenized

    @property
    def signature(self) -> str:
        """Of what was computed; something must have been."""
        return "; ".join(str(metric.get_signature()) for metric in self._metrics)

    def corpus(self, texts: Sequence[str], references: Sequence[str]) -> TranslationScore:
        """Of translations against one reference each."""
        found = [metric.corpus_score(list(texts), [list(references)]) for metric in self._metrics]
        return TranslationScore(*(float(each.score) for each in found))


def evaluate_translation(
    checkpoint: Checkpoint,
    *,
    pairs: int = 200,
    decoding: Decoding | None = None,
    labels: Labels | None = None,
    run: Run = QUIET,
) -> TranslationResults:
    """Translate so many pairs per domain, and write OUT/results/translate.json and translate.md.

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
    scorer, notes, tokenizer = Scorer(), list[str](), load_tokenizer(checkpoint.folder, run=run)
    decoding, longest, positions = decoding or Decoding(), _LONGEST, checkpoint.config.get("max_position_embeddings")
    if isinstance(positions, int):
        longest = min(longest, positions - (labels == "tag"))
        decoding = replace(decoding, max_new_tokens=min(decoding.max_new_tokens, positions))
    read = [_domain(held, tokenizer, pairs, longest, notes) for held in held_out_texts(checkpoint)]
    domains, targets = [domain for domain, _ in read], {domain.name: targets for domain, targets in read}
    jobs = list(_jobs(checkpoint, notes, run))
    jobs += [] if labels is None else label_jobs(checkpoint, labels, domains, tokenizer, jobs)
    begins = first_token(tokenizer, (pair for domain in domains for pair in domain.sequences))
    if begins is not None:
        notes.append(
            f"every translation is begun with {tokenizer.convert_ids_to_tokens(begins)!r}, as the tokenizer begins targets, "
            "unless a model's generation_config.json forces another token"
        )

    def score(model: PreTrainedModel, domain: Domain, advance: Advance) -> TranslationScore:
        with only_finite(model):
            texts = translated(model, tokenizer, domain.sequences, decoding, begins=begins, advance=advance)
        return scorer.corpus(texts, targets[domain.name])

    found = run_jobs(checkpoint, jobs, domains, score, run)
    rows = [TranslationRow(job.name, job.kind, *parameters, scores) for job, parameters, scores in found]
    notes += [
        f"pairs: {', '.join(f'{domain.name} {len(domain.sequences)}' for domain in domains)}",
        "mean: of the domains that have an expert; an expert's row is the mixture with all weight on it",
    ]
    known, unseen = known_and_unseen(domains)
    results = TranslationResults(rows, known, unseen, decoding, scorer.signature, notes=notes, checkpoint=checkpoint.identity)
    results.write(checkpoint)
    return results


def _jobs(checkpoint: Checkpoint, notes: list[str], run: Run) -> Iterator[RowJob]:
    """The base, while it is there, and the mixture: forced on every expert, on each domain's own, and as it is."""
    reason = why_not(checkpoint, None, run=run)
    if reason is None:
        yield RowJob(BASE, "base", "", partial(load_expert_source, checkpoint, None, run=run), dense=True)
    else:
        notes.append(f"base left out: {reason}")
    if checkpoint.record.recipe.mixture.weights is not None:
        notes.append("experts and oracle left out: given weights are folded into the experts: none is whole")
    yield from mixture_jobs(checkpoint, run, experts=True)


def _domain(
    held: HeldOutText, tokenizer: PreTrainedTokenizerBase, count: int, longest: int, notes: list[str]
) -> tuple[Domain, list[str]]:
    """The first pairs of a domain of which no side is too long, and their targets."""
    targets, encoded, left_out = list[str](), list[TokenSequence](), 0
    for document in held.documents:
        if not isinstance(document, Pair):
            raise held.text.nothing_left(
                "held-out text to translate must be pairs of source and target, and this is plain text",
                expected='{"source": "...", "target": "..."} per line of a .jsonl',
                remedy="give parallel text",
            )
        found = encode(tokenizer, [document], max_tokens=2 * longest, sequence_length=longest)
        targets += [document.target] if found else []
        encoded += found
        left_out += not found
        if len(encoded) == count:
            break
    if left_out:
        notes.append(f"{held.name}: {left_out} pairs left out, of which a side has no token, or more than {longest}")
    if not encoded:
        raise held.text.nothing_left(
            "no held-out pair fits into the model", expected=f"sides of at most {longest} tokens", remedy="give shorter pairs"
        )
    return Domain(held.name, held.expert, encoded), targets


def first_token(tokenizer: PreTrainedTokenizerBase, pairs: Iterable[TokenSequence]) -> int | None:
    """The special token with which the tokenizer begins every target, such as a language; None where there is none."""
    special = {*tokenizer.all_special_ids} - {tokenizer.eos_token_id, tokenizer.unk_token_id}
    begins = {pair.target[0] for pair in pairs}
    return begins.pop() if len(begins) == 1 and begins <= special else None


def translated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[TokenSequence],
    decoding: Decoding,
    *,
    begins: int | None = None,
    advance: Advance = lambda _count: None,
) -> list[str]:
    """Translate the sources of pairs. `begins` is the first token, where the model's own settings force none; `advance` gets
    how many tokens the targets have of what is done.
    """
    texts = [""] * len(pairs)
    own: Any = model.generation_config
    settings = {**_NEUTRAL, "num_beams": decoding.beams, "max_new_tokens": decoding.max_new_tokens}
    if own.forced_bos_token_id is None and begins is not None:
        settings["forced_bos_token_id"] = begins
    longest_first = sorted(range(len(pairs)), key=lambda row: (-len(pairs[row].ids), row))
    for start in range(0, len(pairs), decoding.batch):
        rows = longest_first[start : start + decoding.batch]
        ids = [torch.tensor(pairs[row].ids) for row in rows]
        ids_BS = pad_sequence(ids, batch_first=True, padding_value=own.pad_token_id or 0).to(model.device)
        mask_BS = pad_sequence([torch.ones_like(each) for each in ids], batch_first=True).to(model.device)
        with torch.inference_mode():
            out_BW: Any = model.generate(input_ids=ids_BS, attention_mask=mask_BS, **settings)
        for row, text in zip(rows, tokenizer.batch_decode(out_BW[:, 1:], skip_special_tokens=True), strict=True):
            texts[row] = text.strip()
        advance(sum(pairs[row].scored for row in rows))
    return texts
