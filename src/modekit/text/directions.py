"""A note where the pairs of two texts seem to go opposite ways, as when one was named `news.fr+news.en` by mistake.

A side's counts of three characters are a profile of its language, and profiles of one language are alike in any domain.
Texts whose sources say what is to be done (`translate English to German: ...`) may well go both ways: so it is a note.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations, islice

from modekit.text.document import Document, Pair

_PAIRS, _CHARACTERS = 250, 150  # of a text that are looked at, and of each side
_FEWEST = 30  # pairs: fewer say nothing
_CLEAR = 0.15  # by which both sides together are more alike crosswise: 0.2 to 1.1 between English, French and German
_Profile = Counter[str]


def notes_on_directions(texts: Mapping[str, Sequence[Document]]) -> Iterator[str]:
    """A note for every two texts, by their names, of which the one reads as if its sides were swapped."""
    profiles: dict[str, tuple[_Profile, _Profile]] = {}
    for name, documents in texts.items():
        pairs = list(islice((document for document in documents if isinstance(document, Pair)), _PAIRS))
        if len(pairs) >= _FEWEST:
            profiles[name] = _profile(pair.source for pair in pairs), _profile(pair.target for pair in pairs)
    for (name, (source, target)), (other, (its_source, its_target)) in combinations(profiles.items(), 2):
        as_they_are = _alike(source, its_source) + _alike(target, its_target)
        if _alike(source, its_target) + _alike(target, its_source) > as_they_are + _CLEAR:
            yield (
                f"{other}: its sources read as the targets of {name}, and its targets as the sources there: swap the sides of "
                "one, unless every source says into which language it goes"
            )


def _profile(sides: Iterable[str]) -> _Profile:
    counts: _Profile = Counter()
    for side in sides:
        text = f" {' '.join(side[:_CHARACTERS].lower().split())} "
        counts.update(text[place : place + 3] for place in range(len(text) - 2))
    return counts


def _alike(one: _Profile, other: _Profile) -> float:
    """Cosine of two profiles."""
    lengths = [math.sqrt(sum(number**2 for number in counts.values())) for counts in (one, other)]
    return sum(number * other[three] for three, number in one.items()) / max(1e-9, lengths[0] * lengths[1])
