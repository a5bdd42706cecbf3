"""`modekit train OUT`: from settings and text to a better checkpoint, or to the same one when training does not help.

    OUT.training/      states, logs (folder.py); removed when all is done
    OUT                the trained mixture: only what was to move has other bytes
    OUT/results/       train.json, train.md (held-out losses before and after), train.csv (loss by step)

What is there already after a kill is not made again. States are compared on the select split; what the tables report was
never looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.checkpoint.record import TrainingRecord
from modekit.errors import TextError, TrainingError
from modekit.evaluation.evaluate import evaluate
from modekit.evaluation.results import Results, Row
from modekit.evaluation.results_folder import write_results
from modekit.files.change import refuse_existing
from modekit.files.copies import library_writes
from modekit.files.read import LARGE, read_bytes
from modekit.files.write import json_bytes, remove
from modekit.loaded.load import load_model, without_bars
from modekit.loaded.states import take_state
from modekit.processes import processes
from modekit.run import QUIET, Run
from modekit.sources.folders import model_folder
from modekit.sources.source import open_source
from modekit.sources.tokenizer import Readers, check_same_tokenizer
from modekit.text.amounts import SAMPLE_TOKENS
from modekit.training.end_to_end import train_end_to_end
from modekit.training.engine import LOG_FILE
from modekit.training.folder import TrainingFolder, TrainingOutcome, digest_of_request, state_of
from modekit.training.moving import moving_of, names_of
from modekit.training.request import Request, memory_errors
from modekit.training.settings import TrainSettings
from modekit.training.texts import read_texts
from modekit.training.write import write_trained


def train(
    checkpoint: Checkpoint,
    settings: TrainSettings,
    *,
    texts: Mapping[str, Sequence[str]] | None = None,
    root: Path | None = None,
    out: Path | None = None,
    evaluate_tokens: int | None = SAMPLE_TOKENS,
    run: Run = QUIET,
) -> TrainedMixture:
    """Train a mixture and write it to `out` (by default in its own place).

    `texts` gives text per domain, relative to `root`; a domain that it does not name is read from the recipe. Only documents
    of the fit split move anything. Under a launcher only the main process writes, and the others return the old checkpoint.

    Raises TextError for a domain whose text is empty, TrainingError for settings that do not fit the mixture or when memory
    does not suffice. A loss that stops being finite ends the training at its best state so far; `failed` then says where.
    """
    checkpoint = open_checkpoint(checkpoint.folder.resolve())
    target = (out or checkpoint.folder).resolve()
    folder = TrainingFolder(target)
    if target != checkpoint.folder and not folder.is_written:
        if target.exists() and processes().is_main:
            folder.tidy()
        refuse_existing(target, "nothing")
    read = read_texts(checkpoint, settings, texts or {}, root or Path.cwd(), run=run)
    teacher = _teacher(checkpoint, settings, root or Path.cwd(), run)
    request = Request(checkpoint, target, settings, read, evaluate_tokens, teacher)
    request.check()
    with folder.held(digest_of_request(settings, read), state_of(checkpoint)), memory_errors():
        outcome = folder.outcome()
        if outcome is None:  # else a kill came after that
            outcome = train_end_to_end(request, folder.path, run)
            if processes().is_main:
                folder.keep("trained", outcome.model_dump(mode="json"))
        return finish(request, outcome, folder, run)


def _teacher(checkpoint: Checkpoint, settings: TrainSettings, root: Path, run: Run) -> Path | None:
    """The folder of the model that teaches all domains. Raises SourceError, or TrainingError for one of another vocabulary."""
    if settings.teacher is None:
        return None
    folder, _ = model_folder(settings.teacher, root=root, label="teacher", run=run)
    where = f"teacher ({settings.teacher})"
    readers = Readers("mixture", "teacher", "use a teacher that has the mixture's tokenizer")
    check_same_tokenizer(checkpoint.folder, folder, where=where, readers=readers)
    found = open_source("teacher", settings.teacher, folder, run=run).config.get("vocab_size")
    if found != checkpoint.config["vocab_size"]:
        raise TrainingError(
            "the teacher's vocabulary has another size",
            where=where,
            found=found,
            expected=str(checkpoint.config["vocab_size"]),
            remedy="use a teacher whose embedding has as many rows as the mixture's",
        )
    return folder


@dataclass(frozen=True)
class TrainedMixture:
    """What a training came to.

    `improved` is False when no state was better on held-out text than the start: then nothing was written. `results` has the
    rows of `modekit eval` before and after; None when nothing was written, there is no held-out text for them, or they were
    not asked for. `failed` is the error that ended it early, after its best state was written.
    """

    checkpoint: Checkpoint
    improved: bool
    record: TrainingRecord
    results: Results | None
    failed: TrainingError | None


def finish(request: Request, outcome: TrainingOutcome, folder: TrainingFolder, run: Run) -> TrainedMixture:
    """Write the trained mixture if it is better, and the tables; whatever of this a kill left undone."""
    record, improved, error = _record(request, outcome), outcome.improved, outcome.error
    if not improved or not processes().is_main:
        return TrainedMixture(request.checkpoint, improved, record, None, error)
    before = folder.recall("before", Results.from_data)
    if folder.is_written:
        written = open_checkpoint(request.target)
    else:
        if before is None:
            before = _evaluate(request, request.checkpoint, None, run, write=False)
        if before is not None:  # what a kill must not cost
            folder.keep("before", before.as_data())
        moved = _moved(request, outcome, folder, run)
        folder.announce([*request.checkpoint.record.training, record])
        written = write_trained(request, moved, record, run)
    after = _evaluate(request, written, before, run, write=True)
    results = _compared(before, after) if before is not None and after is not None else None
    _write_results(written, record, results, folder)
    return TrainedMixture(written, improved, record, results, error)


def _record(request: Request, outcome: TrainingOutcome) -> TrainingRecord:
    return TrainingRecord(
        settings=request.settings.model_dump(mode="json"),
        text={text.corpus.name: text.record for text in request.texts},
        parameters=outcome.parameters,
        steps=outcome.steps,
        tokens=outcome.tokens,
        notes=outcome.notes,
        select_loss={name: {"before": before, "after": after} for name, (before, after) in outcome.losses.items()},
    )


def _moved(request: Request, outcome: TrainingOutcome, kept: TrainingFolder, run: Run) -> dict[str, torch.Tensor]:
    """What moved, as it was in the best state, under its names on disk.

    The mixture is loaded anew: whatever shards and wrappers it was trained in, what is written is what a state says.
    transformers itself says how memory and disk correspond.
    """
    checkpoint, settings = request.checkpoint, request.settings
    mixture = load_model(checkpoint.folder, run=run)
    names = names_of(moving_of(mixture, checkpoint), settings.what)
    take_state(mixture, outcome.best_state(kept.path))
    parameters = dict(mixture.named_parameters())
    folder = kept.path / "moved"
    remove(folder)
    with without_bars(), library_writes(folder) as new:
        mixture.save_pretrained(new, state_dict={name: parameters[name].detach().cpu() for name in names})
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def _evaluate(
    request: Request,
    checkpoint: Checkpoint,
    before: Results | None,
    run: Run,
    *,
    write: bool,
) -> Results | None:
    """The table of `modekit eval`, on text that this training does not see; None when there is none or it is not wanted."""
    if request.evaluate_tokens is None:
        return None
    try:
        return evaluate(
            checkpoint,
            tokens_per_domain=request.evaluate_tokens,
            run=run,
            known=before,
            seen={*request.trained_on, *request.selected_by},
            write=write,
            labels="tag" if request.settings.tags else None,
            wrong=False,
        )
    except TextError:
        return None


def _compared(before: Results, after: Results) -> Results:
    """One table: the models that did not change once, oracle and mixture, with a tag and without, before and after."""

    def moves(row: Row) -> bool:
        return row.kind == "mixture" or (row.kind == "label" and row.name.startswith("mixture"))

    rows = [replace(row, name=f"{row.name} before") if moves(row) else row for row in before.rows]
    oracle = next((row.identity for row in before.rows if row.kind == "oracle"), None)
    for row in after.rows:
        if moves(row) or (row.kind == "oracle" and row.identity != oracle):
            rows.append(row if moves(row) else replace(row, name="oracle after"))
    return Results(rows, after.domains, after.unseen, notes=after.notes)


def _write_results(checkpoint: Checkpoint, record: TrainingRecord, results: Results | None, folder: TrainingFolder) -> None:
    data = {"training": record.model_dump(mode="json"), "results": results.as_data() if results is not None else None}
    files = {"train.json": json_bytes(data)}
    if results is not None:
        files["train.md"] = results.markdown().encode()
    if (folder.path / LOG_FILE).exists():
        files["train.csv"] = read_bytes(folder.path / LOG_FILE, LARGE)
    write_results(checkpoint, files)
