"""`modekit densify OUT DENSE`: a mixture as one dense model of the base's class and size.

    average   the mean of the experts' own models (branch-train-merge's weight average)
    sum       base + scale * the sum of their differences (task arithmetic, arXiv 2212.04089)
    svd       base + scale * the sum of their differences' best low-rank parts (OneS, arXiv 2201.10890)
    best      the one expert with the lowest loss on the text of all domains
    distil    the best of these, then distilled from the mixture on its own text (Switch Transformers, arXiv 2101.03961)

    DENSE.training/      states of a distillation, so that the same command goes on after a kill or Ctrl-C
    DENSE                a plain model folder with the mixture's tokenizer
    DENSE/densify.json   what was done, and how much of the mixture's gap is kept (dense_record.py)

Merges read the experts' own folders, which must be as the mixture was built from them; the teacher is the mixture as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from transformers import PreTrainedModel

from modekit.building.build import write_shards
from modekit.checkpoint.checkpoint import Checkpoint, refuse_pairs
from modekit.checkpoint.sources import why_not
from modekit.conversion.choice import Chooser
from modekit.conversion.dense_record import DENSE_FILE, By, DenseRecord, Distilled, Merge
from modekit.conversion.distilled import Course, teach
from modekit.errors import SourceError, TextError
from modekit.evaluation.domains import Domain, held_out_domains
from modekit.experts.moving import make_trainable
from modekit.experts.specialist import SpecialistFolder, held_out_losses
from modekit.files.output import refuse_existing, replaced_by
from modekit.files.staging import Staging, staging
from modekit.files.write import digest_of_data, json_bytes, library_writes, write_file, write_json
from modekit.loaded.experts import load_expert_source
from modekit.loaded.load import load_model
from modekit.loaded.states import take_state
from modekit.planning.make import make_plan
from modekit.planning.plan import INDEX_FILE
from modekit.run import QUIET, Run
from modekit.sources.tokenizer import copied_content
from modekit.text.amounts import SAMPLE_TOKENS
from modekit.text.splits import TRAINED_FILE, digests_in
from modekit.training.folder import TrainingOutcome
from modekit.training.request import memory_errors
from modekit.training.texts import TrainingText, check_given, read_texts


class DenseFolder(SpecialistFolder):
    """DENSE.training."""

    changed: ClassVar[str] = "the mixture is no longer what it started from"
    also_kept: ClassVar[tuple[str, ...]] = ("trained",)
    record_file: ClassVar[str] = DENSE_FILE


@dataclass(frozen=True)
class Densify:
    """What is asked for.

    Attributes:
        by: see above.
        course: of a distillation, and how text is read.
        texts: of a domain, relative to `root`, instead of the recipe's.
        scale: of a sum and of svd; None: the best of some on the select split.
        tokens: of held-out text per domain for the figures in densify.json.
        overwrite: whether another result may go.
    """

    by: By
    course: Course
    texts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    root: Path = Path()
    scale: float | None = None
    tokens: int = SAMPLE_TOKENS
    overwrite: bool = False


def densify(checkpoint: Checkpoint, asked: Densify, out: Path, *, run: Run = QUIET) -> DenseRecord:
    """Write the dense model; returns what densify.json says.

    A distillation goes on after a kill or Ctrl-C from its last state. Raises SourceError (an expert's folder that is gone or
    changed), UnsupportedError (a model with an encoder), TextError (distil and best without text), TrainingError, OutputError.
    """
    refuse_pairs(checkpoint, "a mixture of models with an encoder has no dense form here", option="densify")
    folder = DenseFolder(out)
    folder.tidy()
    refuse_existing(out, replaced_by(asked.overwrite), sources=(checkpoint.folder,))
    _check_sources(checkpoint, run)
    texts = _texts(checkpoint, asked, run)
    plan = make_plan(checkpoint.record.pinned_recipe, checkpoint.recipe_root, run=run)
    chooser = Chooser(checkpoint, plan, [text.held_out for text in texts], run)
    request = digest_of_data([_asked(asked), [[text.corpus.name, text.record, text.selected_by] for text in texts]])
    state = digest_of_data([checkpoint.identity, len(checkpoint.record.training)])
    work = _Work(checkpoint, asked, chooser, texts, folder, f"densify {request} {state}", run)
    if asked.by != "distil":
        return work.merge()
    with folder.held(request, state), memory_errors():
        return work.distil()


def _asked(asked: Densify) -> str:
    """All that decides what comes out, but for the text."""
    course = asked.course
    said = (course.settings, course.lesson) if asked.by == "distil" else (course.settings.sequence_length, asked.texts)
    return repr([asked.by, asked.scale, asked.tokens, said])


def _check_sources(checkpoint: Checkpoint, run: Run) -> None:
    """Raise SourceError where an expert's own model is not what is in the mixture."""
    for expert, name in enumerate(checkpoint.names):
        why = why_not(checkpoint, expert, run=run)
        if why is not None:
            raise SourceError("an expert's own model cannot be merged", where=f"expert '{name}'", found=why)


def _texts(checkpoint: Checkpoint, asked: Densify, run: Run) -> list[TrainingText]:
    """Text of every domain that has any, to distil on or to choose a merge by; none where the merge is given.

    Raises TextError where there is none and something must be measured, and for a given text that is not there.
    """
    check_given(checkpoint, asked.texts, asked.root)
    needs_text, chooses = asked.by in ("distil", "best"), asked.by in ("sum", "svd") and asked.scale is None
    known = asked.texts or any(expert.text for expert in checkpoint.record.recipe.experts)
    if not needs_text and not (chooses and known):
        return []
    return read_texts(checkpoint, asked.course.settings, asked.texts, asked.root, run=run)


