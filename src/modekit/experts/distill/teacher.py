"""What a teacher says of every token, and how far a student is from it.

Beside the student, batch by batch, over the whole vocabulary; or kept (kept_logits.py), over the teacher's top_k tokens at each
place and all others as one class. Divergences over such classes are at most those over the vocabulary, and the same where the
student shares out what is left as the teacher does.

Shape legend: B rows, S sequence, N predicted tokens, V vocabulary, K kept tokens, C = K + 1 classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PreTrainedModel

from modekit.training.losses import tempered

Item = Mapping[str, torch.Tensor]
"""input_ids, real, position (B, S): where each token stands among those of all sequences."""


def predicted_in(item: Item) -> torch.Tensor:
    """Places (B, S - 1) from which a real token of the same document is predicted: no pads, no ends of documents, no tags."""
    found = item["real"][:, :-1] & item["real"][:, 1:] & (item["position_ids"][:, 1:] > 0)
    return found if item.get("silent") is None else found & ~item["silent"][:, 1:]


class TeacherOutput(Protocol):
    """What a teacher says of N tokens."""

    def beside(self, student_NV: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of a student's logits and of the teacher, at a temperature, over the same classes."""


class Teacher(Protocol):
    """Says what comes next."""

    classes: str
    """What distributions are compared over, in words."""

    def output_of(self, item: Item, predicted: torch.Tensor) -> TeacherOutput:
        """Of the predicted tokens of a batch."""


@dataclass(frozen=True)
class FullLogits:
    """Logits (N, V)."""

    logits_NV: torch.Tensor

    def beside(self, student_NV: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Over the whole vocabulary."""
        return tempered(student_NV, temperature), tempered(self.logits_NV, temperature)


@dataclass(frozen=True)
class TopLogits:
    """The teacher's top_k tokens (N, K) int64, their log-probabilities (N, K) float32 at temperature 1, and the rest's.

    `log_rest_N` is, by temperature T, log sum p^(1/T) over the other tokens; None where there are no others.
    """

    ids_NK: torch.Tensor
    log_probs_NK: torch.Tensor
    log_rest_N: Callable[[float], torch.Tensor | None]

    def beside(self, student_NV: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Over the kept tokens and, as one class, all others."""
        student = tempered(student_NV, temperature)
        student_NK = student.gather(-1, self.ids_NK)
        teacher_NK = self.log_probs_NK / temperature
        rest = self.log_rest_N(temperature)
        if rest is None:
            return student_NK, teacher_NK.log_softmax(-1)
        others = student.scatter(-1, self.ids_NK, -torch.inf).logsumexp(-1, keepdim=True)
        teacher_NC = torch.cat([teacher_NK, rest[:, None]], -1).log_softmax(-1)
        return torch.cat([student_NK, others], -1), teacher_NC


class LoadedTeacher:
    """The teacher's model, which never learns; `vocabulary` ids are those of the tokenizer that both models have."""

    classes = "the whole vocabulary"

    def __init__(self, model: PreTrainedModel, vocabulary: int) -> None:
        self._model = model.requires_grad_(False).eval()
        self._vocabulary = vocabulary

    def output_of(self, item: Item, predicted: torch.Tensor) -> FullLogits:
        """Of the predicted tokens of a batch."""
        with torch.no_grad():
            output = self._model(input_ids=item["input_ids"], attention_mask=item["real"].long(), use_cache=False)
            return FullLogits(output.logits[:, :-1][predicted][:, : self._vocabulary])
