"""Do the pairs of all texts go the same way? A target that stands in the source's place is found by the letters of both sides.

Every side is counted in threes of characters, which make a model of its language; a side fits where its text is likelier. In
nats per three characters, over the English, French and German that come with modekit: the two languages of a text are 1.2 to
1.7 apart (one language on both sides: at most 0.5), a side of another domain is 0.4 to 1.1 nearer to its own language than to
the other, and a third language less than 0.35 nearer to either. A model that is told the direction by what every source begins
with (`translate English to German:`, `>>fra<<`) may have several.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from modekit.errors import TextError
from modekit.text.pairs import Pair

_PAIRS = 250  # looked at of a text, whose order is that of hashes
_CHARACTERS = 150  # of a side
_FEWEST = 30  # pairs: fewer say nothing
_SHORTEST = 30  # threes of both sides of a pair together: shorter ones say nothing
_ROUNDS = 8
_LANGUAGES = 0.7  # nats apart: what is called two languages, as the median over pairs
_ONE_LANGUAGE = 0.5
_CLEAR = 0.35  # nats by which a side as a whole, or a pair, is nearer to the other side
_TURNED = 0.05  # share of pairs: in true text less than one in a hundred looks turned so clearly
_EQUAL = 0.5
_SMOOTHING = 0.1
_KINDS = 20_000  # of threes, about, that a language has
_TOLD = 0.9  # share of the sources that begin alike
_MOST_WORDS = 5

_Side = Counter[str]
"""How often a text has which three characters."""


def check_pairs(documents: Sequence[str], *, where: str) -> None:
    """Raise TextError where most of a text's pairs have the same text twice, or some of them go the other way."""
    pairs = list(_sample(documents))
    if len(pairs) < _FEWEST:
        return
    equal = sum(pair.source == pair.target for pair in pairs)
    if equal > _EQUAL * len(pairs):
        raise TextError(
            "most pairs have the same text on both sides", where=where,
            found=f"{equal} of {len(pairs)} pairs, such as {next(p.source for p in pairs if p.source == p.target)[:60]!r}",
            expected="a source and its translation", remedy="remove the pairs that are not translated",
        )  # fmt: skip
    sides = [(pair, _threes(pair.source), _threes(pair.target)) for pair in pairs]
    long = [each for each in sides if each[1].total() + each[2].total() >= _SHORTEST]
    if len(long) < _FEWEST:
        return
    turned, gains = _turned([(source, target) for _, source, target in long])
    clearly = [place for place, gain in enumerate(gains) if turned[place] and gain > _CLEAR]
    if _median(gains) < _LANGUAGES or len(clearly) < _TURNED * len(long):
        return
    groups = [[each[0].source for each, turn in zip(long, turned, strict=True) if turn == way] for way in (True, False)]
    if not _told_apart(*groups):
        raise TextError(
            "some pairs of a text go one way and some the other", where=where,
            found=f"{len(clearly)} of {len(long)} pairs, such as {long[clearly[0]][0].source[:60]!r}",
            expected="one language in all sources and the other in all targets",
            remedy="swap source and target of these pairs, or begin every source with what is to be done",
        )  # fmt: skip


@dataclass
class Directions:
    """The texts that were read so far, which all go the same way."""

    _known: list[_Text] = field(default_factory=list)

    def add(self, documents: Sequence[str], *, where: str) -> None:
        """One more text. Raises TextError where its pairs go the other way than those of one before, or are not translated."""
        pairs = list(_sample(documents))
        if len(pairs) < _FEWEST:
            return
        text = _Text(where, pairs)
        for other in self._known:
            _check_between(other, text)
        self._known.append(text)


class _Language:
    """How likely texts are by the characters of others."""

    def __init__(self, sides: Iterable[_Side]) -> None:
        self.counts: _Side = Counter()
        for side in sides:
            self.counts.update(side)
        self._total = self.counts.total() + _SMOOTHING * _KINDS
        self._logs = {three: math.log(number + _SMOOTHING) for three, number in self.counts.items()}
        self._of_none = math.log(_SMOOTHING)

    def likelihood(self, side: _Side) -> float:
        """In nats."""
        logs, of_none = self._logs, self._of_none
        return sum(number * logs.get(three, of_none) for three, number in side.items()) - side.total() * math.log(self._total)

    def without(self, side: _Side) -> float:
        """Of a side that is among those of which this was made, as if it were not."""
        counts, size = self.counts, side.total()
        logs = sum(number * math.log(counts[three] - number + _SMOOTHING) for three, number in side.items())
        return logs - size * math.log(self._total - size)


