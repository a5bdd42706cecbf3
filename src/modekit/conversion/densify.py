"""`modekit densify OUT DENSE`: a mixture as one dense model of the base's class and size.

    average   the mean of the experts' own models (branch-train-merge's weight average)
    sum       base + scale * the sum of their differences (task arithmetic, arXiv 2212.04089)
    best      the one expert with the lowest loss on the text of all domains
    distil    the best of these, then distilled from the mixture on its own text (Switch Transformers, arXiv 2101.03961)

    DENSE.training/      states of a distillation, so that the same command goes on after a kill or Ctrl-C
    DENSE                a plain model folder with the mixture's tokenizer
    DENSE/densify.json   what was done, and how much of the mixture's gap is kept

Merges read the experts' own folders, which must be as the mixture was built from them; the teacher is the mixture as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import BaseModel
from transformers import PreTrainedModel

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import refuse_pairs
from modekit.checkpoint.sources import why_not
from modekit.conversion.merges import By, Merge, Merger
from modekit.errors import SourceError, TextError
from modekit.evaluation.domains import Domain, held_out_domains, scored_on
from modekit.evaluation.results import Kind, Row, gapless_notes, with_gaps
from modekit.experts.distill import Lesson, Student
from modekit.experts.moving import Save, make_trainable
from modekit.experts.settings import DistillSettings
from modekit.experts.specialist import SpecialistFolder, held_out_scores
from modekit.files.change import refuse_existing
from modekit.files.copies import library_writes
from modekit.files.place import replaced_by
from modekit.files.staging import staging
from modekit.files.write import digest_of_data, write_file, write_json
from modekit.loaded.experts import load_expert_source
from modekit.loaded.load import load_model
from modekit.loaded.shapes import mixture_of
from modekit.loaded.states import take_state
from modekit.planning.make import make_plan
from modekit.recipes.strict import BASE
from modekit.run import QUIET, Run
from modekit.sources.tokenizer import copied_content
from modekit.text.splits import TRAINED_FILE, digests_in
from modekit.training.batches import Batches, plan_parts, steps_of_one_pass
from modekit.training.end_to_end import loop_of
from modekit.training.engine import run_trainer
from modekit.training.folder import TrainingOutcome, state_of
from modekit.training.request import memory_errors
from modekit.training.settings import TrainSettings, checked_settings
from modekit.training.texts import TrainingText, check_given, read_texts

DENSE_FILE = "densify.json"
STEPS = 200
"""Of a distillation, when nothing is said."""
_SMALLEST_GAP = 0.05  # of what experts gain: of a mixture that closes less, no share can be kept


class DenseRecord(BaseModel, frozen=True):
    """The content of densify.json.

    Attributes:
        merge: what was written, or what a distillation began from.
        parameters: of the dense model.
        steps, best_step: of a distillation, that were taken; and whose state was written, 0 where none was better.
        losses: row (base, experts, mixture, merge, dense) -> domain -> nats per token of the report split; empty without text.
            `experts` has each domain's own.
        gap_closed: row -> (base - row) / (base - own expert), mean over the domains whose own expert gains more than the noise.
    """

    by: By
    merge: Merge
    parameters: int
    steps: int
    best_step: int
    losses: dict[str, dict[str, float]]
    gap_closed: dict[str, float | None]
    notes: list[str]

    @property
    def kept(self) -> float | None:
        """The share of the mixture's gap that the dense model keeps; None where the mixture closes none."""
        ours, mixture = self.gap_closed.get("dense"), self.gap_closed.get("mixture")
        return ours / mixture if ours is not None and mixture is not None and mixture >= _SMALLEST_GAP else None


@dataclass(frozen=True)
class Course:
    """How a dense model learns from its mixture."""

    settings: TrainSettings
    lesson: DistillSettings


def course_of(**said: object) -> Course:
    """Of settings by name: those of a training loop, `learning_rate`, `weights` (of the text; half: benchmarks/densify.md) and
    `temperature`. Raises TrainingError.
    """
    where, names = "modekit densify", {"learning_rate": "backbone_learning_rate"}
    lesson = {name: said.pop(name, default) for name, default in (("weights", 0.5), ("temperature", 1.0))}
    loop = {names.get(name, name): value for name, value in said.items()}
    settings = checked_settings({"what": ["all"], "steps": STEPS, **loop}, TrainSettings, where=where)
    return Course(settings, checked_settings(lesson, DistillSettings, where=where))


class DenseFolder(SpecialistFolder):
    """DENSE.training."""

    record_file = DENSE_FILE