@dataclass(frozen=True)
class _Work:
    checkpoint: Checkpoint
    asked: Densify
    chooser: Chooser
    texts: list[TrainingText]
    folder: DenseFolder
    made_by: str
    run: Run

    def merge(self) -> DenseRecord:
        """Write a merge as it is."""
        merge, report = self._best(), self._report()
        dense = self.chooser.planned(merge)
        record = self._record(merge, self._losses(self.chooser.set(merge), {}, report) if report else {})

        def fill(stage: Staging) -> None:
            write_shards(dense.plan, stage, None, self.run)
            weight_map = {tensor.name: shard.file for shard in dense.plan.shards for tensor in shard.tensors}
            size = sum(shard.nbytes for shard in dense.plan.shards)
            write_json(stage.folder / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weight_map})
            write_json(stage.folder / "config.json", dict(dense.config))

        self._write(record, (), fill)
        return record

    def distil(self) -> DenseRecord:
        """Distil the mixture into the best merge, and write the best state."""
        merge, report, folder = self._best(), self._report(), self.folder
        student = self.chooser.set(merge)
        start = held_out_losses(student, report, "the merge", self.run)
        save = make_trainable(student, self.chooser.plan.sources[0], "full", 0)
        outcome = folder.recall("trained", TrainingOutcome.model_validate)
        if outcome is None:
            outcome = teach(self.checkpoint, student, self.asked.course, self.texts, folder.path, self.run)
            folder.keep("trained", outcome.model_dump(mode="json"))
        if outcome.improved:
            take_state(student, outcome.best_state(folder.path))
        else:  # the student has gone on from it
            self.chooser.set(merge)
        student.eval()
        losses = self._losses(student, {"merge": start}, report) if report else {}
        record = self._record(merge, losses, outcome)

        def fill(stage: Staging) -> None:
            with library_writes(stage.folder) as written:
                save(written)

        self._write(record, [mark for text in self.texts for mark in text.trained_on], fill)
        if outcome.error is not None:
            raise outcome.error
        return record

    def _write(self, record: DenseRecord, marks: Sequence[str], fill: Callable[[Staging], object]) -> None:
        """Put it in its place: what `fill` writes, tokenizer, record, and what it and its experts were trained on."""
        self.run.begin("write")
        data, folder, plan = record.model_dump(mode="json"), self.folder, self.chooser.plan
        replace = replaced_by(self.asked.overwrite)
        sources = (self.checkpoint.folder, *(source.folder for source in plan.sources))
        trained = sorted({*marks, *(mark for source in sources for mark in digests_in(source / TRAINED_FILE))})
        with staging(folder.out, self.made_by, "model", sources=sources, replace=replace, sync=self.run.sync) as stage:
            fill(stage)
            tokenizer = {file.name: copied_content(file) for file in plan.copied_files}
            for name, content in {**tokenizer, **plan.written_files}.items():
                write_file(stage.folder / name, content)
            if trained:
                write_file(stage.folder / TRAINED_FILE, "".join(f"{mark}\n" for mark in trained).encode())
            if folder.is_held:
                folder.announce_digest(hashlib.sha256(json_bytes(data)).hexdigest())
            write_json(stage.folder / DENSE_FILE, data)

    def _best(self) -> Merge:
        return self.chooser.best(self.asked.by, self.asked.scale)

    def _report(self) -> list[Domain]:
        """Held-out text of the domains that have an expert, which neither trains nor chooses; none where there is none.

        Raises TextError where text that was given for these figures alone cannot be read.
        """
        scored = self.checkpoint.scored_on(self.asked.texts, self.asked.root)
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

    def _losses(
        self, dense: PreTrainedModel, known: dict[str, dict[str, float]], domains: Sequence[Domain]
    ) -> dict[str, dict[str, float]]:
        """Losses of base, of each domain's own expert, of the mixture and of the dense model; one other model at a time."""
        ours, experts = held_out_losses(dense, domains, "the dense model", self.run), dict[str, float]()
        for domain in domains:
            expert = load_expert_source(self.checkpoint, domain.expert, run=self.run)
            experts |= held_out_losses(expert, [domain], f"expert {domain.name}", self.run)
        base = held_out_losses(load_expert_source(self.checkpoint, None, run=self.run), domains, "the base", self.run)
        mixture = held_out_losses(load_model(self.checkpoint.folder, run=self.run), domains, "the mixture", self.run)
        return {"base": base, "experts": experts, "mixture": mixture, **known, "dense": ours}

    def _record(self, merge: Merge, losses: dict[str, dict[str, float]], outcome: TrainingOutcome | None = None) -> DenseRecord:
        notes, distilled, course = list[str](), None, self.asked.course
        if self.checkpoint.record.trained:
            notes.append("the mixture was trained: merges are of the experts' own models, only distil has what that changed")
        if outcome is not None:
            notes += [outcome.stopped] if outcome.stopped else []
            if not outcome.improved:
                notes.append("no state of the distillation was better on held-out text than the merge that it began from")
            distilled = Distilled(
                settings=course.settings.model_dump(mode="json", exclude_unset=True),
                weight=course.lesson.weights,
                steps=outcome.steps,
                best_step=outcome.best_step,
                select_loss={name: (before, outcome.after[name]) for name, before in outcome.before.items()},
            )
        return DenseRecord(
            by=self.asked.by,
            mixture=self.checkpoint.folder.name,
            merge=merge,
            parameters=sum(tensor.numel for tensor in self.chooser.planned(merge).tensors),
            distilled=distilled,
            losses=losses,
            notes=notes,
        )
