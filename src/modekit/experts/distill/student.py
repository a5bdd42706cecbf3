"""A student with its losses as one module, how much each counts, and how far the student is from its teacher on held-out text.

The weight of cross-entropy is fixed, or follows the adaptive rule of arXiv:2407.19610 (its code; made finite here): over the
last k = max(20, steps // 100) values of each loss L,

    w(L) = 1 - clamp((L[-1] - L[-k]) / mean(L[-k:]), 0, 1)
    share of cross-entropy = w(CE) / (w(CE) + w(KD))

A loss that falls has w = 1 however fast it falls: while both fall the share is exactly one half, and only a loss that rises
counts less. Where both rise by more than their mean, 0 / 0 is one half, too. A history that is not full is taken as it is.

Shape legend: B rows, S sequence, N predicted tokens, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from modekit.evaluation.forced import divergence as divergence_of
from modekit.evaluation.loss import tokens_per_pass
from modekit.experts.settings import DistillSettings
from modekit.loaded.passes import predicted_logits
from modekit.text.sequences import Batch, TokenSequence, make_batches
from modekit.training.batches import predicted_in
from modekit.training.engine import JudgedModule
from modekit.training.losses import divergence, language_model, tempered
from modekit.training.settings import TrainSettings

CROSS_ENTROPY, DISTILLATION, SHARE = "loss_lm", "loss_distill", "weight_lm"
"""What the log calls both losses per predicted token, and what cross-entropy counted in the step."""


@dataclass(frozen=True)
class Lesson:
    """Who teaches what: the first `vocabulary` logits of both models are compared. The teacher never learns."""

    teacher: PreTrainedModel
    vocabulary: int
    settings: DistillSettings

    def __post_init__(self) -> None:
        self.teacher.requires_grad_(False).eval()

    def beside(self, student_NV: torch.Tensor, item: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of a student's logits at the predicted tokens of a batch, and of the teacher there."""
        with torch.no_grad():
            output = self.teacher(input_ids=item["input_ids"], attention_mask=item["real"].long(), use_cache=False)
            teacher_NV = output.logits[:, :-1][predicted_in(item)]
        compared = (each[:, : self.vocabulary] for each in (student_NV, teacher_NV))
        student, teacher = (tempered(each, self.settings.temperature) for each in compared)
        return student, teacher


class Student(JudgedModule):
    """A student with its losses. Nothing but the student has parameters; the teacher is no part of the module."""

    def __init__(self, student: PreTrainedModel, lesson: Lesson, settings: TrainSettings, steps: int) -> None:
        super().__init__(student, settings)
        self._lesson = lesson
        self._steps = 0
        self._history = deque[tuple[float, float]](maxlen=max(20, steps // 100))  # cross-entropy and distillation by step

    def losses(self, batch: Batch, item: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Cross-entropy and distillation."""
        logits = self.model(input_ids=batch.input_ids, attention_mask=batch.mask.long(), use_cache=False).logits
        predicted = predicted_in(item)
        logits_NV = logits[:, :-1][predicted]
        cross_entropy = language_model(logits_NV, batch.input_ids[:, 1:][predicted])
        settings = self._lesson.settings
        both = self._lesson.beside(logits_NV, item)
        losses = [weight * divergence(name, *both, settings.temperature) for name, weight in settings.losses.items()]
        return {"lm": cross_entropy, "distill": torch.stack(losses).sum()}

    def weights(self, losses: Mapping[str, torch.Tensor]) -> Mapping[str, float]:
        """What cross-entropy and distillation count in the next step, by what the steps before logged.

        In turn, each counts twice its share, so that two steps together ask for what two combined steps ask for.
        """
        shares = (self._share(), 1.0 - self._share())
        if self._lesson.settings.alternate:
            shares = (2.0 * shares[0], 0.0) if self._steps % 2 == 0 else (0.0, 2.0 * shares[1])
        return dict(zip(losses, shares, strict=True))

    def _share(self) -> float:
        """Of cross-entropy, between 0 and 1; distillation counts the rest."""
        settings = self._lesson.settings
        return adaptive_share(*zip(*self._history, strict=True)) if settings.adaptive and self._history else settings.weights

    def drain(self) -> dict[str, float]:
        """Both losses of the step that has just ended, and what cross-entropy counted in it."""
        losses, share = super().drain(), self._share()
        self.go_on([losses])
        return {**losses, SHARE: share}

    def go_on(self, history: Sequence[Mapping[str, float]]) -> None:
        """Weights of the next steps hang on the losses of the steps before."""
        found = [(entry[CROSS_ENTROPY], entry[DISTILLATION]) for entry in history if CROSS_ENTROPY in entry]
        self._history.extend(found)
        self._steps += len(found)


def kl_to_teacher(student: PreTrainedModel, lesson: Lesson, sequences: Sequence[TokenSequence]) -> float | None:
    """Mean KL(teacher || student) at temperature 1 over the predicted tokens of a text, in nats; None without text."""
    if not sequences:
        return None
    total = 0.0
    for batch in make_batches(sequences, tokens=min(2_048, tokens_per_pass(student.config))):
        with torch.inference_mode():
            both = (predicted_logits(model, batch)[:, : lesson.vocabulary] for model in (lesson.teacher, student))
            total += divergence_of(*both)[0]
    return total / sum(sequence.scored for sequence in sequences)


def adaptive_share(cross_entropy: Sequence[float], distillation: Sequence[float]) -> float:
    """The share of cross-entropy after some steps, of the histories of both losses."""
    ours, theirs = _steadiness(cross_entropy), _steadiness(distillation)
    return 0.5 if ours + theirs == 0 else ours / (ours + theirs)


def _steadiness(losses: Sequence[float]) -> float:
    """w(L): 1 for a loss that does not rise, 0 for one that rises by its mean or more."""
    mean = sum(losses) / len(losses) if losses else 0.0
    if mean <= 0:
        return 1.0
    return 1.0 - min(1.0, max(0.0, (losses[-1] - losses[0]) / mean))
