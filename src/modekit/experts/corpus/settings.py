"""What a balanced corpus is asked to be, checked before anything is read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from modekit.errors import ModekitError, TextError
from modekit.recipes.paths import locate
from modekit.recipes.strict import Name
from modekit.text.documents import check_present

WHERE = "--text"
_LARGEST = 1_000_000.0  # percent
_MOST_HELD_OUT = 0.5


@dataclass(frozen=True)
class BalanceSettings:
    """Attributes:
    max_diff_percent: 100 (largest - smallest) / smallest of the domains' totals of tokens, at most, in every split.
    common: only documents that every domain has, by their id.
    validation: share of the documents that is held out; 0 for none.
    max_tokens: of a domain at most, both splits together.
    seed: of the order in which documents are asked whether they fit.
    """

    max_diff_percent: float = 5.0
    common: bool = False
    validation: float = 0.1
    max_tokens: int | None = None
    seed: int = 0

    def as_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def check_settings(settings: BalanceSettings) -> None:
    """Raise ModekitError for a setting that cannot be."""
    most = settings.max_tokens
    wrong = (
        ("--max-diff-percent", settings.max_diff_percent, "0 or more", 0 <= settings.max_diff_percent <= _LARGEST),
        (
            "--validation",
            settings.validation,
            f"a share from 0 to {_MOST_HELD_OUT}",
            0 <= settings.validation <= _MOST_HELD_OUT,
        ),
        ("--max-tokens", most, "1 or more", most is None or most >= 1),
        ("--seed", settings.seed, "0 or more", settings.seed >= 0),
    )
    for where, found, expected, right in wrong:
        if not right or (isinstance(found, float) and not math.isfinite(found)):
            raise ModekitError("the setting is out of range", where=where, found=found, expected=expected, remedy="correct it")


def checked_texts(texts: Mapping[str, Sequence[str]], root: Path, *, least: int = 1) -> dict[str, str]:
    """Domain -> its text. Raises ModekitError for names that cannot be files, and TextError for a text that is not there.

    A name is a file's name in what is written, and one domain has one text: two of a name are a slip of the pen.
    """
    seen: dict[str, str] = {}
    for name, specs in texts.items():
        try:
            TypeAdapter(Name).validate_python(name)
        except ValidationError:
            raise ModekitError(
                "not a name of a domain",
                where=WHERE,
                found=name,
                expected="letters, digits, '.', '_' and '-', 64 at most",
                remedy="rename it",
            ) from None
        if len(specs) > 1 or name.lower() in seen:
            both = specs if len(specs) > 1 else [seen[name.lower()], *specs]
            raise ModekitError(
                "a domain is named twice",
                where=f"{WHERE} {name}",
                found=", ".join(both),
                remedy="give it one text, a folder where there are several files, or rename one",
            )
        seen[name.lower()] = specs[0]
        check_present(specs, root=root, where=f"{WHERE} {name}")
    if len(texts) < least:
        raise ModekitError(
            "there is nothing to balance",
            where=WHERE,
            found=", ".join(texts) or "no domain",
            expected=f"{least} domains or more",
            remedy="give every domain a --text NAME=PATH",
        )
    chosen = {name: specs[0] for name, specs in texts.items()}
    _refuse_one_text_for_two(chosen, root)
    return chosen


def _refuse_one_text_for_two(texts: Mapping[str, str], root: Path) -> None:
    whose: dict[str, str] = {}
    for name, spec in texts.items():
        place = str(locate(spec, root) or spec)
        if place in whose:
            raise TextError(
                "two domains have the same text",
                where=f"{WHERE} {name}",
                found=f"{spec}: that of {whose[place]}, too",
                remedy="correct the path",
            )
        whose[place] = name
