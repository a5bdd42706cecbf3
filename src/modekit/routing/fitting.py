"""What a fit is given, and what it gives. Needs no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.record import RouterRecord
from modekit.checkpoint.router_file import Gates
from modekit.recipes.recipe import Recipe
from modekit.recipes.router import Router
from modekit.run import QUIET, Run
from modekit.sources.family import Reads

TextProvenance = Mapping[str, Any]
"""What is remembered of a text (text/splits.py)."""


@dataclass(frozen=True)
class Fitting:
    """A checkpoint whose gates are to be set, and the text they may be set from.

    Attributes:
        checkpoint: under the new routing: its slots are the routers that need a gate.
        recipe: what it is to be afterwards.
        root: folder that the recipe's paths are relative to.
        folder: of kept statistics.
        run: what was handed down.
        stays: experts of a mixture that is changed: what is kept of them counts, whatever their text says now.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    root: Path
    folder: Path
    run: Run = QUIET
    stays: Collection[str] = ()

    @property
    def settings(self) -> Router:
        """Of the router."""
        return self.recipe.mixture.router

    @property
    def reads(self) -> Reads:
        """What the mixture's models read."""
        return self.checkpoint.shape.family.reads

    def statistics_file(self, expert: str) -> Path:
        """Where the statistics of an expert's domain are kept."""
        return self.folder / f"{expert}.safetensors"

    def fitted(
        self,
        gates: Gates,
        text: Sequence[TextProvenance],
        report: Mapping[str, object],
        status: Literal["fitted", "trained"] = "fitted",
    ) -> FittedRouter:
        """Gates that were set from text; `text`: what the record remembers of each expert's, in their order."""
        of_experts = dict(zip(self.recipe.names, text, strict=True)) if text else {}
        record = RouterRecord(status=status, settings=self.settings, sha256="", text=of_experts, report=dict(report))
        return FittedRouter(gates, record)

    def unfitted(self, gates: Gates = ()) -> FittedRouter:
        """Gates that the recipe alone gives; without any in a process that is not the main one."""
        return FittedRouter(gates, RouterRecord.unfitted(self.recipe))


@dataclass(frozen=True)
class FittedRouter:
    """The gate of every router slot, the record for modekit.json, and, where the checkpoint's embedding carries it, the
    evidence that the gates read (checkpoint/evidence.py).
    """

    gates: Gates
    record: RouterRecord
    evidence: memoryview | None = None
