"""The mixture distilled into one dense model: the training of a mixture (training/engine.py) with a student in its place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.experts.distill.settings import DistillSettings, distill_settings
from modekit.experts.distill.student import Lesson, Student
from modekit.loaded.load import load_model
from modekit.loaded.shapes import mixture_of
from modekit.run import Run
from modekit.training.batches import Batches, plan_parts, steps_of_one_pass
from modekit.training.end_to_end import loop_of
from modekit.training.engine import run_trainer
from modekit.training.folder import TrainingOutcome
from modekit.training.settings import TrainSettings, train_settings
from modekit.training.texts import TrainingText

STEPS = 200
"""Of a distillation, when nothing is said."""


@dataclass(frozen=True)
class Course:
    """How long and how fast a dense model learns from its mixture.

    Attributes:
        settings: of the training loop; everything that moves has the backbone's rate.
        lesson: what counts how much, and the temperature. Half is the teacher's: benchmarks/densify.md has other shares.
        minutes: ends after so many, and so does the fall of the rate; None: after the last step.
    """

    settings: TrainSettings
    lesson: DistillSettings
    minutes: float | None = None


def course_of(minutes: float | None = None, **said: object) -> Course:
    """Of settings by name: those of a training loop, `learning_rate`, `weights` and `temperature`.

    Raises TrainingError.
    """
    where, names = "modekit densify", {"learning_rate": "backbone_learning_rate"}
    lesson = {name: said.pop(name, default) for name, default in (("weights", 0.5), ("temperature", 1.0))}
    loop = {names.get(name, name): value for name, value in said.items()}
    settings = train_settings({"what": ["all"], "steps": STEPS, **loop}, where=where)
    return Course(settings, distill_settings(lesson, where=where), minutes)


def teach(
    checkpoint: Checkpoint, student: PreTrainedModel, course: Course, texts: list[TrainingText], folder: Path, run: Run
) -> TrainingOutcome:
    """Train the student, whose parameters that move have gradients, from the last state in `folder` on."""
    teacher = load_model(checkpoint.folder, run=run)
    mixture_of(teacher, checkpoint).prepare_training()
    settings, corpora = course.settings, [text.corpus for text in texts]
    steps = settings.steps or steps_of_one_pass(corpora, settings)
    parts = plan_parts(corpora, settings, steps=steps, experts=len(checkpoint.names), parts=1, pack=False)
    lesson = Lesson(teacher, checkpoint.vocabulary, course.lesson)
    loop = loop_of(settings, steps, student.device, seconds=None if course.minutes is None else 60 * course.minutes)
    module = Student(student, lesson, settings, steps)
    return run_trainer(module, Batches(corpora, parts, pad_id=0), [text.held_out for text in texts], loop, folder, run)
