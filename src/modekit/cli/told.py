"""Labels at test time: the options of `modekit eval` that say which are told, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from modekit.evaluation.labels import Labels


@dataclass(frozen=True)
class ToldOptions:
    """Which labels a mixture is told of the texts, and how."""

    labels: Annotated[
        str | None,
        typer.Option(metavar="right,wrong,none", help="Labels to score the mixture with: some of right, wrong, none, or all."),
    ] = None
    by: Annotated[
        Literal["gate", "tag"] | None,
        typer.Option(help="How a label acts: gate (default; all weight on its expert) or tag (its token before the text)."),
    ] = None

    def of_labels(self) -> dict[str, object]:
        """The options by name."""
        return {"--labels": self.labels, "--by": self.by}

    def asked(self) -> Labels | None:
        """What is asked for: all labels where only the way is given; None without either. Raises ModekitError."""
        from modekit.evaluation.labels import labels_asked

        return labels_asked(self.labels, self.by)
