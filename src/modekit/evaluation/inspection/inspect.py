"""`modekit inspect OUT`: routing statistics per domain, leave one expert out, similarity; OUT/results/inspect.json.

The text is what `modekit eval` scores. A *text* here is one sequence of it: a document, a piece of one, or a pair. Of a pair a
router counts the tokens of the side that it reads, and losses are per token of the target.

Shape legend: S sequence (of a pair the source and behind it the target), E experts, R routers, N sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.evaluation.domains import Domain, held_out_domains
from modekit.evaluation.inspection.likeness import similarity
from modekit.evaluation.inspection.passes import Advance, Array32, Decided, loss_per_token, losses_without, traced_losses
from modekit.evaluation.inspection.result import Inspection, TokenLoss, TokenTrace, Usage
from modekit.evaluation.inspection.tokens import TopTokens, token_texts
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
) -> Inspection:
    """What docs/inspect.md describes, in OUT/results/inspect.json and inspect.md, too.

    Each sequence is read once as it is and once per expert that is left out. Raises TextError without held-out text,
    CheckpointError for a mixture whose losses or weights are not finite.
    """
    run.begin("read the text")
    domains = held_out_domains(checkpoint, tokens_per_domain=tokens_per_domain, sequence_length=sequence_length, run=run)
    tokenizer = load_tokenizer(checkpoint.folder, run=run)
    model = load_model(checkpoint.folder, run=run)
    advance = counted(run, checkpoint, [sequence for domain in domains for sequence in domain.sequences])
    vocabulary = max(model.config.vocab_size, getattr(model.config, "decoder_vocab_size", None) or 0)  # of targets, too
    top = TopTokens(vocabulary, len(checkpoint.names))
    usages, texts = dict[str, Usage](), list[TokenTrace]()
    for domain in domains:
        usages[domain.name], samples = _of_domain(model, checkpoint, domain, top, advance)
        texts += [replace(token_trace(checkpoint, tokenizer, *sample), domain=domain.name) for sample in samples]
    alike, notes = similarity(checkpoint, run)
    found = Inspection(
        checkpoint=checkpoint.identity,
        experts=checkpoint.names,
        routers=list(checkpoint.shape.positions),
        per_domain=usages,
        similarity=alike,
        top_tokens=top.by_expert(tokenizer, checkpoint.names),
        texts=texts,
        notes=[*_notes(checkpoint, pairs=bool(domains[0].sequences[0].target)), *_notes_on_dead(checkpoint, usages), *notes],
    )
    found.write(checkpoint)
    return found


def counted(run: Run, checkpoint: Checkpoint, sequences: Sequence[TokenSequence]) -> Advance:
    """An `Advance` that reports tokens of all passes over these sequences: as they are, and without each expert."""
    passes = 1 + (len(checkpoint.names) if len(checkpoint.names) > 1 else 0)
    work = ProgressCount(run, passes * sum(sequence.size for sequence in sequences))
    advance = partial(work.advance, "inspect")
    advance(0)
    return advance


_Sample = tuple[Sequence[int], Array32, Array32, Sequence[Array32]]
"""Tokens, their losses (S) as `loss_per_token` has them, weights (R, S, E), and losses without each expert (S)."""


def token_trace(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    losses_S: Array32,
    weights_RSE: Array32,
    without_ES: Sequence[Array32],
) -> TokenTrace:
    """What is known of every token of a text."""
    texts = token_texts(tokenizer, ids)
    changes = [float(np.nanmean(each, dtype=np.float64) - np.nanmean(losses_S, dtype=np.float64)) for each in without_ES]
    return TokenTrace(
        loss=float(np.nanmean(losses_S, dtype=np.float64)),
        tokens=[TokenLoss(text, None if np.isnan(loss) else float(loss)) for text, loss in zip(texts, losses_S, strict=True)],
        weights=weights_RSE.tolist(),
        without=dict(zip(checkpoint.names, changes, strict=False)),
    )


def _of_domain(
    model: PreTrainedModel, checkpoint: Checkpoint, domain: Domain, top: TopTokens, advance: Advance
) -> tuple[Usage, list[_Sample]]:
    """What the routers do with a domain, and a few of its texts."""
    sequences, names = domain.sequences, checkpoint.names
    shape = (len(sequences), len(checkpoint.shape.positions))
    shares_NRE, chosen_NRE = np.zeros((*shape, len(names))), np.zeros((*shape, len(names)))
    entropy_NR, agreement_NR, tokens_NR = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    inner_RM = np.zeros((shape[1], checkpoint.shape.inner if checkpoint.shape.inner > 1 else 0))
    longest = min(_SAMPLE_TOKENS, max(2, _SAMPLE_WEIGHTS // (shape[1] * len(names))))
    weights: dict[int, Array32] = dict.fromkeys(_samples(sequences, longest), np.zeros(0, np.float32))

    def consume(row: int, decided: Decided) -> None:
        tokens_NR[row] = decided.reads_RS.sum(1)
        shares_NRE[row] = decided.weights_RSE.sum(1, dtype=np.float64)
        chosen_NRE[row] = decided.chosen_RSE.sum(1, dtype=np.float64)
        entropy_NR[row] = decided.entropy_RS.sum(1, dtype=np.float64)
        inner_RM[:] += decided.inner_RSM.sum(1, dtype=np.float64)
        if domain.expert is not None:
            agreement_NR[row] = _led(decided, domain.expert)
        read_S = decided.reads_RS.any(0)
        ids_S = np.array((*sequences[row].ids, *sequences[row].target))
        top.add(ids_S[read_S].tolist(), decided.mean_SE[read_S])
        if row in weights:
            weights[row] = decided.weights_RSE[:, : _shown(sequences[row], longest)]

    losses = traced_losses(model, checkpoint, sequences, consume, advance)
    without = losses_without(model, checkpoint, sequences, advance)
    tokens_R, whole = tokens_NR.sum(0), _sum(losses)
    changes = {name: (_sum(each) - whole) / domain.scored_tokens for name, each in zip(names, without, strict=False)}
    shares_RE = shares_NRE.sum(0) / tokens_R[:, None]
    if not _base_is_outside(checkpoint):
        shares_RE = shares_RE / shares_RE.sum(-1, keepdims=True)  # rounding
    usage = Usage(
        expert=None if domain.expert is None else names[domain.expert],
        loss=whole / domain.scored_tokens,
        shares=shares_RE.tolist(),
        chosen=(chosen_NRE.sum(0) / tokens_R[:, None]).tolist(),
        entropy=(entropy_NR.sum(0) / tokens_R).tolist(),
        agreement=None if domain.expert is None else (agreement_NR.sum(0) / tokens_R).tolist(),
        without=changes,
        inner=(inner_RM / tokens_R[:, None]).tolist() if inner_RM.size else (),
    )
    return usage, [_sample(sequences[row], each, [of[row] for of in (losses, *without)]) for row, each in weights.items()]


def _led(decided: Decided, expert: int) -> np.ndarray:
    """Tokens of a sequence, per router, on which an expert leads; a draw of several counts in part."""
    leads_RSE = decided.weights_RSE >= decided.weights_RSE.max(-1, keepdims=True)
    led_R: np.ndarray = ((leads_RSE[..., expert] / leads_RSE.sum(-1)) * decided.reads_RS).sum(1)
    return led_R


def _sample(sequence: TokenSequence, weights_RSE: Array32, losses: Sequence[Array32]) -> _Sample:
    """The tokens of a sequence of which there are weights."""
    size = weights_RSE.shape[1]
    whole_S, *without_ES = [loss_per_token(sequence, each)[:size] for each in losses]
    return (*sequence.ids, *sequence.target)[:size], whole_S, weights_RSE, without_ES


def _sum(losses: Sequence[Array32]) -> float:
    """Of all tokens of all sequences, nats."""
    return float(sum(each.sum(dtype=np.float64) for each in losses))


def _samples(sequences: Sequence[TokenSequence], longest: int) -> list[int]:
    """Places of a few texts that are long enough to show something; pairs, which are never cut, are as short."""
    fitting = [row for row, sequence in enumerate(sequences) if not sequence.target or sequence.size <= longest]
    return sorted(sorted(fitting, key=lambda row: (-min(longest, sequences[row].size), row))[:_SAMPLES])


def _shown(sequence: TokenSequence, longest: int) -> int:
    """So many tokens of a sample; behind a tag that stands first there are two, of which one is predicted."""
    return min(sequence.size, longest if sequence.tag is None else max(longest, sequence.tag + 3))


def _base_is_outside(checkpoint: Checkpoint) -> bool:
    always_on = checkpoint.record.recipe.mixture.always_on
    return always_on is not None and always_on.expert not in checkpoint.names


def _notes(checkpoint: Checkpoint, *, pairs: bool) -> Iterator[str]:
    recipe = checkpoint.record.recipe
    if _base_is_outside(checkpoint) and recipe.mixture.always_on is not None:
        share = recipe.mixture.always_on.weight
        yield f"the base model takes part in every token with {share}: the experts' weights sum to the rest"
    yield from written_notes(recipe, checkpoint.recipe_root)
    if len(recipe.experts) == 1:
        yield "there is one expert: none can be left out"
    if any(slot.features for slot in checkpoint.slots):
        yield "routers decide per output feature: weights are means over the features"
    if pairs:
        yield "losses are per token of the target; a router counts the tokens of the side of a pair that it reads"
        yield "texts are the source and behind it the target of a pair: where a router does not read, its weights are 0"


def _notes_on_dead(checkpoint: Checkpoint, usages: Mapping[str, Usage]) -> Iterator[str]:
    """Experts that hardly weigh anything in any domain."""
    routers = checkpoint.shape.positions
    most_RE = np.max([usage.shares for usage in usages.values()], axis=0)
    for expert, name in enumerate(checkpoint.names):
        dead = [router for router, most in zip(routers, most_RE[:, expert], strict=True) if most < _DEAD]
        said = ", ".join(f"{router.layer} {router.module}" for router in dead if router.layer is not None)
        where = "in every router" if len(dead) == len(routers) else f"in layer {said}"
        if dead:
            yield f"{name} is dead {where}: its mean weight is below {_DEAD} in every domain"
