"""Do the pairs of all texts go the same way? A target that stands in the source's place is found by the letters of both sides.

Every side is counted in threes of characters, which make a model of its language; a side fits where its text is likelier. In
nats per three characters, over the English, French and German that come with modekit: the two languages of a text are 1.2 to
1.7 apart (one language on both sides: at most 0.5), a side of another domain is 0.4 to 1.1 nearer to its own language than to
the other, and a third language less than 0.35 nearer to either.

Only what is clearly wrong is refused. One language on both sides (summaries, corrections) is legitimate beside translations.
Sources that say what is to be done, by how they begin (`translate English to German:`, `>>fra<<`) or by their last words, may
go several ways, also by several templates each; so may the texts of whole models, each source of which goes to one model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

from modekit.errors import TextError
from modekit.text.pairs import Pair

_PAIRS = 250  # looked at of a text, whose order is that of hashes
_CHARACTERS = 150  # of a side
_FEWEST = 30  # pairs: fewer say nothing
_SHORTEST = 30  # threes of both sides of a pair together: shorter ones say nothing
_ROUNDS = 8
_LANGUAGES = 0.7  # nats apart: what is called two languages, as the median over pairs
_CLEAR = 0.35  # nats by which a side as a whole, or a pair, is nearer to the other side
_TURNED = 0.05  # share of pairs: in true text less than one in a hundred looks turned so clearly
_EQUAL = 0.95  # share of the pairs: what is corrected, or spelled another way, is often right as it is
_SMOOTHING = 0.1
_KINDS = 20_000  # of threes, about, that a language has
_MOST_COMPARED = 5_000  # of the threes of a text: the commonest
_MOST_KINDS = 6  # of texts, with which others are compared
_TOLD = 0.9  # share of the sources that say what is to be done
_TEMPLATE = 0.05  # share of the sources that one template has, which are
_FEWEST_OF_TEMPLATE = 3
_RARER = 0.25  # as often, at most, it stands among others
_FIRST_WORDS, _LAST_WORDS, _FIRST_CHARACTERS = 5, 3, 3

_Side = Counter[str]
"""How often a text has which three characters."""


def check_pairs(documents: Sequence[str], *, where: str) -> None:
    """Raise TextError where nearly all of a text's pairs have the same text twice, or some of them go the other way."""
    pairs = list(_sample(documents))
    if len(pairs) < _FEWEST:
        return
    equal = sum(pair.source == pair.target for pair in pairs)
    if equal >= _EQUAL * len(pairs):
        raise TextError(
            "nearly all pairs have the same text on both sides",
            where=where,
            found=f"{equal} of {len(pairs)} pairs, such as {next(p.source for p in pairs if p.source == p.target)[:60]!r}",
            expected="a source and its translation",
            remedy="remove the pairs that are not translated",
        )
    sides = [(pair, *both) for pair, both in zip(pairs, _sides(pairs), strict=True)]
    long = [each for each in sides if each[1].total() + each[2].total() >= _SHORTEST]
    if len(long) < _FEWEST:
        return
    turned, gains = _turned([(source, target) for _, source, target in long])
    clear = [(each[0].source, turn) for each, turn, gain in zip(long, turned, gains, strict=True) if gain > _CLEAR]
    fewer, most = ([_ends(source) for source, turn in clear if turn == way] for way in (True, False))
    if _median(gains) < _LANGUAGES or len(fewer) < _TURNED * len(long):
        return
    if not _told_apart(fewer, most):
        raise TextError(
            "some pairs of a text go one way and some the other",
            where=where,
            found=f"{len(fewer)} of {len(long)} pairs, such as {next(source for source, turn in clear if turn)[:60]!r}",
            expected="one language in all sources and the other in all targets",
            remedy="swap source and target of these pairs, or begin every source with what is to be done",
        )


@dataclass
class Directions:
    """The texts that were read so far, which all go the same way.

    `modules` is what their recipe mixes: whole models (`all`) may go several ways, because each source goes to one of them.
    """

    modules: str | Sequence[str] = "auto"
    _kinds: list[_Text] = field(default_factory=list)

    def add(self, documents: Sequence[str], *, where: str) -> None:
        """One more text. Raises TextError where its pairs go the other way than those of one before."""
        pairs = [] if self.modules == "all" else list(_sample(documents))
        if len(pairs) < _FEWEST:
            return
        text = _Text(where, pairs)
        if text.apart is None or text.apart < _LANGUAGES:
            return
        known = [_goes_as(text, kind) for kind in self._kinds]
        if not any(known) and len(self._kinds) < _MOST_KINDS:
            self._kinds.append(text)


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
    """A sample of a text's pairs, as two languages; `apart` is None where too few pairs are long enough to say so."""

    def __init__(self, where: str, pairs: Sequence[Pair]) -> None:
        self.where = where
        self.ends = [_ends(pair.source) for pair in pairs]
        sides = _sides(pairs)
        self.source, self.target = _Language(side for side, _ in sides), _Language(side for _, side in sides)
        long = [pair for pair in sides if sum(side.total() for side in pair) >= _SHORTEST]
        self.apart = _median([_gain(*pair, self.source, self.target) for pair in long]) if len(long) >= _FEWEST else None