class _Text:
    """A sample of a text's pairs, as two languages."""

    def __init__(self, where: str, pairs: Sequence[Pair]) -> None:
        self.where = where
        self.sources = [pair.source for pair in pairs]
        sides = [(_threes(pair.source), _threes(pair.target)) for pair in pairs]
        self.source, self.target = _Language(side for side, _ in sides), _Language(side for _, side in sides)
        long = [pair for pair in sides if sum(side.total() for side in pair) >= _SHORTEST]
        self.apart = _median([_gain(*pair, self.source, self.target) for pair in long]) if len(long) >= _FEWEST else 0.0


def _check_between(known: _Text, text: _Text) -> None:
    """Raise TextError where a text does not go the way of one that is known."""
    if known.apart < _LANGUAGES or _told_apart(known.sources, text.sources):
        return
    source, target = _nearer(text.source, known.source, known.target), _nearer(text.target, known.target, known.source)
    figures = f"(sources by {abs(source):.1f}, targets by {abs(target):.1f} nats per three characters)"
    says: str | None = None
    if source < -_CLEAR and target < -_CLEAR and text.apart >= _ONE_LANGUAGE:
        says = f"the sources of the second read as the targets of the first, and its targets as their sources {figures}"
    elif source > _CLEAR and target < -_CLEAR and text.apart < _ONE_LANGUAGE:
        says = f"source and target of the second both read as sources of the first {figures}"
    elif source < -_CLEAR and target > _CLEAR and text.apart < _ONE_LANGUAGE:
        says = f"source and target of the second both read as targets of the first {figures}"
    if says is not None:
        raise TextError(
            "the pairs of two texts do not go the same way", where=f"{known.where} and {text.where}", found=says,
            expected="one language in all sources and the other in all targets",
            remedy="swap source and target of one of them, or give translated text; where several directions are meant, begin "
            "every source with what is to be done",
        )  # fmt: skip


def _turned(sides: Sequence[tuple[_Side, _Side]]) -> tuple[list[bool], list[float]]:
    """Which pairs go the other way than most, and by how much each fits the way that it was found to go."""
    turned = [False] * len(sides)
    gains: list[float] = []
    for _ in range(_ROUNDS):
        pairs = [(target, source) if turn else (source, target) for (source, target), turn in zip(sides, turned, strict=True)]
        sources, targets = _Language(side for side, _ in pairs), _Language(side for _, side in pairs)
        gains = [_gain(*pair, sources, targets) for pair in pairs]
        wrong = [gain < 0 for gain in gains]
        if sum(wrong) * 50 <= len(wrong):
            break
        turned = [turn != other for turn, other in zip(turned, wrong, strict=True)]
    if sum(turned) * 2 > len(turned):  # what is called turned are the fewer
        turned = [not turn for turn in turned]
    return turned, gains


def _gain(source: _Side, target: _Side, sources: _Language, targets: _Language) -> float:
    """By how many nats per three characters a pair is likelier as it is than with its sides swapped, by the other pairs."""
    as_it_is = sources.without(source) + targets.without(target)
    other_way = targets.likelihood(source) + sources.likelihood(target)
    return (as_it_is - other_way) / max(1, source.total() + target.total())


def _nearer(text: _Language, one: _Language, other: _Language) -> float:
    """By how many nats per three characters a text is likelier by one than by the other."""
    return (one.likelihood(text.counts) - other.likelihood(text.counts)) / max(1, text.counts.total())


def _told_apart(some: Sequence[str], others: Sequence[str]) -> bool:
    """Whether nearly all of some sources begin with words with which hardly any of the others does, and the reverse."""
    return any(_begin(some, others, words) and _begin(others, some, words) for words in range(1, _MOST_WORDS + 1))


def _begin(some: Sequence[str], others: Sequence[str], words: int) -> bool:
    begins, number = Counter(_first(source, words) for source in some).most_common(1)[0] if some else ("", 0)
    strange = sum(_first(source, words) == begins for source in others)
    return number > _TOLD * len(some) and strange < (1 - _TOLD) * len(others)


def _first(source: str, words: int) -> str:
    return " ".join(source.split(maxsplit=words)[:words])


def _sample(documents: Sequence[str]) -> Iterator[Pair]:
    return islice((document for document in documents if isinstance(document, Pair)), _PAIRS)


def _threes(side: str) -> _Side:
    text = f" {' '.join(side[:_CHARACTERS].lower().split())} "
    return Counter(text[place : place + 3] for place in range(len(text) - 2))


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
