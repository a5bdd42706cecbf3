"""What of every expert does a mixture carry? `modekit verify --deep OUT`: gates forced on one expert, beside its own model.

The own model is PEFT's of base and adapter, the full model, or the base. Both read the same held-out text; per predicted token

    KL(own || forced) = sum_v p_own(v) (log p_own(v) - log p_forced(v))        in nats, in float64

Shape legend: N predicted tokens of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from transformers import PreTrainedModel

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.sources import why_not
from modekit.errors import SourceError, TextError, UnsupportedError
from modekit.evaluation.domains import Domain, domain_of, held_out_domains
from modekit.evaluation.identity import ReadSequences
from modekit.evaluation.loss import not_finite, tokens_per_pass
from modekit.evaluation.results_folder import CheckpointResult
from modekit.evaluation.tables import Cell, ResultTable
from modekit.files.figures import three_digits
from modekit.files.typed import Count, Label, Number
from modekit.loaded.experts import OwnModel, load_expert_source, load_own_model
from modekit.loaded.load import load_model, load_tokenizer
from modekit.loaded.passes import predicted_logits, tokens_per_batch
from modekit.loaded.shapes import mixture_of
from modekit.run import QUIET, ProgressCount, Run
from modekit.text.amounts import FORCED_TOKENS
from modekit.text.held_out import DomainText, HeldOutText
from modekit.text.sequences import NO_LABEL, Batch, make_batches
from modekit.text.shipped import shipped_documents

SHIPPED = "general"
OWN_TEXT, OTHER_TEXTS = "its own", "all others"
_SAME = 1e-9  # nats per token: models that are no further apart are one, and a share of that means nothing
_AT_ONCE = 2**22  # numbers in float64


@dataclass(frozen=True)
class ForcedExpert:
    """A mixture whose gates are forced on an expert, beside the expert's own model, on one text.

    Attributes:
        largest: largest absolute difference of log-probabilities, own and forced, over tokens and vocabulary.
        kl, base_kl: KL(own || forced) and KL(own || base), and losses: means in nats per token.
    """

    expert: Label
    text: Label
    tokens: Count
    largest: Number
    kl: Number
    base_kl: Number
    own_loss: Number
    forced_loss: Number
    base_loss: Number

    @property
    def not_carried(self) -> float | None:
        """KL(own || forced) / KL(own || base): 0 = the whole expert, 1 = nothing; None where own model and base are one."""
        return self.kl / self.base_kl if self.base_kl > _SAME else None


@dataclass(frozen=True)
class ForcedExperts(CheckpointResult):
    """forced.json: every expert on every text. `own_text`: the text of each expert that has one; `own_models`: how its own
    model was made.
    """

    rows: Annotated[Sequence[ForcedExpert], Field(min_length=1, max_length=2**16)]
    text: Mapping[Label, ReadSequences]
    own_text: Mapping[Label, Label]
    own_models: Mapping[Label, OwnModel]

    file = "forced.json"
    command = "modekit verify --deep"

    def by_expert(self) -> Iterator[ForcedExpert]:
        """Every expert on its own text, and on all others as one."""
        for expert in self.own_models:
            rows = [row for row in self.rows if row.expert == expert]
            own = [row for row in rows if row.text == self.own_text.get(expert)]
            yield from (replace(row, text=OWN_TEXT) for row in own)
            others = [row for row in rows if row not in own]
            if others:
                yield _pooled(others, OTHER_TEXTS if len(others) > 1 else others[0].text)

    def tables(self) -> list[ResultTable]:
        """Every expert on its own text and on all others; in detail on every text, and how its own model was made."""
        said = (
            "Every expert, gates forced on it, beside its own model on held-out text: KL in nats per token; not carried: KL "
            "over the base's KL (0 = the whole expert, 1 = nothing of it); largest difference of log-probabilities; losses."
        )
        made = [[expert, _MADE[how]] for expert, how in self.own_models.items()]
        return [
            ResultTable("Experts forced", _TITLES, [_cells(row) for row in self.by_expert()], said),
            ResultTable("Experts forced, every text", _TITLES, [_cells(row) for row in self.rows], detail=True),
            ResultTable("Own models", ["expert", "its own model"], made, detail=True, prose=True),
        ]


_TITLES = ["expert", "text", "KL", "not carried", "largest difference", "own loss", "forced loss", "base loss"]
_MADE: Mapping[OwnModel, str] = {
    "base": "the base",
    "full model": "the full model",
    "PEFT": "PEFT's of base and adapter",
    "folded": "the base with the adapter folded in, without PEFT",
}


def _cells(row: ForcedExpert) -> list[str | Cell]:
    figures = ["-" if figure is None else three_digits(figure) for figure in (row.kl, row.not_carried, row.largest)]
    return [row.expert, row.text, *figures, *(f"{loss:.4f}" for loss in (row.own_loss, row.forced_loss, row.base_loss))]


def _pooled(rows: Sequence[ForcedExpert], text: str) -> ForcedExpert:
    """Several texts of an expert as one."""
    tokens = sum(row.tokens for row in rows)
    means = ((row.kl, row.base_kl, row.own_loss, row.forced_loss, row.base_loss) for row in rows)
    weighted = ([mean * row.tokens for mean in own] for row, own in zip(rows, means, strict=True))
    pooled = (sum(sums) / tokens for sums in zip(*weighted, strict=True))
    return ForcedExpert(rows[0].expert, text, tokens, max(row.largest for row in rows), *pooled)


def force_experts(
    checkpoint: Checkpoint,
    *,
    tokens_per_domain: int = FORCED_TOKENS,
    sequence_length: int = 512,
    run: Run = QUIET,
) -> ForcedExperts:
    """Compare every expert, gates forced on it, with its own model, and write OUT/results/forced.json and forced.md.

    Read are at most `tokens_per_domain` of every domain that `eval` scores; where the recipe has no such text, of general
    English that comes with modekit. In memory are the mixture, one other model, and the base's logits. Raises UnsupportedError
    for folded weights, SourceError where base or experts are gone, CheckpointError for what is not finite, TextError.
    """
    if checkpoint.record.recipe.mixture.weights is not None:
        raise UnsupportedError(
            "fixed weights are folded into the experts, so no expert is whole in the mixture",
            where="mixture.weights",
            remedy="build without weights to compare the experts",
        )
    run.begin("read the text")
    domains, notes = _texts(checkpoint, tokens_per_domain, sequence_length, run)
    if checkpoint.record.trained:
        notes.append("the mixture was trained since the build: the changes count as not carried, too")
    why = [why_not(checkpoint, place, run=run) for place in range(len(checkpoint.names))]
    notes += [f"{name} is left out: {reason}" for name, reason in zip(checkpoint.names, why, strict=True) if reason]
    places = [place for place, reason in enumerate(why) if not reason]
    lacks_base = why_not(checkpoint, None, run=run)
    if lacks_base or not places:
        raise SourceError(
            "no expert can be compared with its own model and the base",
            where=str(checkpoint.folder),
            found=f"base: {lacks_base}" if lacks_base else notes[-1],
            remedy="put the models back where they were, or correct their paths and build again",
        )
    rows, own_models = _compared(checkpoint, places, domains, run)
    found = ForcedExperts(
        rows,
        {domain.name: domain.record for domain in domains},
        {checkpoint.names[domain.expert]: domain.name for domain in domains if domain.expert is not None},
        own_models,
        notes=notes,
        checkpoint=checkpoint.identity,
    )
    found.write(checkpoint)
    return found


def _texts(checkpoint: Checkpoint, tokens: int, length: int, run: Run) -> tuple[list[Domain], list[str]]:
    """Held-out text of every domain, or what comes with modekit, and what has to be said of it."""
    try:
        return held_out_domains(checkpoint, tokens_per_domain=tokens, sequence_length=length, run=run), []
    except TextError as error:
        if checkpoint.shape.family.pair:
            raise
        reason = error.what
    documents = shipped_documents(SHIPPED)
    held = HeldOutText(SHIPPED, None, documents, DomainText(documents, SHIPPED, None))
    tokenizer = load_tokenizer(checkpoint.folder, run=run)
    domain = domain_of(held, tokenizer, tokens_per_domain=tokens, sequence_length=length)
    note = (
        f"the text is general English that comes with modekit, as the recipe's cannot be read ({reason}): on the experts' own "
        "text, which says more, other shares may be carried"
    )
    return [domain], [note]


def _compared(
    checkpoint: Checkpoint, places: Sequence[int], domains: Sequence[Domain], run: Run
) -> tuple[list[ForcedExpert], dict[Label, OwnModel]]:
    """A row for each expert and domain; the own models are in memory one after the other."""
    count = ProgressCount(run, sum(domain.scored_tokens for domain in domains) * (1 + len(places)))
    base = load_expert_source(checkpoint, None, run=run)
    tokens = min(tokens_per_pass(base.config), tokens_per_batch(base))
    texts = {domain.name: list(make_batches(domain.sequences, tokens=tokens)) for domain in domains}
    of_base = {name: [_logits(base, batch, count, "run the base") for batch in batches] for name, batches in texts.items()}
    del base
    mixture = mixture_of(load_model(checkpoint.folder, run=run), checkpoint)
    rows, made = list[ForcedExpert](), dict[Label, OwnModel]()
    for place in places:
        name = checkpoint.names[place]
        own, made[name] = load_own_model(checkpoint, place, run=run)
        for text, batches in texts.items():
            sums, largest = torch.zeros(5, dtype=torch.float64), 0.0
            for batch, base_NV in zip(batches, of_base[text], strict=True):
                own_NV = _logits(own, batch, count, f"force {name}")
                with torch.inference_mode(), mixture.forced(place):
                    forced_NV = predicted_logits(mixture.model, batch)
                (kl, apart), (base_kl, _) = divergences(own_NV, forced_NV, base_NV)
                labels_N = batch.labels[batch.labels != NO_LABEL]
                losses = [
                    float(torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="none").double().sum())
                    for logits_NV in (own_NV, forced_NV, base_NV)
                ]
                sums += torch.tensor([kl, base_kl, *losses], dtype=torch.float64)
                largest = max(largest, apart)
            rows.append(_row(name, text, batches, largest, sums))
        del own
    return rows, made


def _row(name: str, text: str, batches: Sequence[Batch], largest: float, sums: torch.Tensor) -> ForcedExpert:
    if not torch.isfinite(sums).all():
        raise not_finite("the output of an expert or of its own model is", f"expert '{name}' on the text '{text}'")
    tokens = sum(batch.scored for batch in batches)
    return ForcedExpert(name, text, tokens, largest, *(sums / tokens).clamp(min=0.0).tolist())


def _logits(model: PreTrainedModel, batch: Batch, count: ProgressCount, phase: str) -> torch.Tensor:
    """What a model says of every predicted token, (N, V)."""
    count.advance(phase)
    with torch.inference_mode():
        logits_NV = predicted_logits(model, batch)
    count.advance(phase, batch.scored)
    return logits_NV


def divergences(own_NV: torch.Tensor, *others: torch.Tensor) -> list[tuple[float, float]]:
    """Of logits (N, V) and each other model's, over the vocabulary that all have: the sum over tokens of KL(own || other) in
    nats, and the largest |difference| of log-probabilities; in float64.
    """
    found = [(0.0, 0.0) for _ in others]
    width = min(logits.shape[1] for logits in (own_NV, *others))
    step = max(1, _AT_ONCE // width)
    for start in range(0, len(own_NV), step):
        own, *rest = (each[start : start + step, :width].double().log_softmax(-1) for each in (own_NV, *others))
        p_own = own.exp()
        for place, other in enumerate(rest):
            kl, largest = found[place]
            found[place] = kl + float((p_own * (own - other)).sum()), max(largest, float((own - other).abs().max()))
    return found