def _goes_as(text: _Text, known: _Text) -> bool:
    """Whether a text clearly goes the way of one that is known. Raises TextError where it clearly goes the other way."""
    source, target = _nearer(text.source, known.source, known.target), _nearer(text.target, known.target, known.source)
    if source < -_CLEAR and target < -_CLEAR and not _told_apart(known.ends, text.ends):
        raise TextError(
            "the pairs of two texts do not go the same way",
            where=f"{known.where} and {text.where}",
            found="the sources of the second read as the targets of the first, and its targets as their sources "
            f"(sources by {-source:.1f}, targets by {-target:.1f} nats per three characters)",
            expected="one language in all sources and the other in all targets",
            remedy="swap source and target of one of them, or begin every source with what is to be done",
        )
    return source > _CLEAR and target > _CLEAR


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
    commonest = Counter(dict(text.counts.most_common(_MOST_COMPARED)))
    return (one.likelihood(commonest) - other.likelihood(commonest)) / max(1, commonest.total())


_Ends = tuple[str, str]
"""How a source begins, and how it ends."""


def _ends(source: str) -> _Ends:
    return " ".join(source[:_CHARACTERS].split()), " ".join(source[-_CHARACTERS:].split())


def _told_apart(some: Sequence[_Ends], others: Sequence[_Ends]) -> bool:
    """Whether the sources of one of two groups say what is to be done, each by one of a few beginnings or last words, which are
    those of hardly any source of the other.
    """
    one, other = [_said(*ends) for ends in some], [_said(*ends) for ends in others]
    return _say_so(one, other) or _say_so(other, one)


def _say_so(some: Sequence[set[str]], others: Sequence[set[str]]) -> bool:
    here, there = Counter(chain.from_iterable(some)), Counter(chain.from_iterable(others))
    fewest = max(_FEWEST_OF_TEMPLATE, _TEMPLATE * len(some))
    templates = {
        each for each, number in here.items() if number >= fewest and there[each] * len(some) <= _RARER * number * len(others)
    }
    told, strange = (sum(not templates.isdisjoint(said) for said in group) for group in (some, others))
    return told >= _TOLD * len(some) and strange < (1 - _TOLD) * len(others)


def _said(first: str, last: str) -> set[str]:
    """What may be a template: leading words and characters (a tag may have no space behind it), and last words."""
    words, ending = first.split(" "), last.split(" ")
    said = {f"^{' '.join(words[:number])} " for number in range(1, min(_FIRST_WORDS, len(words)) + 1)}
    said |= {f"^{first[:number]}" for number in range(_FIRST_CHARACTERS, len(first) + 1)}
    return said | {f"{' '.join(ending[-number:])}$" for number in range(1, min(_LAST_WORDS, len(ending)) + 1)}


def _sides(pairs: Sequence[Pair]) -> list[tuple[Counter[str], Counter[str]]]:
    """Source and target of every pair, without what all sources begin with."""
    lead = _shared_lead(pairs)
    return [(_threes(pair.source.removeprefix(lead)), _threes(pair.target)) for pair in pairs]


def _shared_lead(pairs: Sequence[Pair]) -> str:
    """What nearly all sources begin with, as whole words: a template, and no language."""
    lead = ""
    while True:
        longer = Counter(
            pair.source[: pair.source.index(" ", len(lead)) + 1]
            for pair in pairs
            if pair.source.startswith(lead) and " " in pair.source[len(lead) :]
        )
        best, number = longer.most_common(1)[0] if longer else (lead, 0)
        if number < _TOLD * len(pairs):
            return lead
        lead = best


def _sample(documents: Sequence[str]) -> Iterator[Pair]:
    return islice((document for document in documents if isinstance(document, Pair)), _PAIRS)


def _threes(side: str) -> _Side:
    text = f" {' '.join(side[:_CHARACTERS].lower().split())} "
    return Counter(text[place : place + 3] for place in range(len(text) - 2))


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
