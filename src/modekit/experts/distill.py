"""`modekit specialize STUDENT OUT --teacher MODEL`: a student learns from a text and from a teacher's output on it
(docs/training.md).

The teacher may be of any size and family, but has the student's tokenizer. The last state is what is taken: no held-out text
chooses one, so that students of equal steps can be compared. Several texts share the steps:

None     shuffled together, so that a larger text has more of every step
equal    as many tokens of each in every step, short texts begun anew
turns    one text a step, in turn

Shape legend: B rows, S sequence, N predicted tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modekit.errors import UnsupportedError
from modekit.evaluation.domains import tokens_per_pass
from modekit.evaluation.forced import divergences
from modekit.experts.labelled import Material
from modekit.experts.settings import DistillSettings, Mix
from modekit.loaded.engine import Loop
from modekit.loaded.load import load_model
from modekit.loaded.passes import check_text, inputs_of, logits_at, predicted_logits
from modekit.loaded.states import History
from modekit.loaded.text_training import Training
from modekit.run import Run
from modekit.sources.config import whole
from modekit.sources.pairs import PAIRS
from modekit.sources.source import ModelSource, open_source
from modekit.sources.tokenizer import Readers, check_ids_fit, check_same_tokenizer, read_tokens
from modekit.text.sequences import Batch, TokenSequence, make_batches
from modekit.training.batches import Batches, plan_parts, predicted_in, steps_of_one_pass
from modekit.training.end_to_end import loop_of
from modekit.training.engine import JudgedModule
from modekit.training.losses import distillation, language_model
from modekit.training.settings import TrainSettings, checked_settings

CROSS_ENTROPY, DISTILLATION = "loss_lm", "loss_distill"
"""What the log calls both losses per predicted token."""


@dataclass(frozen=True)
class Lesson:
    """Who teaches what: the first `vocabulary` logits of both models are compared. The teacher never learns."""

    teacher: PreTrainedModel
    vocabulary: int
    settings: DistillSettings

    def __post_init__(self) -> None:
        self.teacher.requires_grad_(False).eval()

    @torch.no_grad()
    def logits(self, item: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The teacher's, at the predicted tokens of a batch."""
        inputs = {"input_ids": item["input_ids"], "attention_mask": item["real"].long()}
        return logits_at(self.teacher, inputs, predicted_in(item))[:, : self.vocabulary]


class Student(JudgedModule):
    """A student with its losses. Nothing but the student has parameters; the teacher is no part of the module."""

    def __init__(self, student: PreTrainedModel, lesson: Lesson, settings: TrainSettings) -> None:
        share = lesson.settings.weights
        super().__init__(student, settings, {"lm": share, "distill": 1.0 - share})
        self._lesson = lesson

    def losses(self, batch: Batch, item: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Cross-entropy and distillation."""
        predicted = predicted_in(item)
        logits_NV = logits_at(self.model, inputs_of(self.model, batch), predicted)
        cross_entropy = language_model(logits_NV, batch.input_ids[:, 1:][predicted])
        settings, both = self._lesson.settings, (logits_NV[:, : self._lesson.vocabulary], self._lesson.logits(item))
        losses = [weight * distillation(name, *both, settings.temperature) for name, weight in settings.losses.items()]
        return {"lm": cross_entropy, "distill": torch.stack(losses).sum()}


def kl_to_teacher(student: PreTrainedModel, lesson: Lesson, sequences: Sequence[TokenSequence]) -> float | None:
    """Mean KL(teacher || student) at temperature 1 over the predicted tokens of a text, in nats; None without text."""
    if not sequences:
        return None
    total = 0.0
    for batch in make_batches(sequences, tokens=min(2_048, tokens_per_pass(student.config))):
        with torch.inference_mode():
            both = (predicted_logits(model, batch)[:, : lesson.vocabulary] for model in (lesson.teacher, student))
            [(kl_N, _)] = divergences(*both)
            total += float(kl_N.sum())
    return total / sum(sequence.scored for sequence in sequences)


_READERS = Readers("student", "teacher", "use a teacher that has the student's tokenizer")


@dataclass(frozen=True)
class Teaching:
    """The folder of a teacher, what is learned from it, and how several texts share the steps."""

    teacher: Path
    settings: DistillSettings
    mix: Mix | None

    def open(self, student: ModelSource, run: Run) -> ModelSource:
        """The teacher by header. Raises SourceError, UnsupportedError (an encoder), MismatchError where tokenizers differ."""
        source = open_source("--teacher", self.teacher.name, self.teacher, run=run)
        where = f"--teacher ({self.teacher.name})"
        check_same_tokenizer(student.folder, self.teacher, where=where, readers=_READERS)
        for each, label in ((student, f"STUDENT ({student.folder.name})"), (source, where)):
            if each.config["model_type"] in {family.model_type for family in PAIRS}:
                raise UnsupportedError(
                    "models with an encoder are not distilled yet",
                    where=label,
                    remedy="leave --teacher away, and train it on text alone",
                )
            read = read_tokens(each.folder, where=label)
            check_ids_fit({} if read is None else read.tokens, whole(each.config, "vocab_size"), where=label)
        return source

    def lesson(self, student: ModelSource, teacher: ModelSource, tokenizer: PreTrainedTokenizerBase, run: Run) -> Lesson:
        """The teacher in memory. All logits are compared where both models have as many, else those of the tokenizer's ids:
        embeddings are padded to round numbers of rows, of which no text has the ids.
        """
        ours, theirs = (whole(source.config, "vocab_size") for source in (student, teacher))
        vocabulary = ours if ours == theirs else max(tokenizer.get_vocab().values()) + 1
        return Lesson(load_model(self.teacher, run=run), vocabulary, self.settings)

    def as_data(self) -> dict[str, object]:
        """What specialist.json says of what is learned."""
        settings = self.settings
        return {
            "losses": settings.losses,
            "temperature": settings.temperature,
            "weights": settings.weights,
        }

    def teach(
        self, student: PreTrainedModel, lesson: Lesson, material: Material, training: Training, folder: Path, run: Run
    ) -> tuple[History, int]:
        """Train the student, from the last state in `folder` on: what its steps logged, and how many tokens they read."""
        check_text(student, material.sequences)
        settings, corpora = self._settings(training), material.corpora
        steps = settings.steps or steps_of_one_pass(corpora, settings)
        parts = plan_parts(corpora, settings, steps=steps, experts=len(corpora), parts=1, pack=False)
        loop = loop_of(settings, steps, student.device)
        going = Loop(Student(student, lesson, settings), Batches(corpora, parts), loop, folder, run)
        going.go()
        student.eval()
        draws = (draw for part in parts for row in part.rows for draw in row)
        return going.history, sum(len(corpora[draw.corpus].sequences[draw.sequence].ids) for draw in draws)

    def _settings(self, training: Training) -> TrainSettings:
        """The same as those of a mixture's training: everything that moves has the backbone's rate."""
        same = ("steps", "batch_tokens", "seed", "sequence_length", "weight_decay", "warmup", "clip")
        values = {
            "what": ["all"],
            "backbone_learning_rate": training.learning_rate,
            **{name: getattr(training, name) for name in same},
            **({"regime": "joint"} if self.mix == "turns" else {}),
        }
        return checked_settings(values, TrainSettings, where="modekit specialize --teacher")
