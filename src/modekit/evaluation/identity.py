"""What a row was made from: its identity names the weights and the text, so that an unchanged row is not run again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.files.typed import Count, Label
from modekit.recipes.mixture import CHOICES

_DECIDES = {"method", *CHOICES, "always_on", "weights", "router"}
"""Keys of a mixture that say how its router decides; the others say what its experts are."""


@dataclass(frozen=True)
class ReadText:
    """The documents of a domain's held-out text, how many tokens of them were read, and a digest of all the documents."""

    documents: Count
    tokens: Count
    sha256: Label


@dataclass(frozen=True)
class ReadSequences(ReadText):
    """The same of text that was read in sequences of at most so many tokens."""

    sequence_length: Count


NO_RECORD = ReadSequences(0, 0, "", 0)
"""Of text whose results are not kept."""


def row_identity(model: str, checkpoint: Checkpoint, records: Sequence[ReadSequences]) -> str:
    """Names a model on text, as the mixture's tokenizer reads it: sha256 of all three."""
    texts = [asdict(record) for record in records]
    return hashlib.sha256(f"{model} {checkpoint.identity['tokenizer']} {texts}".encode()).hexdigest()


def mixture_identities(checkpoint: Checkpoint) -> tuple[str, str]:
    """What the experts are, which is all that the oracle runs, and how the router decides between them.

    Both are of `Checkpoint.identity`, but for what experts are called, which changes no row.
    """
    said, recipe = checkpoint.identity, checkpoint.record.recipe
    low_rank = [(expert.bits, expert.lora_rank) for expert in recipe.experts]
    carries = recipe.mixture.model_dump(mode="json", exclude=_DECIDES)
    experts_id = (
        f"{said['sources']} {low_rank} {carries} {recipe.output.dtype} {checkpoint.record.native_type} {said['trained']}"
    )
    experts_id += f" {said['weights']}"
    decides = recipe.mixture.model_dump(mode="json", include=_DECIDES)
    return experts_id, f"{decides} {said['router_sha256']} {said['evidence_sha256']} {said['embedding']} {said['config']}"
