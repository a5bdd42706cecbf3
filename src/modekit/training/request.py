"""What one call of `modekit train` asks for, and whether the mixture and its text can give it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.errors import TrainingError
from modekit.training.batches import DomainSequences
from modekit.training.settings import OF_ROUTERS, TrainSettings
from modekit.training.texts import TrainingText, silent_domains


@dataclass(frozen=True)
class Request:
    """A mixture, the folder for the trained one (which may be its own), settings, and text of every domain.

    `evaluate_tokens`: held-out tokens per domain for the tables before and after; None for none. `teacher`: the folder of a
    model that teaches all domains; None where their own experts do.
    """

    checkpoint: Checkpoint
    target: Path
    settings: TrainSettings
    texts: Sequence[TrainingText]
    evaluate_tokens: int | None
    teacher: Path | None = None

    @property
    def corpora(self) -> list[DomainSequences]:
        """What is trained on."""
        return [text.corpus for text in self.texts]

    @property
    def trained_on(self) -> list[str]:
        """Digests of the documents that move something."""
        return [digest for text in self.texts for digest in text.trained_on]

    @property
    def selected_by(self) -> list[str]:
        """Digests of the documents that states are compared on."""
        return [digest for text in self.texts for digest in text.selected_by]

    def check(self) -> None:
        """Raise TrainingError when the settings ask for what this mixture or its text cannot give."""
        checkpoint, settings = self.checkpoint, self.settings
        of_routers = OF_ROUTERS & set(settings.losses)
        routers_only = set(settings.what) == {"routers"}
        if has_no_router(checkpoint) and (routers_only or of_routers):
            raise TrainingError(
                "this mixture has no router to train",
                where=str(checkpoint.folder),
                found=f"method {checkpoint.record.recipe.mixture.method}",
                remedy="set one first: modekit fit OUT method=routing top_k=2",
            )
        if checkpoint.record.carry is not None:
            self._check_carrying(routers_only or bool(of_routers))
        if settings.is_joint:
            self._check_joint()
        if settings.randomise > 0 and settings.randomise_to in ("all", "others") and len(checkpoint.names) == 1:
            raise TrainingError(
                "there is no other label",
                where="randomise_to",
                found=f"{settings.randomise_to}, and one expert",
                remedy="write randomise_to: generic",
            )
        silent = silent_domains(checkpoint, self.texts)
        if silent and "label" in settings.losses:
            raise TrainingError(
                "labels of some domains alone would turn every router to them",
                where="--text",
                found=f"no text of {', '.join(silent)}",
                remedy="give text of every domain, or train on lm or forward_kl",
            )

    def _check_carrying(self, of_routers: bool) -> None:
        """Raise TrainingError for what would move the channels through which whole experts are carried."""
        settings = self.settings
        refused = {"its router": of_routers, "lora": settings.lora is not None, "weight_decay": settings.weight_decay > 0}
        found = next((key for key, asked in refused.items() if asked), None)
        if found is not None:
            beside = "train what is beside them: what=[attention,experts,head]; `modekit fit OUT` fits the router"
            raise TrainingError(
                "this mixture carries whole experts through channels that must stay as they are",
                where=str(self.checkpoint.folder),
                found=found,
                remedy=beside if of_routers else f"leave out {found}",
            )

    def _check_joint(self) -> None:
        """Raise TrainingError unless every expert has tensors of its own, which stay as they are while others learn."""
        shape = self.checkpoint.shape
        if shape.plain or any(any(place.ranks) for place in shape.mixture.places.values()):
            raise TrainingError(
                "a joint training moves one expert a step, and the experts of this mixture lie in one tensor",
                where="regime",
                found=f"output.format {'native' if shape.plain else 'modekit, with adapters'}",
                remedy="build it from whole models with output: {format: modekit}, or mixture: {modules: decoder}",
            )
        if self.settings.generic and not shape.routing.runs_common:
            raise TrainingError(
                "text of no domain has no expert of its own here",
                where="generic",
                found="regime: joint",
                remedy="leave it out, or build the mixture with always_on: {expert: base, weight: 0.5, apart: true}",
            )
        takes_away = self.settings.randomise > 0 and self.settings.randomise_to in ("half", "generic")
        if takes_away and not shape.routing.runs_common:
            raise TrainingError(
                "a label that is taken away leaves a step's text to no expert here",
                where="randomise_to",
                found=f"{self.settings.randomise_to}, regime: joint",
                expected="all or others, which name an expert",
                remedy="write one of these, or build the mixture with always_on: {expert: base, weight: 0.5, apart: true}",
            )


def has_no_router(checkpoint: Checkpoint) -> bool:
    """Whether nothing in a mixture decides: one expert everywhere, or fixed weights."""
    return not checkpoint.slots or checkpoint.record.recipe.mixture.method == "linear"


@contextmanager
def memory_errors() -> Iterator[None]:
    """Say what to lower when memory does not suffice."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        words = ("out of memory", "not enough memory", "can't allocate memory")
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not any(word in str(error) for word in words):
            raise
        raise TrainingError(
            "there is not enough memory",
            found=(str(error).splitlines() or ["MemoryError"])[0][:200],
            remedy="raise accumulate or set checkpointing: true, which go on from the last kept state; "
            "or lower batch_tokens or sequence_length",
        ) from None
