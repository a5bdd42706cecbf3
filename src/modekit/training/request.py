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
        for wrong, what, where, found, remedy in (*self._of_routers(), *self._of_labels()):
            if wrong:
                raise TrainingError(what, where=where, found=found, remedy=remedy)

    def _of_routers(self) -> list[_Problem]:
        checkpoint, settings = self.checkpoint, self.settings
        asked = set(settings.what) == {"routers"} or bool(OF_ROUTERS & set(settings.losses))
        folder, method = str(checkpoint.folder), checkpoint.record.recipe.mixture.method
        return [
            (
                checkpoint.shape.inner > 1,
                "fine-tunes of a mixture in its plain form are not trained: channels lead each token to one of them",
                folder,
                checkpoint.shape.native_type or "",
                "train a fine-tune before it is mixed, or build with output: {format: modekit}",
            ),
            (
                asked and has_no_router(checkpoint),
                "this mixture has no router to train",
                folder,
                f"method {method}",
                "set one first: modekit fit OUT method=routing top_k=2",
            ),
            (
                checkpoint.record.carry is not None and (asked or settings.weight_decay > 0),
                "this mixture carries whole experts through channels that must stay as they are",
                folder,
                "its router" if asked else "weight_decay",
                "train what is beside them: what=[attention,experts,head]; `modekit fit OUT` fits the router",
            ),
        ]

    def _of_labels(self) -> list[_Problem]:
        settings, shape = self.settings, self.checkpoint.shape
        # In a joint training every expert has tensors of its own, which stay as they are while others learn.
        places = () if shape.plain else shape.mixture.places.values()
        shared = settings.is_joint and (shape.plain or any(any(place.ranks) or place.inside for place in places))
        alone = settings.is_joint and not shape.routing.runs_common
        takes_away = settings.randomise > 0 and settings.randomise_to in ("half", "generic")
        silent = ", ".join(silent_domains(self.checkpoint, self.texts))
        return [
            (
                shared,
                "a joint training moves one expert a step, and the experts of this mixture lie in one tensor",
                "regime",
                f"output.format {'plain' if shape.plain else 'modekit, with adapters'}",
                "build it from whole models with output: {format: modekit}, or mixture: {modules: decoder}",
            ),
            (
                alone and (bool(settings.generic) or takes_away),
                "text without a label has no expert of its own here",
                "regime: joint",
                f"generic, or randomise_to: {settings.randomise_to}",
                "leave it out, or build the mixture with always_on: {expert: base, weight: 0.5, apart: true}",
            ),
            (
                bool(silent) and "label" in settings.losses,
                "labels of some domains alone would turn every router to them",
                "--text",
                f"no text of {silent}",
                "give text of every domain, or train on lm or forward_kl",
            ),
        ]


_Problem = tuple[bool, str, str, str, str]
"""Whether it is there; what is wrong, where, what was found, what to do."""


def has_no_router(checkpoint: Checkpoint) -> bool:
    """Whether nothing in a mixture decides: one expert everywhere, or fixed weights."""
    return not checkpoint.slots or checkpoint.record.recipe.mixture.method == "linear"


@contextmanager
def memory_errors() -> Iterator[None]:
    """Say what to lower when memory does not suffice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        words = ("out of memory", "not enough memory", "can't allocate memory")
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not any(word in str(error) for word in words):
            raise
        raise TrainingError(
            "there is not enough memory",
            found=(str(error).splitlines() or ["MemoryError"])[0][:200],
            remedy="lower batch_tokens or sequence_length; `modekit train` goes on from the last kept state with a larger "
            "accumulate or checkpointing=true",
        ) from None
