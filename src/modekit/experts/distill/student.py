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

from modekit.evaluation.loss import tokens_per_pass
from modekit.experts.distill.settings import DistillSettings
from modekit.text.sequences import Batch, TokenSequence, make_batches
from modekit.training.batches import predicted_in
from modekit.training.engine import JudgedModule
from modekit.training.losses import divergence, forward_kl, language_model, tempered
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

    def beside(
        self, student_NV: torch.Tensor, item: Mapping[str, torch.Tensor], temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of a student's logits at the predicted tokens of a batch, and of the teacher there."""
        with torch.no_grad():
            output = self.teacher(input_ids=item["input_ids"], attention_mask=item["real"].long(), use_cache=False)
            teacher_NV = output.logits[:, :-1][predicted_in(item)]
        compared = (each[:, : self.vocabulary] for each in (student_NV, teacher_NV))
        student, teacher = (tempered(each, temperature) for each in compared)
        return student, teacher


class Student(JudgedModule):
    """A student with its losses. Nothing but the student has parameters; the teacher is no part of the module."""

    def __init__(self, student: PreTrainedModel, lesson: Lesson, settings: TrainSettings, steps: int) -> None:
        super().__init__(student, settings)
        self._lesson = lesson
        self._weight = CrossEntropyWeight(lesson.settings, steps)

    def losses(self, batch: Batch, item: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Cross-entropy and distillation."""
        logits = self.model(input_ids=batch.input_ids, attention_mask=batch.mask.long(), use_cache=False).logits
        predicted = predicted_in(item)
        logits_NV = logits[:, :-1][predicted]
        cross_entropy = language_model(logits_NV, batch.input_ids[:, 1:][predicted])
        settings = self._lesson.settings
        both = self._lesson.beside(logits_NV, item, settings.temperature)
        losses = [weight * divergence(name, *both, settings.temperature) for name, weight in settings.losses.items()]
        return {"lm": cross_entropy, "distill": torch.stack(losses).sum()}

    def weights(self, losses: Mapping[str, torch.Tensor]) -> Mapping[str, float]:
        """By what the steps before logged."""
        return dict(zip(losses, self._weight.factors(), strict=True))

    def drain(self) -> dict[str, float]:
        """Both losses of the step that has just ended, and what cross-entropy counted in it."""
        losses, share = super().drain(), self._weight.share()
        self._weight.remember(losses[CROSS_ENTROPY], losses[DISTILLATION])
        return {**losses, SHARE: share}

    def go_on(self, history: Sequence[Mapping[str, float]]) -> None:
        """Weights of the next steps hang on the losses of the steps before."""
        for entry in history:
            if CROSS_ENTROPY in entry:
                self._weight.remember(entry[CROSS_ENTROPY], entry[DISTILLATION])


def kl_to_teacher(student: PreTrainedModel, lesson: Lesson, sequences: Sequence[TokenSequence]) -> float | None:
    """Mean KL(teacher || student) at temperature 1 over the predicted tokens of a text, in nats; None without text."""
    if not sequences:
        return None
    device, total, count = student.device, 0.0, 0
    with torch.inference_mode():
        for batch in make_batches(sequences, tokens=min(2_048, tokens_per_pass(student.config))):
            item = {
                "input_ids": batch.input_ids.to(device),
                "real": batch.mask.to(device),
                "position_ids": torch.arange(batch.mask.shape[1], device=device).expand(batch.mask.shape),
                **({} if batch.silent is None else {"silent": batch.silent.to(device)}),
            }
            predicted = predicted_in(item)
            logits = student(input_ids=item["input_ids"], attention_mask=item["real"].long(), use_cache=False).logits
            total += float(forward_kl(*lesson.beside(logits[:, :-1][predicted], item, 1.0)).double())
            count += int(predicted.sum())
    return total / count


class CrossEntropyWeight:
    """What cross-entropy counts in the next step, of `steps` in all; distillation counts the rest."""

    def __init__(self, settings: DistillSettings, steps: int) -> None:
        self._settings = settings
        length = max(20, steps // 100)
        self._losses: tuple[deque[float], deque[float]] = (deque(maxlen=length), deque(maxlen=length))
        self.steps_done = 0

    def remember(self, *losses: float) -> None:
        """Cross-entropy and distillation of the step that has just ended, per predicted token."""
        for history, loss in zip(self._losses, losses, strict=True):
            history.append(loss)
        self.steps_done += 1

    def share(self) -> float:
        """Between 0 and 1."""
        return adaptive_share(*self._losses) if self._settings.adaptive else self._settings.weights

    def factors(self) -> tuple[float, float]:
        """What cross-entropy and distillation are multiplied with.

        In turn, each counts twice its share, so that two steps together ask for what two combined steps ask for.
        """
        share = self.share()
        if not self._settings.alternate:
            return share, 1.0 - share
        return (2.0 * share, 0.0) if self.steps_done % 2 == 0 else (0.0, 2.0 * (1.0 - share))


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
