"""What is asked of `modekit discover`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from modekit.errors import ModekitError

Features = Literal["words", "tokens", "hidden"]
MOST_DOMAINS = 64
"""In one go: a group is an open file, and a name that somebody reads."""


@dataclass(frozen=True)
class DiscoverSettings:
    """How documents are grouped.

    Attributes:
        domains: how many groups; None to choose by held-out likelihood.
        most: how many are tried then.
        features: by what documents are alike: their words, the base's tokens, or the base's hidden states.
        model: folder of the base, for tokens and hidden states.
        sample: documents that groups are learned from at most; the others are put to them afterwards.
        seed: where the search for groups begins, and which documents are the sample.
    """

    domains: int | None = None
    most: int = 12
    features: Features = "words"
    model: Path | None = None
    sample: int = 8_192
    seed: int = 0

    def as_data(self) -> dict[str, Any]:
        """Plain data, without where things lie on this machine."""
        return {**asdict(self), "model": None if self.model is None else self.model.name}


def check_settings(settings: DiscoverSettings) -> None:
    """Raise ModekitError for numbers that mean nothing, and for a base that is missing or has no effect."""
    for name, value in (("--domains", settings.domains), ("--most", settings.most)):
        if value is not None and not 2 <= value <= MOST_DOMAINS:
            raise ModekitError(
                "no such number of domains to group documents into",
                where=name,
                found=value,
                expected=f"2 to {MOST_DOMAINS}",
                remedy="write another number, or leave it out to have one proposed",
            )
    if settings.sample < 2:
        raise ModekitError(
            "too few documents to learn from",
            where="--sample",
            found=settings.sample,
            expected="2 or more",
            remedy="write a larger number",
        )
    if settings.features == "words" and settings.model is not None:
        raise ModekitError(
            "the setting has no effect",
            where="--model",
            found=settings.model.name,
            expected="--features tokens or hidden",
            remedy="remove it, or add --features",
        )
    if settings.features != "words" and settings.model is None:
        raise ModekitError(
            "the base model is needed", where=f"--features {settings.features}", found="no --model", remedy="add --model BASE"
        )


def checked_features(features: str) -> Features:
    """One of the kinds. Raises ModekitError for anything else."""
    if features not in get_args(Features):
        raise ModekitError(
            "unknown choice", where="--features", found=features, expected="words, tokens or hidden", remedy="write one of them"
        )
    return cast(Features, features)
