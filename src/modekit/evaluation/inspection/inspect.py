"""`modekit inspect OUT`: routing statistics per domain, leave one expert out, similarity; OUT/results/inspect.json. With
`--text "..."`: what the routers do with one text, token by token.

The text is what `modekit eval` scores. A *text* here is one sequence of it: a document, a piece of one, or a pair. Of a pair a
router counts the tokens of the side that it reads, and losses are per token of the target.

Shape legend: S sequence (of a pair the source and behind it the target) or text, E experts, R routers, M experts of a
base that is a mixture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import refuse_pairs
from modekit.checkpoint.sources import why_not
from modekit.errors import TextError
from modekit.evaluation.domains import Advance, Domain, held_out_domains
from modekit.evaluation.inspection.likeness import similarity
from modekit.evaluation.inspection.passes import Array32, Decided, loss_per_token, losses_without, token_losses, traced_losses
from modekit.evaluation.inspection.result import Inspection, TextTrace, TokenLoss, TokenTrace, Usage
from modekit.evaluation.inspection.tokens import TopTokens, token_texts
from modekit.loaded.experts import load_expert_source
from modekit.loaded.load import load_model, load_tokenizer
from modekit.run import QUIET, ProgressCount, Run
from modekit.text.amounts import SAMPLE_TOKENS
from modekit.text.chat import needed_template
from modekit.text.document import message_of
from modekit.text.plain import whole
from modekit.text.sequences import TokenSequence, encode
from modekit.text.written import written_notes

_DEAD = 1e-3  # mean weight below which an expert is dead in a router
_SAMPLES = 3  # texts per domain that are written with the weights of every token
_MOST = 4_096  # tokens of a text that are read: the weights of every router are kept
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


@dataclass(frozen=True)
class UserMessage:
    """A user's message in a chat; without a system prompt the template has its own."""

    system: str | None
    text: str


def inspect_text(checkpoint: Checkpoint, text: str | UserMessage, *, sequence_length: int = 512, run: Run = QUIET) -> TextTrace:
    """What the routers do with the first 4,096 tokens of a text; what is said in a chat is shown in the chat template, with the
    last 4,096 tokens up to where the answer begins.

    Raises TextError for a text of fewer than two tokens, or without a chat template, UnsupportedError for a model that reads
    pairs, CheckpointError when losses or weights are not finite.
    """
    refuse_pairs(
        checkpoint,
        "a source and its target are shown together, and this is one text",
        remedy="leave it out: inspect.json and the report have pairs of the held-out text, token by token",
    )
    tokenizer = load_tokenizer(checkpoint.folder, run=run)
    model = load_model(checkpoint.folder, run=run)
    positions = checkpoint.config.get("max_position_embeddings")
    windows = _windows(tokenizer, text, min(sequence_length, positions) if isinstance(positions, int) else sequence_length)
    decided = dict[int, Decided]()
    advance = counted(run, checkpoint, windows)
    losses = _joined(windows, traced_losses(model, checkpoint, windows, decided.__setitem__, advance))
    without = [_joined(windows, each) for each in losses_without(model, checkpoint, windows, advance)]
    del model  # before the base model comes
    weights_RSE = np.concatenate([decided[row].weights_RSE for row in range(len(windows))], axis=1)
    ids = [token for window in windows for token in window.ids]
    lacks_base, base_loss = why_not(checkpoint, None, run=run), None
    if lacks_base is None:
        base = load_expert_source(checkpoint, None, run=run)
        base_loss = float(np.nanmean(_joined(windows, token_losses(base, windows, lambda _: None)), dtype=np.float64))
    notes = {
        f"the text was read in {len(windows)} windows, each without the text before it": len(windows) > 1,
        f"of a text at most {_MOST:,} tokens are read": len(ids) >= _MOST - 1,
        f"no loss of the base model to compare with: {lacks_base}": lacks_base is not None,
    }
    recipe = checkpoint.record.recipe
    return TextTrace(
        **vars(token_trace(checkpoint, tokenizer, ids, weights_RSE, [losses, *without])),
        experts=checkpoint.names,
        routers=list(checkpoint.shape.positions),
        top_k=None if recipe.mixture.varies else recipe.top_k,
        base_loss=base_loss,
        entropy=float(np.concatenate([decided[row].entropy_RS for row in range(len(windows))], axis=1).mean(dtype=np.float64)),
        notes=[note for note, is_so in notes.items() if is_so],
    )


def _joined(windows: Sequence[TokenSequence], losses: Sequence[Array32]) -> Array32:
    """Losses of the tokens of all windows (S), NaN where there is none."""
    return np.concatenate([loss_per_token(window, each) for window, each in zip(windows, losses, strict=True)])


def _windows(tokenizer: PreTrainedTokenizerBase, text: str | UserMessage, length: int) -> list[TokenSequence]:
    """A text as `modekit eval` reads a document; a message in the template, to which the tokenizer adds nothing."""
    if isinstance(text, str):
        clean = whole(text)
        windows = encode(tokenizer, [clean] if clean.strip() else [], max_tokens=_MOST, sequence_length=length)
    else:
        above = [] if text.system is None else [message_of("system", text.system)]
        written = needed_template(tokenizer, "--chat").text([*above, message_of("user", text.text)], answer=True)
        ids: Any = tokenizer(written, add_special_tokens=False, verbose=False)["input_ids"][-_MOST:]
        windows = [TokenSequence(tuple(ids[start : start + length])) for start in range(0, len(ids), length)]
    if not windows:
        raise TextError(
            "the text is too short: it needs two tokens, as the first is not predicted", where="--text", remedy="give more text"
        )
    return windows
