"""A table of evidence by maximum entropy: what does every token say of the domain that a text is of?

The logits of a text's experts at token t are the causal averages of its tokens' rows of the table W,

    l_t = sum_j average_j(W_j[x_1], ..., W_j[x_t]),

one part W_j for every average. W starts as naive Bayes, log p(token | domain), and then minimises the cross-entropy of the
domains at every position of the texts, domains counting equally (maximum entropy: what tokens of one text have in common
counts once, where naive Bayes counts it with every token). Adam on batches of whole sequences; the state is the best one of
texts that are kept aside by their own hash, a tenth of them. No model is run. Where experts wrote the text themselves, W starts
as naive Bayes and the log-odds of what they expect in equal contexts, with the weight that is best on texts kept aside.

Shape legend: B batch, S sequence, E experts, J averages, H rows of a part of the table (the vocabulary, or
hashed n-grams), V vocabulary, N tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
from torch.nn.functional import cross_entropy, embedding
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class TokenRows:
    """A sequence of a domain: the rows of the table that its tokens choose, int (S,), or (S, K) where each chooses several,
    which are added; and how many of its first tokens are of no domain, and not learned from.
    """

    rows: torch.Tensor
    start: int = 0


Examples = Sequence[TokenRows]
"""Of one domain."""


def averaged(values_BSJE: torch.Tensor, decays: Sequence[float]) -> torch.Tensor:
    """Causal averages with these decays up to each token, added up, (B, S, E): block by block, as a text may be long."""
    decays_J = torch.tensor(decays, dtype=torch.float64)
    weights_JTS = _weights(tuple(decays))
    sums_BSJE, before_BJE = [], torch.zeros(())
    for block_BSJE in torch.split(values_BSJE, _BLOCK, dim=1):
        size = block_BSJE.shape[1]
        sums_BSJE.append(torch.einsum("jts,bsje->btje", weights_JTS[:, :size, :size], block_BSJE))
        if len(sums_BSJE) > 1:
            powers_SJ1 = decays_J[:, None] ** torch.arange(1, size + 1)[:, None, None]
            sums_BSJE[-1] = sums_BSJE[-1] + powers_SJ1.float() * before_BJE[:, None]
        before_BJE = sums_BSJE[-1][:, -1]
    totals_SJ = (decays_J ** torch.arange(values_BSJE.shape[1])[:, None]).cumsum(0)
    return (torch.cat(sums_BSJE, dim=1) / totals_SJ[..., None].float()).sum(-2)


@lru_cache(maxsize=4)
@torch.inference_mode(False)
def _weights(decays: tuple[float, ...]) -> torch.Tensor:
    """Of the tokens of a block at each of its tokens (J, T, S), made once: it takes as long as the averages of a batch."""
    ages_TS = torch.arange(_BLOCK)[:, None] - torch.arange(_BLOCK)
    return (torch.tensor(decays, dtype=torch.float64)[:, None, None] ** ages_TS.clamp_min(0)).tril().float()


@dataclass(frozen=True)
class TableSchedule:
    """How a table is trained; measured in benchmarks/lexical.md."""

    tokens: int = 16_384
    steps: int = 300
    learning_rate: float = 0.2
    patience: int = 6
    aside: int = 10  # one of so many sequences is kept aside


@dataclass(frozen=True)
class TrainedTable:
    """A table (E, J, H) float32, and what it was worth on the texts kept aside: mean cross-entropy, and steps taken."""

    table: torch.Tensor
    before: float
    after: float
    steps: int


def train_table(
    domains: Sequence[Examples],
    height: int,
    decays: Sequence[float],
    *,
    seed: int = 0,
    silent: Sequence[int] = (),
    expected: torch.Tensor | None = None,
    schedule: TableSchedule = TableSchedule(),
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> TrainedTable:
    """Train the table of domains in the order of the experts.

    `silent`: rows that carry no evidence; `expected`: how often experts expect each row in equal contexts, (E, H), in small
    steps from there; `advance` is told the steps done and the most there can be.
    """
    split = [_split(examples, schedule.aside) for examples in domains]
    tables = [_naive_bayes([own for own, _ in split], height)]
    if expected is not None:
        tables = [tables[0] + weight * _log_odds(expected.double(), _EXPECTED_SMOOTHING) for weight in _WEIGHTS]
    for table in tables:
        table[:, list(silent)] = 0.0
    held = [batch for place, (_, aside) in enumerate(split) for batch in _batches(aside, place, schedule.tokens)]
    starts = [torch.cat([table / len(decays)] * len(decays)).t() for table in tables]  # (H, J E)
    start, scale = min(product(starts, _SCALES), key=lambda each: _loss_of(held, each[0] * each[1], decays))
    weights = (start * scale).contiguous().requires_grad_()
    rate = schedule.learning_rate if expected is None else _SMALL_RATE
    optimizer = torch.optim.Adam([weights], lr=rate, betas=(0.9, 0.99), foreach=True)
    best = before = _loss_of(held, weights.detach(), decays)
    state, taken = weights.detach().clone(), 0
    drawn = _drawn([own for own, _ in split], schedule.tokens // len(domains), seed)
    for step in range(1, schedule.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - (step - 1) / schedule.steps)
        optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros(())
        for batch in next(drawn):
            loss = loss + _mean_loss(batch, weights, decays) / len(domains)
        loss.backward()  # type: ignore[no-untyped-call]
        assert weights.grad is not None
        weights.grad[list(silent)] = 0.0
        optimizer.step()
        advance(step, schedule.steps)
        if step % _LOOK_EVERY == 0:
            found = _loss_of(held, weights.detach(), decays)
            if found < best:
                best, state, taken = found, weights.detach().clone(), step
            if step - taken >= schedule.patience * _LOOK_EVERY:
                break
    table = state.t().reshape(len(decays), len(domains), height).transpose(0, 1).contiguous()
    return TrainedTable(table, before, best, taken)


_LOOK_EVERY = 10  # steps
_SMOOTHING = 0.5
_SMALL_RATE = _EXPECTED_SMOOTHING = 0.02  # from what experts expect (benchmarks/self_text.md)
_BLOCK = 512  # tokens whose average is taken in one matrix product
_SCALES = [2.0 ** (step / 2) for step in range(-12, 13)]
_WEIGHTS = (0.0, 1.0, 2.0, 4.0, 8.0)


def _split(examples: Examples, aside: int) -> tuple[list[TokenRows], list[TokenRows]]:
    """Sequences to learn from, and those kept aside by their hash; one of each at least, the same one if there is no other."""
    own: list[TokenRows] = []
    other: list[TokenRows] = []
    for each in examples:
        place = int.from_bytes(hashlib.sha256(each.rows.to(torch.int64).numpy().tobytes()).digest()[:4], "big")
        (other if place % aside == 0 else own).append(each)
    return own or list(examples), other or list(examples[:1])


def _naive_bayes(domains: Sequence[Examples], height: int) -> torch.Tensor:
    """Log p(row | domain) less its mean over domains, (E, H), in equal parts of the rows that a token chooses."""
    said = [torch.cat([each.rows[each.start :] for each in examples]).flatten().long() for examples in domains]
    counts = torch.stack([torch.bincount(rows, minlength=height).double() for rows in said])
    chosen = domains[0][0].rows.numel() // len(domains[0][0].rows)  # by one token
    return _log_odds(counts, _SMOOTHING) / chosen


def _log_odds(counts: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Log of the rows' shares (E, H), less its mean over experts, float32."""
    logs = ((counts + smoothing) / (counts.sum(1, keepdim=True) + smoothing * counts.shape[1])).log()
    return (logs - logs.mean(0)).float()


