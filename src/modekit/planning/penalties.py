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

from modekit.weights.padding import CarriedPart, Entry, FFNKind, Pad

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
    gate, up, down = _units(channels)
    one = {"gate": [gate], "up": [up], "gate_up": [gate, up], "down": [down]}[part]
    if not of_all:
        return one[0]
    height = channels.hidden + channels.spare if part == "down" else channels.expert_hidden + channels.more_units
    matrices = enumerate(one * (channels.experts * channels.inner))
    return tuple((place * height + row, column, value) for place, said in matrices for row, column, value in said)


def _units(channels: Channels) -> tuple[tuple[Entry, ...], tuple[Entry, ...], tuple[Entry, ...]]:
    """Of gate, up and down of one expert."""
    units = list(enumerate(permutations(range(channels.experts), 2)))
    starts = _averages(channels)
    gate = (
        (unit, start + expert, sign * _SHARP)
        for unit, pair in units
        for expert, sign in zip(pair, (-1, 1), strict=True)
        for start in starts
    )
    up = ((unit, channels.constant, _WRITTEN) for unit, _ in units)
    return tuple(gate), tuple(up), tuple((channels.penalties.start + expert, unit, _WRITTEN) for unit, (expert, _) in units)


def _averages(channels: Channels) -> list[int]:
    """Where each begins."""
    return [channels.context.start + average * channels.experts for average in range(len(channels.decays))]


def gate_pad(channels: Channels, layer: int) -> Pad:
    """How the gates (E M, D) of a layer of the result are widened; in front, whose experts are the same, they read averages."""
    starts, factor = ([channels.penalties.start], -_PENALTY) if layer > 0 else (_averages(channels), 1.0)
    rows = range(channels.experts * channels.inner)
    entries = tuple((row, start + row // channels.inner, factor) for row in rows for start in starts)
    carries = channels.carry is not None and layer > 0
    return Pad(columns=channels.spare, entries=entries, carried=CarriedPart("router", layer) if carries else None)
