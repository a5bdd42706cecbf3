"""Which documents are kept, so that the domains' totals of tokens differ by no more than was asked, in both directions.

    (largest total - smallest total) / smallest total <= max_diff_percent / 100

Documents are whole. Apart, each domain has units of its own: all are asked in the order that a seed gives, and one that does
not fit under the cap is passed over. Common, a unit is a tuple with tokens in every domain, and goes in or out as one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modekit.experts.corpus.count import Key

Totals = tuple[int, ...]
Tokens_UD = npt.NDArray[np.int64]
"""Tokens of each unit (U) in each domain (D)."""
_CAPS = 8  # tried between the smallest domain's total and what the largest may have then
_BITS = 2**27  # units times cap, up to which all totals that units can have are looked at: 16 MB, milliseconds
_ROUNDS = 1_000  # in which a cap is lowered
_BATCH = 0.005  # of the tuples left is taken out before the totals are looked at again


@dataclass(frozen=True)
class Choice:
    """What is kept of each domain, in their order: units in the order of the seed, and their tokens."""

    units: tuple[tuple[Key, ...], ...]
    totals: Totals

    @property
    def diff_percent(self) -> float:
        """100 (largest - smallest) / smallest."""
        return diff_percent(self.totals)

    @property
    def rank(self) -> tuple[int, float]:
        """The better choice has the larger one: more text in the smallest domain, then less difference."""
        return min(self.totals), -self.diff_percent


@dataclass(frozen=True)
class Bounds:
    """What totals may be: so far apart, and so large."""

    percent: float
    limit: int


def diff_percent(totals: Sequence[int]) -> float:
    """100 (largest - smallest) / smallest; infinite where one has nothing."""
    return 100 * (max(totals) - min(totals)) / min(totals) if min(totals) else float("inf")


def in_order(units: Mapping[Key, int] | Sequence[Key], seed: int) -> list[Key]:
    """Units in the order that a seed gives, in whatever order they come."""
    start = hashlib.sha256(f"balance {seed} ".encode())

    def rank(unit: Key) -> bytes:
        each = start.copy()
        each.update(unit)
        return each.digest()

    return sorted(units, key=rank)


def is_held_out(unit: Key, share: float) -> bool:
    """Whether a unit is validation: by its own hash, whatever the seed and the other units.

    It is another hash than that of `text/splits.py`, so that what is left for training has all three of its splits.
    """
    return int.from_bytes(hashlib.sha256(b"validation" + unit).digest()[:8], "big") < share * 2**64


def choose_apart(units: Sequence[Mapping[Key, int]], percent: float, most: int | None, seed: int) -> Choice | None:
    """Of every domain's units those to keep; None where no cap leaves something of each.

    The smallest domain's total is the cap; others are tried up to what the largest may have beside it, for domains of few
    large documents that reach one and not the other. A cap that leaves a domain too far below is lowered to what that one
    reached, and its percent; it then keeps the same units, so that caps only fall.
    """
    orders = [in_order(each, seed) for each in units]
    smallest = min(sum(each.values()) for each in units)
    best: Choice | None = None
    for step in range(_CAPS + 1):
        cap = int(smallest * (1 + percent / 100 * step / _CAPS))
        found = _under(orders, units, min(cap, most) if most is not None else cap, percent)
        if found is not None and (best is None or found.rank > best.rank):
            best = found
        if percent == 0 or (most is not None and cap >= most):
            break
    return best


def _under(orders: Sequence[Sequence[Key]], units: Sequence[Mapping[Key, int]], cap: int, percent: float) -> Choice | None:
    for _ in range(_ROUNDS):
        if cap <= 0:
            break
        kept = [_filled(order, tokens, cap) for order, tokens in zip(orders, units, strict=True)]
        totals = tuple(total for _, total in kept)
        if diff_percent(totals) <= percent:
            return Choice(tuple(tuple(each) for each, _ in kept), totals)
        cap = min(cap - 1, int(min(totals) * (1 + percent / 100)))
    return None


def _filled(order: Sequence[Key], tokens: Mapping[Key, int], cap: int) -> tuple[list[Key], int]:
    """Units that fit under a cap, one after the other, and their tokens; of few units those that come nearest to it."""
    kept, total = [], 0
    for unit in order:
        if total + tokens[unit] <= cap:
            kept.append(unit)
            total += tokens[unit]
            if total == cap:
                return kept, total
    return _nearest(order, tokens, cap) if len(order) * cap <= _BITS else (kept, total)


def _nearest(order: Sequence[Key], tokens: Mapping[Key, int], cap: int) -> tuple[list[Key], int]:
    """The largest total under a cap that whole units can have, by all totals that the first of them can (bit i: total i)."""
    mask, reached = (1 << (cap + 1)) - 1, [1]
    for unit in order:
        reached.append((reached[-1] | reached[-1] << tokens[unit]) & mask if tokens[unit] <= cap else reached[-1])
    total = left = reached[-1].bit_length() - 1
    kept = []
    for place in range(len(order) - 1, -1, -1):
        if not reached[place] >> left & 1:  # not without this one
            kept.append(order[place])
            left -= tokens[order[place]]
    return kept[::-1], total


def choose_common(units: Sequence[Mapping[Key, int]], percent: float, most: int | None, seed: int) -> Choice | None:
    """Tuples to keep, of units that every domain has; None where no tuple can be.

    Tuples are taken out as long as the totals are too far apart: first those whose tokens lie in the domains that have too
    many. Then those that were taken out are asked again, in the order of the seed, whether they fit after all; where none was
    left, the most even ones first.
    """
    keys = in_order(list(set.intersection(*(set(each) for each in units))), seed)
    if not keys:
        return None
    tokens_UD = np.array([[each[key] for each in units] for key in keys], dtype=np.int64)
    limit = most if most is not None else int(tokens_UD.sum())
    kept_U = _within(tokens_UD, limit)
    _take_out(tokens_UD, kept_U, percent)
    order_U = np.arange(len(keys)) if kept_U.any() else np.argsort(_own_diff(tokens_UD), kind="stable")
    _put_in(tokens_UD, kept_U, order_U, Bounds(percent, limit))
    if not kept_U.any():
        return None
    chosen = tuple(key for key, kept in zip(keys, kept_U.tolist(), strict=True) if kept)
    return Choice((chosen,) * len(units), tuple(int(total) for total in tokens_UD[kept_U].sum(axis=0)))


def _within(tokens_UD: Tokens_UD, limit: int) -> npt.NDArray[np.bool_]:
    """The tuples that fit under a limit of tokens in every domain, in order."""
    kept_U = np.zeros(len(tokens_UD), dtype=bool)
    totals_D = np.zeros(tokens_UD.shape[1], dtype=np.int64)
    for place, tokens_D in enumerate(tokens_UD):
        if (totals_D + tokens_D <= limit).all():
            kept_U[place] = True
            totals_D += tokens_D
    return kept_U


def _take_out(tokens_UD: Tokens_UD, kept_U: npt.NDArray[np.bool_], percent: float) -> None:
    """Take tuples out until the totals are near enough, or none is left.

    A tuple's share in what is wrong is the mean of its domains' totals above their mean, weighed by its tokens.
    """
    totals_D = tokens_UD[kept_U].sum(axis=0)
    while kept_U.any() and diff_percent(totals_D.tolist()) > percent:
        places = np.flatnonzero(kept_U)
        mine_UD = tokens_UD[places]
        wrong_U = mine_UD @ (totals_D - totals_D.mean()) / mine_UD.sum(axis=1)
        out = places[np.argsort(-wrong_U, kind="stable")[: max(1, int(_BATCH * len(places)))]]
        kept_U[out] = False
        totals_D = totals_D - tokens_UD[out].sum(axis=0)


def _own_diff(tokens_UD: Tokens_UD) -> npt.NDArray[np.float64]:
    """How far apart the domains of each tuple are."""
    return np.asarray(tokens_UD.max(axis=1) / tokens_UD.min(axis=1), dtype=np.float64)


def _put_in(tokens_UD: Tokens_UD, kept_U: npt.NDArray[np.bool_], order_U: npt.NDArray[np.intp], bounds: Bounds) -> None:
    """Put in what is out, in an order, as long as the totals stay within bounds."""
    totals_D = tokens_UD[kept_U].sum(axis=0)
    for place in order_U[~kept_U[order_U]]:
        with_it_D = totals_D + tokens_UD[place]
        if with_it_D.max() <= bounds.limit and diff_percent(with_it_D.tolist()) <= bounds.percent:
            kept_U[place] = True
            totals_D = with_it_D
