"""A sample of documents -> groups, and how any other document is put to one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modekit.errors import TextError
from modekit.loaded.load import load_model, load_tokenizer
from modekit.run import Run
from modekit.search.discover.choice import Tried, choose, try_numbers
from modekit.search.discover.evidence import Labels, background
from modekit.search.discover.grouping import Grouping, group
from modekit.search.discover.settings import DiscoverSettings
from modekit.search.discover.space import DIRECTIONS, HiddenSpace, Points, Space, UnitSpace, one_thread, rare_units
from modekit.search.discover.stream import WHERE, Sample
from modekit.search.discover.units import Rows, token_units, word_units


def space_of(settings: DiscoverSettings, run: Run) -> Space:
    """By what documents are alike. Raises SourceError for a base model that cannot be read."""
    if settings.model is None:
        return UnitSpace(word_units())
    tokenizer = load_tokenizer(settings.model, run=run)
    if settings.features == "tokens":
        return UnitSpace(token_units(tokenizer))
    return HiddenSpace(load_model(settings.model, run=run), tokenizer)


@dataclass(frozen=True)
class Learned:
    """How a document is put to a group, and the numbers of groups that were tried."""

    space: Space
    grouping: Grouping
    tried: Sequence[Tried]

    def labels(self, beginnings: Sequence[str]) -> Labels:
        """The groups of documents."""
        points = self.space.points(beginnings)
        with one_thread():
            return self.grouping.nearest(points)


def learn(sample: Sample, settings: DiscoverSettings, space: Space, run: Run) -> Learned:
    """Groups of a sample, as many as are asked for or worth having. Raises TextError where there are not so many.

    Whatever documents are alike by, their words say which groups are the better ones, and how many.
    """
    rows = word_units().rows(sample.beginnings)
    rows = rows[:, rare_units(rows)]
    if not rows.shape[1]:
        raise TextError(
            "the documents have nothing in common",
            where=WHERE,
            found=f"{sample.documents:,} documents without a shared word",
            remedy="give more text",
        )
    points = space.learn(sample.beginnings, max(DIRECTIONS, settings.domains or 0), settings.seed)
    tried: list[Tried] = []
    with one_thread():
        if settings.domains is None:
            tried = try_numbers(
                points, rows, settings.most, settings.seed, lambda done: run.progress("try numbers", done, settings.most)
            )
        domains = settings.domains or choose(tried)
        return Learned(space, _grouped(points, rows, domains, sample, settings.seed), tried)


def _grouped(points: Points, rows: Rows, domains: int, sample: Sample, seed: int) -> Grouping:
    """Groups, the largest first. Raises TextError where documents cannot be told into so many."""
    found = group(points, rows, domains, background(rows), seed) if len(points) >= domains else None
    if found is None:
        raise TextError(
            "the documents cannot be told into so many domains",
            where=f"--domains {domains}",
            found=f"{sample.documents:,} documents, in {len(np.unique(points.round(9), axis=0)):,} places by what they have",
            remedy="give more text, or ask for fewer domains",
        )
    order = np.argsort(-np.bincount(found.labels, minlength=domains), kind="stable")
    return Grouping(found.middles_GD[order], np.argsort(order)[found.labels])
