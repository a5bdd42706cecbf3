"""What of every expert does a mixture carry? `modekit verify --deep OUT`: gates forced on one expert, beside its own model.

The own model is PEFT's of base and adapter, the full model, or the base. Both read the same held-out text; per predicted token

    KL(own || forced) = sum_v p_own(v) (log p_own(v) - log p_forced(v))        in nats, in float64

of which a token counts one nat at most, so that no single token decides what is said of all.

Shape legend: N predicted tokens of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from transformers import PreTrainedModel

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.sources import why_not
from modekit.errors import SourceError, TextError, UnsupportedError
from modekit.evaluation.domains import Domain, held_out_domains, not_finite, tokens_per_pass
from modekit.evaluation.results_folder import Result
from modekit.evaluation.tables import ResultTable
from modekit.files.figures import or_dash
from modekit.files.typed import Count, Label, Number
from modekit.loaded.experts import OwnModel, load_expert_source, load_own_model
from modekit.loaded.load import load_model, load_tokenizer
from modekit.loaded.passes import predicted_logits, tokens_per_batch
from modekit.loaded.shapes import mixture_of
from modekit.run import QUIET, ProgressCount, Run
from modekit.text.amounts import FORCED_TOKENS
from modekit.text.sequences import NO_LABEL, Batch, encode, make_batches
from modekit.text.shipped import shipped_documents

SHIPPED = "general"
SAME = 1e-9  # nats per token: models that are no further apart are one, and a share of that means nothing
MOST_NATS = 1.0
"""What the KL of one token counts at most where what is lost is said of all."""
_AT_ONCE = 2**22  # numbers in float64


@dataclass(frozen=True)
class ForcedExpert:
    """A mixture whose gates are forced on an expert, beside the expert's own model, on one text.

    Attributes:
        own_model: how it was made: the base, the full model, PEFT's of base and adapter, or the adapter folded in without PEFT.
        largest: largest absolute difference of log-probabilities, own and forced, over tokens and vocabulary.
        kl, base_kl: KL(own || forced) and KL(own || base), and losses: means in nats per token.
    """

    expert: Label
    text: Label
    own_model: OwnModel
    tokens: Count
    largest: Number
    kl: Number
    base_kl: Number
    own_loss: Number
    forced_loss: Number
    base_loss: Number

    @property
    def lost(self) -> float | None:
        """KL(own || forced) / KL(own || base): 0 = the whole expert, 1 = nothing; None where own model and base are one."""
        return self.kl / self.base_kl if self.base_kl > SAME else None


@dataclass(frozen=True)
class ForcedExperts(Result):
    """forced.json: every expert on its own text, one without such on the text of every domain."""

    rows: Annotated[Sequence[ForcedExpert], Field(min_length=1, max_length=2**16)]

    file = "forced.json"
    command = "modekit verify --deep"

    def tables(self) -> list[ResultTable]:
        """Every row."""
        titles = ["expert", "text", "KL", "lost", "largest difference", "own loss", "forced loss", "base loss"]
        body = []
        for row in self.rows:
            figures = map(or_dash, (row.kl, row.lost, row.largest))
            losses = [f"{loss:.4f}" for loss in (row.own_loss, row.forced_loss, row.base_loss)]
            body.append([row.expert, row.text, *figures, *losses])
        said = (
            "Every expert, gates forced on it, beside its own model on held-out text: KL in nats per token; lost: KL "
            "over the base's KL (0 = the whole expert, 1 = nothing of it); largest difference of log-probabilities; losses."
        )
        return [ResultTable("Experts forced", titles, body, said)]


def force_experts(
    checkpoint: Checkpoint,
    *,
    tokens_per_domain: int = FORCED_TOKENS,
    sequence_length: int = 512,
    run: Run = QUIET,
) -> ForcedExperts:
    """Compare every expert, gates forced on it, with its own model, and write OUT/results/forced.json and forced.md.

    Read are at most `tokens_per_domain` of every domain that `eval` scores; where the recipe has no such text, of general
    English that comes with modekit. In memory are the mixture, one other model, and the base's logits of one text. Raises
    UnsupportedError for folded weights, SourceError where base or experts are gone, CheckpointError for what is not finite,
    TextError.
    """
    if checkpoint.record.recipe.mixture.weights is not None:
        raise UnsupportedError(
            "fixed weights are folded into the experts, so no expert is whole in the mixture",
            where="mixture.weights",
            remedy="build without weights to compare the experts",
        )
    run.begin("read the text")
    notes = list[str]()
    try:
        domains = held_out_domains(checkpoint, tokens_per_domain=tokens_per_domain, sequence_length=sequence_length, run=run)
    except TextError as error:
        if checkpoint.shape.family.pair:
            raise
        notes.append(f"the text is general English that comes with modekit, as the recipe's cannot be read ({error.what})")
        tokenizer, documents = load_tokenizer(checkpoint.folder, run=run), shipped_documents(SHIPPED)
        read = encode(tokenizer, documents, max_tokens=tokens_per_domain, sequence_length=sequence_length)
        domains = [Domain(SHIPPED, None, read)]
    if checkpoint.record.trained:
        notes.append("the mixture was trained since the build: the changes count as lost, too")
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
    rows = sorted(_compared(checkpoint, places, domains, run), key=lambda row: checkpoint.names.index(row.expert))
    if folded := dict.fromkeys(row.expert for row in rows if row.own_model == "folded"):
        notes.append(f"{', '.join(folded)}: the own model is the base with the adapter folded in, without PEFT")
    found = ForcedExperts(rows, notes=notes, checkpoint=checkpoint.identity)
    found.write(checkpoint)
    return found


def _compared(checkpoint: Checkpoint, places: Sequence[int], domains: Sequence[Domain], run: Run) -> Iterator[ForcedExpert]:
    """A row for each text and each expert that it is for. The base is loaded again for every text, and an expert of no text
    of its own, too: logits of a text are as large as a model, and are kept of one at a time.
    """
    own_texts = {place: [each for each in domains if each.expert == place] or domains for place in places}
    readers = {domain.name: [place for place in places if domain in own_texts[place]] for domain in domains}
    read = sum(domain.scored_tokens * (1 + len(readers[domain.name])) for domain in domains if readers[domain.name])
    count = ProgressCount(run, read)
    mixture = mixture_of(load_model(checkpoint.folder, run=run), checkpoint)
    for domain in domains:
        if not readers[domain.name]:
            continue
        base = load_expert_source(checkpoint, None, run=run)
        tokens = min(tokens_per_pass(base.config), tokens_per_batch(base))
        batches = list(make_batches(domain.sequences, tokens=tokens))
        of_base = [_logits(base, batch, count, "run the base") for batch in batches]
        del base
        for place in readers[domain.name]:
            name = checkpoint.names[place]
            own, made = load_own_model(checkpoint, place, run=run)
            sums, largest = torch.zeros(5, dtype=torch.float64), 0.0
            for batch, base_NV in zip(batches, of_base, strict=True):
                own_NV = _logits(own, batch, count, f"force {name}")
                with torch.inference_mode(), mixture.forced(place):
                    forced_NV = predicted_logits(mixture.model, batch)
                (kl_N, apart), (base_N, _) = divergences(own_NV, forced_NV, base_NV)
                kls = (float(each_N.clamp_max(MOST_NATS).sum()) for each_N in (kl_N, base_N))
                labels_N = batch.labels[batch.labels != NO_LABEL]
                losses = [
                    float(torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="none").double().sum())
                    for logits_NV in (own_NV, forced_NV, base_NV)
                ]
                sums += torch.tensor([*kls, *losses], dtype=torch.float64)
                largest = max(largest, apart)
            del own
            if not torch.isfinite(sums).all():
                where = f"expert '{name}' on the text '{domain.name}'"
                raise not_finite("the output of an expert or of its own model is", where)
            means = (sums / domain.scored_tokens).clamp(min=0.0).tolist()
            yield ForcedExpert(name, domain.name, made, domain.scored_tokens, largest, *means)


def _logits(model: PreTrainedModel, batch: Batch, count: ProgressCount, phase: str) -> torch.Tensor:
    """What a model says of every predicted token, (N, V)."""
    count.advance(phase)
    with torch.inference_mode():
        logits_NV = predicted_logits(model, batch)
    count.advance(phase, batch.scored)
    return logits_NV


def divergences(own_NV: torch.Tensor, *others_NV: torch.Tensor) -> list[tuple[torch.Tensor, float]]:
    """Of logits (N, V) of a model and others, over the vocabulary that all have: per other the KL(own || other) of every token
    (N,) in nats, and the largest |difference| of log-probabilities; in float64.
    """
    width = min(each.shape[1] for each in (own_NV, *others_NV))
    kl_by_other: list[list[torch.Tensor]] = [[] for _ in others_NV]
    largest = [0.0] * len(others_NV)
    step = max(1, _AT_ONCE // width)
    for start in range(0, len(own_NV), step):
        rows = slice(start, start + step)
        own = own_NV[rows, :width].double().log_softmax(-1)
        probabilities = own.exp()
        for number, other_NV in enumerate(others_NV):
            apart = own - other_NV[rows, :width].double().log_softmax(-1)
            kl_by_other[number].append((probabilities * apart).sum(-1))
            largest[number] = max(largest[number], float(apart.abs().max()))
    return [(torch.cat(parts), most) for parts, most in zip(kl_by_other, largest, strict=True)]
