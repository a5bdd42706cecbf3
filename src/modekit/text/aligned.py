"""Parallel text in two plain files, a pair per line: `news.en+news.fr`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from modekit.errors import TextError
from modekit.files.read import open_regular
from modekit.recipes.paths import locate, sides_of
from modekit.text.pairs import Pair, whole_pair
from modekit.text.plain import lines_of, plain_text


def aligned_files(spec: str, root: Path) -> tuple[Path, Path] | None:
    """The two files that `news.en+news.fr` names, source and target; None where it names something itself, or no two files."""
    sides = sides_of(spec, root)
    if sides is None:
        return None
    source, target = (locate(side, root) for side in sides)
    return None if source is None or target is None else (source, target)


def read_aligned(source: Path, target: Path, *, where: str) -> Iterator[Pair]:
    """A pair per line of two files; a line that is empty in both is none.

    Raises TextError when one has more lines than the other, a line is empty in one alone, or they cannot be read.
    """
    counts = [0, 0]
    try:
        with open_regular(source) as first, open_regular(target) as second:
            streams = (lines_of(first, where=f"{where}: {source.name}"), lines_of(second, where=f"{where}: {target.name}"))
            for number, both in enumerate(zip_longest(*streams), 1):
                counts = [counts[side] + (line is not None) for side, line in enumerate(both)]
                if counts[0] == counts[1]:
                    places = (f"{where}: {file.name}:{number}" for file in (source, target))
                    sides = [plain_text(line, where=place) for line, place in zip(both, places, strict=True)]
                    if any(side.strip() for side in sides):
                        yield whole_pair(sides[0], sides[1], where=f"{where}: line {number} of {source.name} and {target.name}")
    except OSError as error:
        raise TextError("the text cannot be read", where=where, found=error.strerror, remedy="make it readable") from None
    if counts[0] != counts[1]:
        raise TextError(
            "two files of parallel text have different numbers of lines",
            where=where,
            found=f"{source.name}: {counts[0]:,} lines, {target.name}: {counts[1]:,} lines",
            expected="a line for a line",
            remedy="align the files: line 1 of one is the translation of line 1 of the other",
        )
