"""How one plain mixture holds N fine-tunes of a base that is a mixture itself, and a token's top k come from one of them.

The routers of such a base choose the k largest of N M logits. Those of the n-th fine-tune are its own, less a penalty p_n
that is zero for the best fine-tune and large for all others: so its k best win, and their weights are its own. An offset that
*adds* to the chosen ones would cost precision: at 50, numbers of 16 bits stand 0.25 apart.

The layer in front, whose attention has averaged the evidence s_n, makes the penalties. All of its experts are the same, one
hidden unit for every ordered pair:

    p_n = c sum_m silu(2^14 (s_m - s_n))           silu(x) is x above zero, and nothing below

In a later layer the norm passes p_n, and the gates of the n-th fine-tune read it. Only the sign matters: with its size at
2^20, a lead of 0.002 nats keeps every other fine-tune out, in streams up to 10^5 times their usual size. Who is within that
shares the top k. Weights of the norms make numbers of usual size of small channels: quantised formats lose others.

Shape legend: E experts, M experts that each has of its own, J averages, F hidden units.
"""

from __future__ import annotations

from itertools import permutations
from typing import TYPE_CHECKING

from modekit.weights.padding import Entry, FFNKind

if TYPE_CHECKING:
    from modekit.planning.channels import Channels

LOUD = 2.0**15
"""Weights of norms where averages and penalties are read: behind them an average is half of what it says in nats."""
_SHARP = 2.0**15
_WRITTEN = 2.0**-11
"""Of up and of down each; the constant that up reads is 2^-10."""
_PENALTY = 2.0**37


def pairs(experts: int) -> int:
    """Hidden units that the layer in front needs."""
    return experts * (experts - 1)


def front_units(channels: Channels, part: FFNKind, of_all: bool) -> tuple[Entry, ...]:
    """Of an expert of the layer in front; `of_all`: of all in one tensor."""
    tall = channels.expert_hidden + channels.more_units
    if part == "down":
        one, height, parts = _down(channels), channels.hidden + channels.spare, [_down(channels)]
        return _repeated(parts, height, channels.experts * channels.inner) if of_all else one
    both = {"gate": [_gate(channels)], "up": [_up(channels)], "gate_up": [_gate(channels), _up(channels)]}[part]
    return _repeated(both, tall, channels.experts * channels.inner) if of_all else both[0]


def _repeated(parts: list[tuple[Entry, ...]], height: int, count: int) -> tuple[Entry, ...]:
    matrices = parts * count
    entries = ((place, entry) for place, part in enumerate(matrices) for entry in part)
    return tuple((place * height + row, column, value) for place, (row, column, value) in entries)


def _gate(channels: Channels) -> tuple[Entry, ...]:
    said = (
        (unit, channels.context.start + average * channels.experts + expert, sign * _SHARP)
        for unit, pair in enumerate(permutations(range(channels.experts), 2))
        for expert, sign in zip(pair, (-1, 1), strict=True)
        for average in range(len(channels.decays))
    )
    return tuple(said)


def _up(channels: Channels) -> tuple[Entry, ...]:
    return tuple((unit, channels.constant, _WRITTEN) for unit in range(pairs(channels.experts)))


def _down(channels: Channels) -> tuple[Entry, ...]:
    units = enumerate(permutations(range(channels.experts), 2))
    return tuple((channels.penalties.start + expert, unit, _WRITTEN) for unit, (expert, _) in units)


def gate_entries(channels: Channels, layer: int) -> tuple[Entry, ...]:
    """Of the gates (E M, D + P) of a layer of the result; in front, whose experts are the same, they read the averages."""
    rows = range(channels.experts * channels.inner)
    if layer > 0:
        return tuple((row, channels.penalties.start + row // channels.inner, -_PENALTY) for row in rows)
    return tuple(
        (row, channels.context.start + average * channels.experts + row // channels.inner, 1.0)
        for row in rows
        for average in range(len(channels.decays))
    )
