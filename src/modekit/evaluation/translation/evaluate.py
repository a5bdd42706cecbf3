"""`modekit eval OUT --translate`: what base, experts, oracle and mixture write of held-out sources, scored by sacrebleu.

Every row translates the same sources in the same way. An expert's row is the mixture with all weight on it; the oracle has,
in each domain, what the domain's own expert wrote.

    OUT/results/translate.json, translate.md    BLEU and chrF per domain, speed, and where mixture and base differ most
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.errors import MismatchError
from modekit.evaluation.domains import held_out_texts
from modekit.evaluation.results import Kind
from modekit.evaluation.results_folder import write_results
from modekit.evaluation.translation.decoding import Decoding, Written, first_token, set_decoding, together, translated
from modekit.evaluation.translation.examples import Compared, TranslationExample, compared
from modekit.evaluation.translation.results import TranslationResults, TranslationRow
from modekit.evaluation.translation.scores import Scorer, require_sacrebleu
from modekit.files.write import json_bytes
from modekit.loaded.load import load_model, load_tokenizer
from modekit.loaded.shapes import mixture_of
from modekit.recipes.strict import BASE
from modekit.run import QUIET, Run
from modekit.text.held_out import HeldOutText
from modekit.text.pairs import Pair
from modekit.text.sequences import TokenSequence, encode
from modekit.text.splits import text_record

TRANSLATE_FILE = "translate.json"
ORACLE, MIXTURE = "oracle", "mixture"
_LONGEST = 512  # tokens of a side, as `modekit eval` reads them


@dataclass(frozen=True)
class _Domain:
    """Pairs of one domain; `expert` is the place of its own, None for an unseen domain."""

    name: str
    expert: int | None
    pairs: Sequence[Pair]
    encoded: Sequence[TokenSequence]

    @property
    def references(self) -> list[str]:
        return [pair.target for pair in self.pairs]


@dataclass(frozen=True)
class _Row:
    """A row before it is scored."""

    name: str
    kind: Kind
    written: Mapping[str, Written]


def evaluate_translation(
    checkpoint: Checkpoint, *, pairs: int = 200, decoding: Decoding | None = None, run: Run = QUIET, write: bool = True
) -> TranslationResults:
    """Translate so many pairs per domain and, with `write`, write OUT/results/translate.json and translate.md.

    Raises MismatchError for a mixture without an encoder, ModekitError without sacrebleu, TextError when a domain has no
    held-out pairs or none that fits into the model, SourceError when a model cannot be loaded.
    """
    _check_encoder(checkpoint)
    require_sacrebleu()
    notes: list[str] = []
    tokenizer = load_tokenizer(checkpoint.folder, run=run)
    positions: Any = checkpoint.config.get("max_position_embeddings")
    longest = min(_LONGEST, positions or _LONGEST)
    domains = [_domain(held, tokenizer, pairs, longest, notes) for held in held_out_texts(checkpoint)]
    decoding = decoding or Decoding()
    if positions is not None and decoding.max_new_tokens > positions:
        decoding = replace(decoding, max_new_tokens=positions)
    rows = _Translator(checkpoint, tokenizer, domains, decoding, run, notes).rows()
    results = _results(checkpoint, domains, rows, {**vars(decoding), "pairs": pairs, "machine": _machine()}, notes)
    if write:
        write_results(checkpoint, {TRANSLATE_FILE: json_bytes(results.as_data()), "translate.md": results.markdown().encode()})
    return results


def _check_encoder(checkpoint: Checkpoint) -> None:
    family = checkpoint.shape.family
    if not family.pair:
        raise MismatchError(
            "only a model with an encoder translates", where=f"{checkpoint.folder}: --translate",
            found=f"a mixture of {family.model_type} models, which write a text on",
            expected="Bart, mBART, Marian, M2M100 or T5", remedy="leave out --translate: modekit eval scores such a mixture",
        )  # fmt: skip


def _domain(held: HeldOutText, tokenizer: PreTrainedTokenizerBase, count: int, longest: int, notes: list[str]) -> _Domain:
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
    return _Domain(held.name, held.expert, pairs, encoded)


class _Translator:
    """Runs every row over all domains; one model is in memory at a time."""

    def __init__(
        self, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, domains: Sequence[_Domain], decoding: Decoding,
        run: Run, notes: list[str],
    ) -> None:  # fmt: skip
        self._checkpoint, self._tokenizer, self._domains = checkpoint, tokenizer, domains
        self._decoding, self._run, self._notes = decoding, run, notes
        self._begins = first_token(tokenizer, (pair for domain in domains for pair in domain.encoded))
        self._folds_weights = checkpoint.record.recipe.mixture.weights is not None
        passes = 2 + (0 if self._folds_weights else len(checkpoint.names))
        self._done, self._total = 0, passes * sum(len(domain.pairs) for domain in domains)

    def rows(self) -> list[_Row]:
        """In the order of the table."""
        return [*self._base(), *self._mixtures()]

    def _base(self) -> Iterator[_Row]:
        folder = self._checkpoint.source_folder(self._checkpoint.record.sources[0])
        if folder.is_dir():
            yield self._row(self._ready(load_model(folder, run=self._run)), BASE, "base")
        else:
            self._notes.append("base left out, and so the comparison with it: it is no longer where the recipe found it")

    def _mixtures(self) -> Iterator[_Row]:
        checkpoint = self._checkpoint
        model = self._ready(load_model(checkpoint.folder, run=self._run))
        if self._folds_weights:
            self._notes.append("experts and oracle left out: given weights are folded into the experts: none is whole")
        else:
            experts = []
            for place, name in enumerate(checkpoint.names):
                with mixture_of(model, checkpoint).forced(place):
                    experts.append(self._row(model, name, "expert"))
                yield experts[-1]
            own = {each.name: experts[each.expert].written[each.name] for each in self._domains if each.expert is not None}
            yield _Row(ORACLE, "oracle", own)
        yield self._row(model, MIXTURE, "mixture")

    def _ready(self, model: PreTrainedModel) -> PreTrainedModel:
        """A model that writes as is asked, and has written something: what is slow the first time is not measured."""
        forced = set_decoding(model, replace(self._decoding, max_new_tokens=1), self._begins)
        translated(model, self._tokenizer, self._domains[0].encoded[:1], 1)
        set_decoding(model, self._decoding, self._begins)
        begun = f"every translation is begun with {self._tokenizer.convert_ids_to_tokens(self._begins)!r}" if forced else ""
        if forced and not any(note.startswith(begun) for note in self._notes):
            self._notes.append(f"{begun}, as the tokenizer begins targets: the model's generation_config.json forces none")
        return model

    def _row(self, model: PreTrainedModel, name: str, kind: Kind) -> _Row:
        def advance(count: int) -> None:
            self._done += count
            self._run.progress(f"translate: {name}", self._done, self._total)

        batch = self._decoding.batch
        return _Row(name, kind, {
            domain.name: translated(model, self._tokenizer, domain.encoded, batch, advance) for domain in self._domains
        })  # fmt: skip


def _results(
    checkpoint: Checkpoint, domains: Sequence[_Domain], rows: Sequence[_Row], settings: Mapping[str, Any], notes: Sequence[str]
) -> TranslationResults:
    scorer = Scorer()
    scored = [_scored(checkpoint, row, domains, scorer) for row in rows]
    differences, examples = _against_base(scorer, domains, rows)
    records = {each.name: text_record(each.pairs, sum(pair.size for pair in each.encoded)) for each in domains}
    return TranslationResults(
        scored,
        [domain.name for domain in domains if domain.expert is not None],
        [domain.name for domain in domains if domain.expert is None],
        settings, scorer.signatures, records, differences, examples, checkpoint.identity,
        [*notes, *_notes(domains, scored, settings)],
    )  # fmt: skip


def _scored(checkpoint: Checkpoint, row: _Row, domains: Sequence[_Domain], scorer: Scorer) -> TranslationRow:
    scores = {
        domain.name: scorer.corpus(row.written[domain.name].texts, domain.references)
        for domain in domains
        if domain.name in row.written
    }
    sizes, every = checkpoint.parameters, together(row.written.values())
    total, active = (sizes.dense, sizes.dense) if row.kind in ("base", "expert") else (sizes.total, sizes.active)
    return TranslationRow(row.name, row.kind, total, active, scores, every.tokens, every.seconds, every.cut)


def _against_base(
    scorer: Scorer, domains: Sequence[_Domain], rows: Sequence[_Row]
) -> tuple[dict[str, Compared], list[TranslationExample]]:
    """Per domain how often the mixture is better and worse than the base, and examples of both."""
    by_kind: dict[str, _Row] = {row.kind: row for row in rows if row.kind != "expert"}
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


def _notes(domains: Sequence[_Domain], rows: Sequence[TranslationRow], settings: Mapping[str, Any]) -> Iterator[str]:
    """What has to be said of every such table."""
    yield f"pairs: {', '.join(f'{domain.name} {len(domain.pairs)}' for domain in domains)}"
    yield "scores are of a domain's whole corpus, by sacrebleu; mean: the arithmetic mean of the domains that have an expert"
    if any(row.kind == "expert" for row in rows):
        yield "an expert's row is the mixture with all weight on it; oracle: each domain by its own expert"
    yield f"tokens per second were measured on this machine ({settings['machine']}), {settings['batch']} sources at a time"
    cut = [f"{row.name} {row.cut}" for row in rows if row.cut and row.kind != "oracle"]
    if cut:
        yield f"translations that ended at the limit of {settings['max_new_tokens']} tokens: {', '.join(cut)}"


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"processor, {torch.get_num_threads()} threads"
