"""What a row was made from: its identity names the weights and the text, so that an unchanged row is not run again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.evaluation.results import Results

_DECIDES = {"method", "top_k", "top_p", "always_on", "weights", "router"}
"""Keys of a mixture that say how its router decides; the others say what its experts carry."""
_RECORD_KEYS = ("documents", "tokens", "sha256", "sequence_length")


def belongs_to(results: Results, checkpoint: Checkpoint) -> bool:
    """Whether a table's mixture is this checkpoint as it is now: experts, router, training and text."""
    mixture = next((row for row in results.rows if row.kind == "mixture"), None)
    names = [*results.domains, *results.unseen]
    if mixture is None or any(set(results.text.get(name, {})) != set(_RECORD_KEYS) for name in names):
        return False
    carried, decided = mixture_identities(checkpoint)
    return mixture.identity == row_identity(f"{carried} {decided}", checkpoint, [results.text[name] for name in names])


def row_identity(model: str, checkpoint: Checkpoint, records: Sequence[Mapping[str, Any]]) -> str:
    """Names a model on text, as the mixture's tokenizer reads it: sha256 of all three."""
    ordered = [{key: record[key] for key in _RECORD_KEYS} for record in records]  # a file may hold them in another order
    return hashlib.sha256(f"{model} {checkpoint.identity['tokenizer']} {ordered}".encode()).hexdigest()


def mixture_identities(checkpoint: Checkpoint) -> tuple[str, str]:
    """What the experts carry, which is all that the oracle runs, and how the router decides between them.

    Both are of `Checkpoint.identity`, but for what experts are called, which changes no row.
    """
    said, recipe = checkpoint.identity, checkpoint.record.recipe
    low_rank = [expert.lora_rank for expert in recipe.experts]
    carries = recipe.mixture.model_dump(mode="json", exclude=_DECIDES)
    carried = f"{said['sources']} {low_rank} {carries} {recipe.output.dtype} {checkpoint.record.native_type} {said['trained']}"
    carried += f" {said['weights']}"
    decides = recipe.mixture.model_dump(mode="json", include=_DECIDES)
    return carried, f"{decides} {said['router_sha256']} {said['evidence_sha256']} {said['embedding']} {said['config']}"