@dataclass(frozen=True)
class Densify:
    """What is asked for: `texts` by domain, relative to `root`, instead of the recipe's; `scale` of a sum (None: the
    best of some on the select split); `tokens` of held-out text per domain for the figures in densify.json.
    """

    by: By
    course: Course
    texts: Mapping[str, Sequence[str]]
    root: Path
    scale: float | None
    tokens: int
    overwrite: bool


def densify(checkpoint: Checkpoint, asked: Densify, out: Path, *, run: Run = QUIET) -> DenseRecord:
    """Write the dense model; returns what densify.json says. A distillation goes on after a kill or Ctrl-C from its last state.

    Raises SourceError (an expert's folder that is gone or changed; losses that are not finite), UnsupportedError (an encoder),
    TextError (distil and best without text), TrainingError, OutputError.
    """
    refuse_pairs(checkpoint, "a mixture of models with an encoder has no dense form here")
    folder = DenseFolder(out)
    folder.tidy()
    refuse_existing(out, replaced_by(asked.overwrite), sources=(checkpoint.folder,))
    for expert, name in enumerate(checkpoint.names):
        why = why_not(checkpoint, expert, run=run)
        if why is not None:
            raise SourceError("an expert's own model cannot be merged", where=f"expert '{name}'", found=why)
    texts = _texts(checkpoint, asked, run)
    plan = make_plan(checkpoint.record.pinned_recipe, checkpoint.recipe_root, run=run)
    merger = Merger(checkpoint, plan, [text.held_out for text in texts], run)
    request = digest_of_data([_asked(asked), [[text.corpus.name, text.record, text.selected_by] for text in texts]])
    state = state_of(checkpoint)
    with ExitStack() as stack:
        if asked.by == "distil":
            stack.enter_context(folder.held(request, state))
            stack.enter_context(memory_errors())
        return _Work(checkpoint, asked, merger, texts, folder, f"densify {request} {state}", run).done()


def _asked(asked: Densify) -> str:
    """All that decides what comes out, but for the text."""
    course = asked.course
    said = (course.settings, course.lesson) if asked.by == "distil" else (course.settings.sequence_length, asked.texts)
    return repr([asked.by, asked.scale, asked.tokens, said])


def _texts(checkpoint: Checkpoint, asked: Densify, run: Run) -> list[TrainingText]:
    """Text of every domain that has any, to distil on or to choose a merge by; none where the merge is given.

    Raises TextError where there is none and something must be measured, and for a given text that is not there.
    """
    check_given(checkpoint, asked.texts, asked.root)
    known = asked.texts or any(expert.text for expert in checkpoint.record.recipe.experts)
    chooses = asked.by == "sum" and asked.scale is None and known
    needs_text = chooses or asked.by in ("distil", "best")
    return read_texts(checkpoint, asked.course.settings, asked.texts, asked.root, run=run) if needs_text else []


