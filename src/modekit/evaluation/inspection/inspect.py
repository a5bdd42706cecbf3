"""`modekit inspect OUT`: routing statistics per domain, leave one expert out, similarity; OUT/results/inspect.json.

The text is what `modekit eval` scores. A *text* here is one sequence of it: a document, a piece of one, or a pair. Of a pair a
router counts the tokens of the side that it reads, and losses are per token of the target.

Shape legend: S sequence (of a pair the source and behind it the target), E experts, R routers, M experts of a
base that is a mixture.
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
from modekit.evaluation.inspection.passes import Array32, Decided, loss_per_token, losses_without, traced_losses
from modekit.evaluation.inspection.result import Inspection, TokenLoss, TokenTrace, Usage
from modekit.evaluation.inspection.tokens import TopTokens, token_texts
from modekit.evaluation.loss import Advance
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
        usages[domain.name], samples = _of_domain(model, checkpoint, domain, tokenizer, top, advance)
        texts += samples
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


def token_trace(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    weights_RSE: Array32,
    losses: Sequence[Array32],
) -> TokenTrace:
    """What is known of the tokens of a text of which there are weights. `losses`: as `loss_per_token` has them (S), then those
    without each expert.
    """
    size = weights_RSE.shape[1]
    texts, (losses_S, *without_ES) = token_texts(tokenizer, ids[:size]), [each[:size] for each in losses]
    mean, *others = (float(np.nanmean(each, dtype=np.float64)) for each in (losses_S, *without_ES))
    return TokenTrace(
        loss=mean,
        tokens=[TokenLoss(text, None if np.isnan(loss) else float(loss)) for text, loss in zip(texts, losses_S, strict=True)],
        weights=weights_RSE.tolist(),
        without={name: other - mean for name, other in zip(checkpoint.names, others, strict=False)},
    )


def _of_domain(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    domain: Domain,
    tokenizer: PreTrainedTokenizerBase,
    top: TopTokens,
    advance: Advance,
) -> tuple[Usage, list[TokenTrace]]:
    """What the routers do with a domain, and a few of its texts."""
    sequences, names = domain.sequences, checkpoint.names
    routers, inner = len(checkpoint.shape.positions), checkpoint.shape.inner
    shares_RE, chosen_RE = np.zeros((2, routers, len(names)))
    entropy_R, agreement_R, tokens_R = np.zeros((3, routers))
    inner_RM = np.zeros((routers, inner if inner > 1 else 0))
    longest = min(_SAMPLE_TOKENS, max(3, _SAMPLE_WEIGHTS // (routers * len(names))))  # with a tag there are two, and the first
    weights: dict[int, Array32] = dict.fromkeys(_samples(sequences, longest), np.zeros(0, np.float32))

    def consume(row: int, decided: Decided) -> None:
        tokens_R[:] += decided.reads_RS.sum(1)
        shares_RE[:] += decided.weights_RSE.sum(1, dtype=np.float64)
        chosen_RE[:] += decided.chosen_RSE.sum(1, dtype=np.float64)
        entropy_R[:] += decided.entropy_RS.sum(1, dtype=np.float64)
        inner_RM[:] += decided.inner_RSM.sum(1, dtype=np.float64)
        if domain.expert is not None:
            agreement_R[:] += _led(decided, domain.expert)
        read_S = decided.reads_RS.any(0)
        top.add(np.array(_ids(sequences[row]))[read_S].tolist(), decided.mean_SE[read_S])
        if row in weights:
            weights[row] = decided.weights_RSE[:, :longest]

    losses = traced_losses(model, checkpoint, sequences, consume, advance)
    without = losses_without(model, checkpoint, sequences, advance)
    whole = _sum(losses)
    changes = {name: (_sum(each) - whole) / domain.scored_tokens for name, each in zip(names, without, strict=False)}
    sums_R = tokens_R if _base_is_outside(checkpoint) else shares_RE.sum(-1)  # a token's weights sum to one, but for rounding
    usage = Usage(
        expert=None if domain.expert is None else names[domain.expert],
        loss=whole / domain.scored_tokens,
        shares=(shares_RE / sums_R[:, None]).tolist(),
        chosen=(chosen_RE / tokens_R[:, None]).tolist(),
        entropy=(entropy_R / tokens_R).tolist(),
        agreement=None if domain.expert is None else (agreement_R / tokens_R).tolist(),
        without=changes,
        inner=(inner_RM / tokens_R[:, None]).tolist() if inner_RM.size else (),
    )
    told = {row: [loss_per_token(sequences[row], each[row]) for each in (losses, *without)] for row in weights}
    texts = (token_trace(checkpoint, tokenizer, _ids(sequences[row]), each, told[row]) for row, each in weights.items())
    return usage, [replace(text, domain=domain.name) for text in texts]


def _led(decided: Decided, expert: int) -> np.ndarray:
    """Tokens of a sequence, per router, on which an expert leads; a draw of several counts in part."""
    leads_RSE = decided.weights_RSE >= decided.weights_RSE.max(-1, keepdims=True)
    led_R: np.ndarray = ((leads_RSE[..., expert] / leads_RSE.sum(-1)) * decided.reads_RS).sum(1)
    return led_R


def _ids(sequence: TokenSequence) -> tuple[int, ...]:
    """Of all its tokens."""
    return (*sequence.ids, *sequence.target)


def _sum(losses: Sequence[Array32]) -> float:
    """Of all tokens of all sequences, nats."""
    return float(sum(each.sum(dtype=np.float64) for each in losses))


def _samples(sequences: Sequence[TokenSequence], longest: int) -> list[int]:
    """Places of a few texts that are long enough to show something; pairs, which are never cut, are as short."""
    fitting = [row for row, sequence in enumerate(sequences) if not sequence.target or sequence.size <= longest]
    return sorted(sorted(fitting, key=lambda row: (-min(longest, sequences[row].size), row))[:_SAMPLES])


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
