"""What one call of `modekit train` asks for, and whether the mixture and its text can give it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.errors import TrainingError
from modekit.processes import processes
from modekit.training.batches import Corpus
from modekit.training.settings import OF_ROUTERS, TrainSettings
from modekit.training.texts import Text, silent_domains


@dataclass(frozen=True)
class Request:
    """A mixture, the folder for the trained one (which may be its own), settings, and text of every domain.

    `evaluate_tokens`: held-out tokens per domain for the tables before and after; None for none.
    """

    checkpoint: Checkpoint
    target: Path
    settings: TrainSettings
    texts: Sequence[Text]
    evaluate_tokens: int | None

    @property
    def corpora(self) -> list[Corpus]:
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
        of_routers = OF_ROUTERS & set(settings.losses) if settings.speed == "full" else {"label"}
        routers_only = set(settings.what) == {"routers"}
        if has_no_router(checkpoint) and (routers_only or of_routers):
            raise TrainingError(
                "this mixture has no router to train", where=str(checkpoint.folder),
                found=f"method {checkpoint.record.recipe.mixture.method}",
                remedy="set one first: modekit fit OUT --method routing --top-k 2",
            )  # fmt: skip
        silent = silent_domains(checkpoint, self.texts)
        if silent and (settings.speed == "cheap" or "label" in settings.losses):
            raise TrainingError(
                "labels of some domains alone would turn every router to them", where="--text",
                found=f"no text of {', '.join(silent)}", remedy="give text of every domain, or train on lm or distill",
            )  # fmt: skip
        if settings.speed == "cheap" and processes().count > 1:
            raise TrainingError("a cheap training is done by one process", where="speed", remedy="start it without a launcher")


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
            "there is not enough memory", found=(str(error).splitlines() or ["MemoryError"])[0][:200],
            remedy="raise accumulate or set checkpointing: true, which go on from the last kept state; "
            "or lower batch_tokens or sequence_length",
        ) from None  # fmt: skip