@dataclass(frozen=True)
class _Batch:
    """Rows (B, S, K) with pads of 0, and the mask of those that are of the domain; `place` is the domain."""

    rows_BSK: torch.Tensor
    mask_BS: torch.Tensor
    place: int


def _padded(examples: Examples, place: int) -> _Batch:
    rows_BSK = pad_sequence([each.rows.reshape(len(each.rows), -1) for each in examples], batch_first=True).long()
    start_B1, end_B1 = torch.tensor([(each.start, len(each.rows)) for each in examples]).t()[..., None]
    at_S = torch.arange(rows_BSK.shape[1])
    return _Batch(rows_BSK, (at_S >= start_B1) & (at_S < end_B1), place)


def _batches(examples: Examples, place: int, tokens: int) -> Iterator[_Batch]:
    """All sequences of a domain, those of similar length together."""
    left = sorted(examples, key=lambda each: len(each.rows), reverse=True)
    while left:
        count = max(1, tokens // len(left[0].rows))
        yield _padded(left[:count], place)
        left = left[count:]


def _drawn(domains: Sequence[Examples], tokens: int, seed: int) -> Iterator[list[_Batch]]:
    """A batch of every domain, each of about so many tokens, over and over in an order that the seed gives."""
    generator, left = torch.Generator().manual_seed(seed), [list[int]() for _ in domains]
    while True:
        batches = []
        for place, examples in enumerate(domains):
            taken, length = list[TokenRows](), 0
            while length < tokens and len(taken) < len(examples):
                if not left[place]:
                    left[place] = torch.randperm(len(examples), generator=generator).tolist()
                taken.append(examples[left[place].pop()])
                length += len(taken[-1].rows)
            batches.append(_padded(taken, place))
        yield batches


def _mean_loss(batch: _Batch, weights: torch.Tensor, decays: Sequence[float]) -> torch.Tensor:
    """Cross-entropy of a table (H, J E)."""
    values = embedding(batch.rows_BSK, weights).sum(-2)
    logits = averaged(values.reshape(*values.shape[:2], len(decays), -1), decays)[batch.mask_BS]
    return cross_entropy(logits, torch.full((len(logits),), batch.place))


@torch.no_grad()
def _loss_of(held: Sequence[_Batch], weights: torch.Tensor, decays: Sequence[float]) -> float:
    """Mean cross-entropy of texts; domains count equally."""
    losses, counts = torch.zeros(2, weights.shape[1] // len(decays), dtype=torch.float64)
    for batch in held:
        count = int(batch.mask_BS.sum())
        losses[batch.place] += float(_mean_loss(batch, weights, decays)) * count
        counts[batch.place] += count
    return float((losses / counts.clamp_min(1)).mean())
