"""Which documents are kept, so that the domains' totals of tokens are near enough.

    (largest total - smallest total) / smallest total <= max_diff_percent / 100

Documents are whole, and asked in an order that a seed gives. Apart, each domain has units of its own, and one that does not fit
under the cap is passed over. Common, a unit has tokens in every domain, and goes in or out of all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from modekit.experts.corpus.count import Key

KeptUnits = Sequence[Sequence[Key]]
"""Per domain the units that are kept, in order."""
_ROUNDS = 1_000  # in which a cap is lowered
_BATCH = 0.005  # of the tuples left is taken out before the totals are looked at again


def diff_percent(totals: Sequence[int]) -> float:
    """100 (largest - smallest) / smallest; infinite where one has nothing."""
    return 100 * (max(totals) - min(totals)) / min(totals) if min(totals) else float("inf")


def in_order(units: Iterable[Key], seed: int) -> list[Key]:
    """Units in the order that a seed gives, in whatever order they come."""
    return sorted(units, key=lambda unit: hashlib.sha256(f"balance {seed} ".encode() + unit).digest())


def is_held_out(unit: Key, share: float) -> bool:
    """Whether a unit is validation: by its own hash, whatever the seed and the other units.

    It is another hash than that of `text/splits.py`, so that what is left for training has all three of its splits.
    """
    return int.from_bytes(hashlib.sha256(b"validation" + unit).digest()[:8], "big") < share * 2**64


def choose_apart(units: Sequence[Mapping[Key, int]], percent: float, most: int | None, seed: int) -> KeptUnits | None:
    """Of every domain's units (with their tokens) those to keep, at most `most` tokens of each; None where none are found.

    The smallest domain's total is the cap. Where it leaves a domain too far below, it is lowered to what that one reached and
    its percent.
    """
    orders = [in_order(each, seed) for each in units]
    cap = min(sum(each.values()) for each in units)
    cap = cap if most is None else min(cap, most)
    for _ in range(_ROUNDS):
        kept = [_filled(order, tokens, cap) for order, tokens in zip(orders, units, strict=True)]
        totals = [sum(tokens[unit] for unit in each) for each, tokens in zip(kept, units, strict=True)]
        if diff_percent(totals) <= percent:
            return kept
        cap = min(cap - 1, int(min(totals) * (1 + percent / 100)))
        if cap <= 0:
            break
    return None


def _filled(order: Sequence[Key], tokens: Mapping[Key, int], cap: int) -> list[Key]:
    """Units that fit under a cap, one after the other."""
    kept, left = [], cap
    for unit in order:
        if tokens[unit] <= left:
            kept.append(unit)
            left -= tokens[unit]
    return kept


def choose_common(units: Sequence[Mapping[Key, int]], percent: float, most: int | None, seed: int) -> KeptUnits | None:
    """Units that every domain has, at most `most` tokens of each domain; None where none are left.

    Tuples of tokens (of U units in D domains) are taken out until the totals are near enough. A tuple's share in what is wrong
    is the mean of its domains' totals above their mean, weighed by its tokens; those with the largest go first.
    """
    keys = in_order(set.intersection(*(set(each) for each in units)), seed)
    tokens_UD = np.array([[each[key] for each in units] for key in keys], dtype=np.int64).reshape(len(keys), len(units))
    places = np.arange(len(keys))
    if most is not None:
        places = places[(tokens_UD.cumsum(axis=0) <= most).all(axis=1)]
    totals_D = tokens_UD[places].sum(axis=0)
    while len(places) and diff_percent(totals_D.tolist()) > percent:
        mine_UD = tokens_UD[places]
        wrong_U = mine_UD @ (totals_D - totals_D.mean()) / mine_UD.sum(axis=1)
        out = np.argsort(-wrong_U, kind="stable")[: max(1, int(_BATCH * len(places)))]
        totals_D = totals_D - mine_UD[out].sum(axis=0)
        places = np.delete(places, out)
    return [[keys[place] for place in places]] * len(units) if len(places) else None
