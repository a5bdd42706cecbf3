"""`modekit inspect OUT`: routing statistics per domain, leave one expert out, similarity; OUT/results/inspect.json.

The text is what `modekit eval` scores. A *text* here is one sequence of it: a document, a piece of one, or a pair. Of a pair a
router counts the tokens of the side that it reads, and losses are per token of the target.

Shape legend: S sequence (of a router in a decoder the target), E experts, R routers, N sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.evaluation.domains import Domain, held_out_domains
from modekit.evaluation.inspection.passes import (
    Advance,
    Array64,
    Decided,
    Traced,
    changes_without,
    loss_per_token,
    sums_of,
    trace,
    traced_losses,
)
from modekit.evaluation.inspection.result import DomainTrace, Inspection, TokenLoss, Usage
from modekit.evaluation.inspection.similarity import similarity
from modekit.evaluation.inspection.tokens import TopTokens, evidence_of, strongest, token_texts
from modekit.loaded.load import load_model, load_tokenizer
from modekit.run import QUIET, ProgressCount, Run
from modekit.text.amounts import SAMPLE_TOKENS
from modekit.text.sequences import TokenSequence
from modekit.text.written import written_notes

_DEAD = 1e-3  # mean weight below which an expert is dead in a router
_SAMPLES = 3  # texts per domain that are written with the weights of every token
_SAMPLE_TOKENS = 200
_SAMPLE_WEIGHTS = 2**17  # of all routers and experts together: a text is cut shorter where there are many


def inspect(
    checkpoint: Checkpoint,
    *,
    tokens_per_domain: int = SAMPLE_TOKENS,
    sequence_length: int = 512,
    run: Run = QUIET,
    write: bool = True,
) -> Inspection:
    """What docs/inspect.md describes; with `write` in OUT/results/inspect.json and inspect.md, too.

    Each sequence is read once as it is and once per expert that is left out. Raises TextError without held-out text,
    CheckpointError for a mixture whose losses or weights are not finite.
    """
    run.begin("read the text")
    domains = held_out_domains(checkpoint, tokens_per_domain=tokens_per_domain, sequence_length=sequence_length, run=run)
    found = _inspected(checkpoint, domains, run)
    if write:
        found.write(checkpoint)
    return found


def _inspected(checkpoint: Checkpoint, domains: Sequence[Domain], run: Run) -> Inspection:
    tokenizer = load_tokenizer(checkpoint.folder, run=run)
    model = load_model(checkpoint.folder, run=run)
    longest = min(_SAMPLE_TOKENS, max(2, _SAMPLE_WEIGHTS // (len(checkpoint.shape.positions) * len(checkpoint.names))))
    samples = [(domain.name, sequence) for domain in domains for sequence in _samples(domain.sequences, longest)]
    advance = counted(run, checkpoint, [*(s for d in domains for s in d.sequences), *(s for _, s in samples)])
    vocabulary = max(model.config.vocab_size, getattr(model.config, "decoder_vocab_size", None) or 0)  # of targets, too
    top = TopTokens(vocabulary, len(checkpoint.names))
    per_domain = {domain.name: _of_domain(model, checkpoint, domain, top, advance) for domain in domains}
    shown = _of_samples(model, checkpoint, tokenizer, samples, advance)
    alike = similarity(checkpoint, run)
    table_VE = evidence_of(checkpoint)
    own = [domain.name for domain in domains if domain.expert is not None]
    most_RE = np.max([usage.shares for usage in per_domain.values()], axis=0)
    dead = {
        name: places
        for place, name in enumerate(checkpoint.names)
        if (places := np.flatnonzero(most_RE[:, place] < _DEAD).tolist())
    }
    return Inspection(
        checkpoint=checkpoint.identity,
        experts=checkpoint.names,
        domains=own,
        unseen=[domain.name for domain in domains if domain.expert is None],
        routers=list(checkpoint.shape.positions),
        top_k=top_k_of(checkpoint),
        per_domain=per_domain,
        utilisation=np.mean([per_domain[name].shares for name in own], axis=0).tolist(),
        dead=dead,
        similarity=alike,
        top_tokens=top.by_expert(tokenizer, checkpoint.names),
        evidence=None if table_VE is None else strongest(table_VE, top.often_V, tokenizer, checkpoint.names),
        texts=shown,
        notes=[*_notes(checkpoint), *_notes_on_pairs(domains, samples), *_notes_on_dead(checkpoint, dead), *alike.notes],
    )


def top_k_of(checkpoint: Checkpoint) -> int | None:
    """Experts per token; None where they vary."""
    return None if checkpoint.record.recipe.mixture.varies else checkpoint.record.recipe.top_k


def counted(run: Run, checkpoint: Checkpoint, sequences: Sequence[TokenSequence]) -> Advance:
    """An `Advance` that reports tokens of all passes over these sequences: as they are, and without each expert."""
    passes = 1 + (len(checkpoint.names) if len(checkpoint.names) > 1 else 0)
    work = ProgressCount(run, passes * sum(sequence.size for sequence in sequences))
    advance = partial(work.advance, "inspect")
    advance(0)
    return advance


def named_changes(checkpoint: Checkpoint, changes_E: Array64) -> dict[str, float]:
    """Expert -> what leaving it out changes; of a single expert nothing is known."""
    return dict(zip(checkpoint.names[: len(changes_E)], changes_E.tolist(), strict=True))


def _of_domain(model: PreTrainedModel, checkpoint: Checkpoint, domain: Domain, top: TopTokens, advance: Advance) -> Usage:
    sequences, names = domain.sequences, checkpoint.names
    shape = (len(sequences), len(checkpoint.shape.positions))
    shares_NRE, chosen_NRE = np.zeros((*shape, len(names))), np.zeros((*shape, len(names)))
    entropy_NR, agreement_NR = np.zeros(shape), np.zeros(shape)
    tokens_R = np.zeros(shape[1], np.int64)

    def consume(row: int, decided: Decided) -> None:
        at, sequence = decided.routers, sequences[row]
        tokens_R[at] += decided.weights_RSE.shape[1]
        shares_NRE[row, at] = decided.weights_RSE.sum(1, dtype=np.float64)
        chosen_NRE[row, at] = decided.chosen_RSE.sum(1, dtype=np.float64)
        entropy_NR[row, at] = decided.entropy_RS.sum(1, dtype=np.float64)
        if domain.expert is not None:
            leads_RSE = decided.weights_RSE >= decided.weights_RSE.max(-1, keepdims=True)  # a draw of several counts in part
            agreement_NR[row, at] = (leads_RSE[..., domain.expert] / leads_RSE.sum(-1)).sum(1)
        ids = sequence.target if decided.of_target else sequence.ids
        top.add(ids, decided.weights_RSE.mean(0))

    whole_N = sums_of(traced_losses(model, checkpoint, sequences, consume, advance))
    changes_EN = changes_without(model, checkpoint, sequences, whole_N, advance)
    shares_RE = shares_NRE.sum(0) / tokens_R[:, None]
    if not _base_is_outside(checkpoint):
        shares_RE = shares_RE / shares_RE.sum(-1, keepdims=True)  # rounding
    return Usage(
        expert=None if domain.expert is None else names[domain.expert],
        documents=len(sequences),
        tokens=sum(sequence.size for sequence in sequences),
        loss=float(whole_N.sum()) / domain.scored_tokens,
        shares=shares_RE.tolist(),
        chosen=(chosen_NRE.sum(0) / tokens_R[:, None]).tolist(),
        entropy=(entropy_NR.sum(0) / tokens_R).tolist(),
        agreement=None if domain.expert is None else (agreement_NR.sum(0) / tokens_R).tolist(),
        without=named_changes(checkpoint, changes_EN.sum(1) / domain.scored_tokens),
        named=_named(changes_EN, domain.expert),
    )


def _named(changes_EN: Array64, expert: int | None) -> float | None:
    """Fraction of sequences for which leaving out this expert hurts more than leaving out any other."""
    if expert is None or not len(changes_EN):
        return None
    others = np.delete(changes_EN, expert, axis=0).max(0)
    return float(np.mean(changes_EN[expert] > others))


def _samples(sequences: Sequence[TokenSequence], longest: int) -> list[TokenSequence]:
    """A few texts that are long enough to show something, cut to what is shown; pairs, which are never cut, are as short."""
    if any(sequence.target for sequence in sequences):
        fitting = [row for row, sequence in enumerate(sequences) if sequence.size <= longest]
        order = sorted(fitting, key=lambda row: (-sequences[row].size, row))
        return [sequences[row] for row in sorted(order[:_SAMPLES])]
    order = sorted(range(len(sequences)), key=lambda row: (-min(longest, len(sequences[row].ids)), row))
    return [_begun(sequences[row], longest) for row in sorted(order[:_SAMPLES])]


def _begun(sequence: TokenSequence, longest: int) -> TokenSequence:
    """The first tokens of a text, with its tag; behind one that stands first there are two, of which one is predicted."""
    if sequence.tag is None:
        return TokenSequence(sequence.ids[:longest], 0)
    return TokenSequence(sequence.ids[: max(longest, sequence.tag + 3)], 0, tag=sequence.tag)


def _of_samples(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[tuple[str, TokenSequence]],
    advance: Advance,
) -> list[DomainTrace]:
    """Of texts of domains, by name."""
    found = []
    traced = trace(model, checkpoint, [sequence for _, sequence in samples], advance)
    for (domain, sequence), each in zip(samples, traced, strict=True):
        texts = [*token_texts(tokenizer, sequence.ids), *token_texts(tokenizer, sequence.target)]
        found.append(
            DomainTrace(
                domain=domain,
                text="".join(texts),
                loss=float(each.losses_P.sum(dtype=np.float64)) / sequence.scored,
                tokens=tokens_of(sequence, texts, each),
                weights=each.weights_RSE.tolist(),
                without=named_changes(checkpoint, each.changes_E / sequence.scored),
            )
        )
    return found


def tokens_of(sequence: TokenSequence, texts: Sequence[str], traced: Traced) -> list[TokenLoss]:
    """The tokens of a sequence as text, with their losses."""
    losses = loss_per_token(sequence, traced.losses_P)
    return [TokenLoss(text, loss) for text, loss in zip(texts, losses, strict=True)]


def _base_is_outside(checkpoint: Checkpoint) -> bool:
    always_on = checkpoint.record.recipe.mixture.always_on
    return always_on is not None and always_on.expert not in checkpoint.names


def _notes(checkpoint: Checkpoint) -> list[str]:
    recipe, notes = checkpoint.record.recipe, []
    if _base_is_outside(checkpoint) and recipe.mixture.always_on is not None:
        share = recipe.mixture.always_on.weight
        notes.append(f"the base model takes part in every token with {share}: the experts' weights sum to the rest")
    notes += written_notes(recipe, checkpoint.recipe_root)
    if len(recipe.experts) == 1:
        notes.append("there is one expert: none can be left out")
    if any(slot.features for slot in checkpoint.slots):
        notes.append("routers decide per output feature: weights are means over the features")
    return notes


def _notes_on_dead(checkpoint: Checkpoint, dead: Mapping[str, Sequence[int]]) -> Iterator[str]:
    routers = checkpoint.shape.positions
    for name, places in dead.items():
        said = ", ".join(f"{routers[at].layer} {routers[at].module}" for at in places if routers[at].layer is not None)
        where = "in every router" if len(places) == len(routers) else f"in layer {said}"
        yield f"{name} is dead {where}: its mean weight is below {_DEAD} in every domain"


def _notes_on_pairs(domains: Sequence[Domain], samples: Sequence[object]) -> list[str]:
    if not any(sequence.target for domain in domains for sequence in domain.sequences):
        return []
    notes = ["losses are per token of the target; a router counts the tokens of the side of a pair that it reads"]
    if samples:
        notes.append("texts are the source and behind it the target of a pair: where a router does not read, its weights are 0")
    else:
        notes.append("no pair is short enough to be shown token by token")
    return notes