@dataclass(frozen=True)
class _Work:
    checkpoint: Checkpoint
    asked: Densify
    merger: Merger
    texts: list[TrainingText]
    folder: DenseFolder
    digest: str
    run: Run

    def done(self) -> DenseRecord:
        """Write the best merge, or the best state of what was distilled into it."""
        merge, report = self.merger.best(self.asked.by, self.asked.scale), self._report()
        student, notes = self.merger.set(merge), list[str]()
        before, outcome = list[Row](), None
        save = make_trainable(student, self.merger.plan.sources[0], "full", 0)
        if self.checkpoint.record.trained:
            notes.append("the mixture was trained: merges are of the experts' own models, only distil has what that changed")
        if self.asked.by == "distil":
            before = [self._scored("merge", student, report)]
            outcome = self._taught(student)
            notes += [outcome.stopped] if outcome.stopped else []
            if outcome.improved:
                take_state(student, outcome.best_state(self.folder.path))
            else:  # the student has gone on from it
                self.merger.set(merge)
                notes.append("no state of the distillation was better on held-out text than the merge that it began from")
        student.eval()
        vocabulary = self.merger.plan.vocabulary
        if vocabulary is not None and vocabulary.is_grown:
            student.config.update(dict(vocabulary.tokenizer.settings))
        rows = self._rows(student, before, report) if report else []
        shown, sources = [row for row in rows if row.kind != "expert"], self.checkpoint.record.expert_sources  # 0: the base
        record = DenseRecord(
            by=self.asked.by,
            merge=merge,
            parameters=sum(parameter.numel() for parameter in student.parameters()),
            steps=0 if outcome is None else outcome.steps,
            best_step=0 if outcome is None else outcome.best_step,
            losses={row.name: {name: score.loss for name, score in row.scores.items()} for row in shown},
            gap_closed={row.name: row.mean_gap([*row.scores]) for row in shown},
            notes=[*notes, *gapless_notes(rows, [each.name for each in report if sources[each.expert or 0]])],
        )
        self._write(record, save)
        if outcome is not None and outcome.error is not None:
            raise outcome.error
        return record

    def _taught(self, student: PreTrainedModel) -> TrainingOutcome:
        """Train the student on the mixture's answers and its text, from the last state on, unless that is done."""
        kept = self.folder.recall("trained", TrainingOutcome.model_validate)
        if kept is not None:
            return kept
        checkpoint, course, corpora = self.checkpoint, self.asked.course, [text.corpus for text in self.texts]
        teacher = load_model(checkpoint.folder, run=self.run)
        mixture_of(teacher, checkpoint).prepare_training()
        settings = course.settings
        steps = settings.steps or steps_of_one_pass(corpora, settings)
        parts = plan_parts(corpora, settings, steps=steps, experts=len(checkpoint.names), parts=1, pack=False)
        lesson = Lesson(teacher, checkpoint.vocabulary, course.lesson)
        loop, module = loop_of(settings, steps, student.device), Student(student, lesson, settings)
        held_out = [text.held_out for text in self.texts]
        outcome = run_trainer(module, Batches(corpora, parts), held_out, loop, self.folder.path, self.run)
        self.folder.keep("trained", outcome.model_dump(mode="json"))
        return outcome

    def _write(self, record: DenseRecord, save: Save) -> None:
        """Put it in its place: weights, tokenizer, record, and what it and its experts were trained on."""
        self.run.begin("write")
        data, folder, plan = record.model_dump(mode="json"), self.folder, self.merger.plan
        replace = replaced_by(self.asked.overwrite)
        sources = (self.checkpoint.folder, *(source.folder for source in plan.sources))
        marks = [mark for text in self.texts for mark in text.trained_on] if record.by == "distil" else []
        trained = sorted({*marks, *(mark for source in sources for mark in digests_in(source / TRAINED_FILE))})
        with staging(folder.out, self.digest, "model", sources=sources, replace=replace, sync=self.run.sync) as stage:
            with library_writes(stage.folder) as written:
                save(written)
            tokenizer = {file.name: copied_content(file) for file in plan.copied_files}
            for name, content in {**tokenizer, **plan.written_files}.items():
                write_file(stage.folder / name, content)
            if trained:
                write_file(stage.folder / TRAINED_FILE, "".join(f"{mark}\n" for mark in trained).encode())
            if folder.is_held:
                folder.announce(data)
            write_json(stage.folder / DENSE_FILE, data)

    def _report(self) -> list[Domain]:
        """Held-out text of the domains that have an expert, which neither trains nor chooses; none where there is none.

        Raises TextError where text that was given for these figures alone cannot be read.
        """
        scored = scored_on(self.checkpoint, self.asked.texts, self.asked.root)
        seen = {mark for text in self.texts for mark in (*text.trained_on, *text.selected_by)}
        length = self.asked.course.settings.sequence_length
        try:
            found = held_out_domains(
                scored, tokens_per_domain=self.asked.tokens, sequence_length=length, seen=seen, run=self.run
            )
        except TextError:
            if self.asked.texts and not self.texts:
                raise
            return []
        return [domain for domain in found if domain.expert is not None]

    def _scored(self, name: str, model: PreTrainedModel, domains: Sequence[Domain], kind: Kind = "mixture") -> Row:
        return Row(name, kind, 0, 0, held_out_scores(model, domains, f"the {name} model", self.run), "")

    def _rows(self, dense: PreTrainedModel, merge: Sequence[Row], domains: Sequence[Domain]) -> list[Row]:
        """Base, experts, these as one row, the mixture, what a distillation began from, and the dense model.

        Raises SourceError where a loss is not finite.
        """
        ours, load = self._scored("dense", dense, domains), partial(load_expert_source, self.checkpoint, run=self.run)
        own = [self._scored(domain.name, load(domain.expert), [domain], "expert") for domain in domains]
        all_own = {name: score for row in own for name, score in row.scores.items()}
        base = self._scored(BASE, load(None), domains, "base")
        mixture = self._scored("mixture", load_model(self.checkpoint.folder, run=self.run), domains)
        rows = [base, *own, Row("experts", "oracle", 0, 0, all_own, ""), mixture, *merge, ours]
        for row in rows:
            if not all(math.isfinite(score.loss) for score in row.scores.values()):
                raise SourceError(
                    "a loss is not finite, so that nothing can be compared",
                    where=row.name,
                    remedy="see with `modekit verify` whether weights hold NaN or Inf",
                )
        return with_gaps(rows, [*all_own])
