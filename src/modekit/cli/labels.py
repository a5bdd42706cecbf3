"""Options of `specialize` that say how labels of several domains, and text of none, are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from modekit.cli.options import texts_by_domain
from modekit.cli.shell import refuse_without_effect
from modekit.errors import ModekitError

if TYPE_CHECKING:
    from modekit.experts.labelled import Generic, Labelled


@dataclass(frozen=True)
class LabelOptions:
    """Labels and text of no domain: what is read of a text besides what it says."""

    tags: Annotated[
        bool,
        typer.Option(
            "--tags",
            help="Read each --text label=FILE with a reserved token for its label; BASE gets missing ones.",
        ),
    ] = False
    randomise: Annotated[float | None, typer.Option(help="Probability of a random label (--tags; default 0).")] = None
    randomise_to: Annotated[
        Literal["all", "others", "generic", "half"] | None,
        typer.Option(help="Labels to draw from: all (default; its own, too), others, generic (none), half (none or another)."),
    ] = None
    generic: Annotated[list[str] | None, typer.Option(help="Text of no domain, read without a tag; repeatable.")] = None
    generic_share: Annotated[float | None, typer.Option(help="Its share of the tokens that are read (default 0.3).")] = None

    def check(self, teacher: str | None) -> None:
        """Raise ModekitError for an option that changes nothing, or a number that is none."""
        if teacher is not None:
            refuse_without_effect(
                "a training without --teacher", {"--tags": self.tags or None, "--generic": self.generic or None}
            )
        if not self.tags:
            refuse_without_effect("texts with labels (--tags)", {"--randomise": self.randomise})
        if not self.randomise:
            refuse_without_effect("a probability above 0 (--randomise)", {"--randomise-to": self.randomise_to})
        if not self.generic:
            refuse_without_effect("text of no domain (--generic FILE)", {"--generic-share": self.generic_share})
        if self.randomise is not None and not 0 <= self.randomise < 1:
            raise _not_a_share("--randomise", self.randomise, "a probability: at least 0, and below 1")
        if self.generic_share is not None and not 0 < self.generic_share < 1:
            raise _not_a_share("--generic-share", self.generic_share, "a share: above 0, and below 1")

    def texts(self, text: list[str]) -> Sequence[str] | Labelled:
        """What --text says, by label where it has labels. Raises ModekitError for a label that is none, or twice."""
        if not self.tags:
            return text
        from modekit.experts.labelled import Labelled

        return Labelled(_by_label(text), self.randomise or 0.0, self.randomise_to or "all")

    def of_no_domain(self) -> Generic | None:
        """What --generic says."""
        if not self.generic:
            return None
        from modekit.experts.labelled import SHARE, Generic

        return Generic(self.generic, SHARE if self.generic_share is None else self.generic_share)


def _not_a_share(where: str, found: float, expected: str) -> ModekitError:
    return ModekitError("the number is out of range", where=where, found=found, expected=expected, remedy="correct it")


def _by_label(text: list[str]) -> dict[str, list[str]]:
    from modekit.recipes.strict import NAME_RULE, is_name

    found = texts_by_domain(text)
    for label, specs in found.items():
        if not is_name(label):
            raise ModekitError(
                "a label that no expert could have as its name",
                where="--text",
                found=label[:80],
                expected=NAME_RULE,
                remedy="write --text law=FILE",
            )
        if len(specs) > 1:
            raise ModekitError(
                "a label is given twice",
                where=f"--text {label}=...",
                found=", ".join(specs),
                remedy="put its texts into one folder, or leave one out",
            )
    return found
