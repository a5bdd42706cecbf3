"""Text of no domain: what it is made from where there is none, and how much less than the experts the base may have to say.

The base's row of a table is made from the base's text (general text, of which the domains are none) and from texts of tokens
drawn at random, which stand for all that nobody has thought of: other languages, other scripts. A text goes to the base where
that row leads. How far it must lead is one number, added to the row, such that of held-out text of every domain no more
tokens go there than are allowed (false alarms).

Shape legend: S sequence, E experts, H rows of a table, V vocabulary, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from modekit.routing.token_text import TokenText

_SHARE = 3
"""One made text for so many of the base's own."""
_POWERS = (0.5, 0.0)
"""Tokens are drawn by their frequency in the domains' text to these powers, in equal parts of the texts."""


def made_texts(texts: Sequence[TokenText], base: int, special: Sequence[int], vocabulary: int, seed: int) -> list[torch.Tensor]:
    """Texts of no domain (S,) int32, as long as those of the domains; `texts` are in the order of the experts."""
    draw = torch.Generator().manual_seed(seed)
    domains = [text for place, text in enumerate(texts) if place != base] or list(texts)
    counts_V = torch.bincount(torch.cat([text.ids_N for text in domains]).long(), minlength=vocabulary).double().clamp_min(0.5)
    lengths = torch.cat([text.lengths for text in domains])
    found = []
    for number in range(max(len(_POWERS), len(texts[base].lengths) // _SHARE)):
        weights_V = counts_V ** _POWERS[number % len(_POWERS)]
        weights_V[list(special)] = 0.0
        length = int(lengths[torch.randint(len(lengths), (1,), generator=draw)])
        if bool(weights_V.any()):
            found.append(torch.multinomial(weights_V, length, replacement=True, generator=draw).int())
    return found


def over_base(logits: torch.Tensor, base: int) -> torch.Tensor:
    """By how much the likeliest expert stands above the base: (..., E) -> (...)."""
    others = [place for place in range(logits.shape[-1]) if place != base]
    if not others:
        return torch.zeros_like(logits[..., base])
    return logits[..., others].max(-1).values - logits[..., base]


def room_of(leads: Sequence[torch.Tensor], alarms: float) -> float:
    """What may be added to the base's logit such that of no domain more than a share `alarms` of the tokens goes to it.

    `leads`: per domain, by how much experts stand above the base at each of its tokens (N,). 0 without any token.
    """
    rooms = []
    for lead_N in leads:
        if len(lead_N):  # the largest of those that may be lost: what equals it goes on to the experts' side by a hair
            lost = min(int(alarms * len(lead_N)), len(lead_N) - 1)
            lowest = lead_N.double().kthvalue(lost + 1).values
            rooms.append(math.nextafter(float(lowest), -math.inf))
    return min(rooms, default=0.0)
