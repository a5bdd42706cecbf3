"""What nothing but Python runs: mixtures of models with an encoder, which read a source and write its target."""

from __future__ import annotations

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.errors import UnsupportedError


def refuse_pairs(checkpoint: Checkpoint, what: str, *, option: str, remedy: str = "") -> None:
    """Raise UnsupportedError for a mixture of models with an encoder. `what`: what such a one cannot have, in a sentence.

    Asked first, before any other reason, whose remedies such a mixture could not follow.
    """
    if checkpoint.shape.family.pair:
        raise UnsupportedError(
            what,
            where=f"{checkpoint.folder}: {option}" if option else str(checkpoint.folder),
            found="it has an encoder",
            expected="a decoder alone",
            remedy=remedy or "call it in Python (docs/translation.md)",
        )
