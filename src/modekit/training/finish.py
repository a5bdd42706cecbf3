"""The end of a training: the better mixture is written, and the tables of before and after beside it.

A kill in between is gone on from: what is there already is not made again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from safetensors.torch import load_file

from modekit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from modekit.checkpoint.record import TrainingRecord
from modekit.errors import TextError, TrainingError
from modekit.evaluation.evaluate import evaluate
from modekit.evaluation.labels import Labels
from modekit.evaluation.results import Results, Row
from modekit.evaluation.results_folder import write_results
from modekit.files.libraries import library_writes
from modekit.files.output import settle
from modekit.files.read import LARGE, read_bytes
from modekit.files.write import files_below, json_bytes, remove
from modekit.loaded.load import load_model, without_bars
from modekit.processes import processes
from modekit.run import Run
from modekit.training.ended import Ended
from modekit.training.folder import TrainingFolder
from modekit.training.log import LOG_FILE, TENSORBOARD_FOLDER
from modekit.training.low_rank import make_trainable
from modekit.training.moving import moving_of
from modekit.training.request import Request
from modekit.training.write import write_trained


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


def finish(
    request: Request,
    ended: Ended,
    folder: TrainingFolder | None,
    run: Run,
) -> TrainedMixture:
    """Write the trained mixture if it is better, and the tables; whatever of this a kill left undone.

    `folder` is None for a training that keeps nothing.
    """
    trained = ended.trained
    record = _record(request, ended)
    improved = trained.best_step > 0
    if not improved and folder is not None and processes().is_main:
        folder.remove()
    if not improved or not processes().is_main:
        return TrainedMixture(request.checkpoint, improved, record, None, trained.failed)
    before = folder.recall("before", Results.from_data) if folder is not None else None
    if folder is not None and folder.is_written:
        written = open_checkpoint(request.target)
    else:
        if before is None:
            before = _evaluate(request, request.checkpoint, None, run, write=False)
        written = _write(request, ended, record, before, folder, run)
    after = _evaluate(request, written, before, run, write=True)
    results = _compared(before, after) if before is not None and after is not None else None
    _write_results(written, record, results, folder)
    if folder is not None:
        folder.remove()
    settle(request.target)
    return TrainedMixture(written, improved, record, results, trained.failed)


def _record(request: Request, ended: Ended) -> TrainingRecord:
    trained = ended.trained
    return TrainingRecord(
        settings=request.settings.model_dump(mode="json"),
        text={text.corpus.name: text.record for text in request.texts},
        parameters=ended.parameters,
        steps=trained.steps,
        tokens=ended.tokens,
        notes=ended.notes,
        select_loss={name: {"before": before, "after": trained.after[name]} for name, before in trained.before.items()},
    )


def _write(
    request: Request,
    ended: Ended,
    record: TrainingRecord,
    before: Results | None,
    folder: TrainingFolder | None,
    run: Run,
) -> Checkpoint:
    """The trained mixture in its place. What a kill must not cost is kept first."""
    if folder is not None and before is not None:
        folder.keep("before", before.as_data())
    moved = ended.gates or _moved(request, ended, folder, run)
    if folder is not None:
        folder.announce([*request.checkpoint.record.training, record])
    return write_trained(request, moved, record, run)


def _moved(request: Request, ended: Ended, kept: TrainingFolder | None, run: Run) -> dict[str, torch.Tensor]:
    """What moved, as it was in the best state, under its names on disk.

    The mixture is loaded anew: whatever shards and wrappers it was trained in, what is written is what a state says.
    transformers itself says how memory and disk correspond.
    """
    assert ended.trained.best is not None and kept is not None
    checkpoint, settings = request.checkpoint, request.settings
    mixture = load_model(checkpoint.folder, run=run)
    trainable = make_trainable(mixture, moving_of(mixture, checkpoint).names(settings.what), settings.lora)
    best = {name.removeprefix("mixture."): value for name, value in load_file(ended.trained.best).items()}
    mixture.load_state_dict(best, strict=False)
    folder = kept.path / "moved"
    remove(folder)
    with without_bars(), library_writes(folder) as new:
        mixture.save_pretrained(new, state_dict=trainable.moved())
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
    """The table of `modekit eval`, on text that this training does not see; None when there is none or it is not wanted.

    Where a text has no place for a tag, as unseen conversations have none, no row has tags, and a note says so.
    """
    if request.evaluate_tokens is None:
        return None
    table = partial(
        evaluate,
        checkpoint,
        tokens_per_domain=request.evaluate_tokens,
        run=run,
        known=before,
        seen={*request.trained_on, *request.selected_by},
    )
    without: str | None = None
    try:
        if request.settings.tags:
            try:
                return table(labels=Labels("tag", ("right",)), write=write)
            except TextError as error:
                without = f"no row has tags: {error.what} ({error.where})"
        found = table(write=write and without is None)
    except TextError:
        return None
    if without is not None:
        found = replace(found, notes=[*found.notes, without])
        if write:
            found.write(checkpoint)
    return found


def _compared(before: Results, after: Results) -> Results:
    """One table: the models that did not change once, oracle and mixture, with a tag and without, before and after."""

    def moves(row: Row) -> bool:
        return row.kind == "mixture" or (row.kind == "label" and row.name.startswith("mixture"))

    rows = [row.renamed(f"{row.name} before") if moves(row) else row for row in before.rows]
    oracle = next((row.identity for row in before.rows if row.kind == "oracle"), None)
    for row in after.rows:
        if moves(row) or (row.kind == "oracle" and row.identity != oracle):
            rows.append(row if moves(row) else row.renamed("oracle after"))
    return Results(rows, after.domains, after.unseen, after.text, after.notes)


def _write_results(
    checkpoint: Checkpoint, record: TrainingRecord, results: Results | None, folder: TrainingFolder | None
) -> None:
    data = {"training": record.model_dump(mode="json"), "results": results.as_data() if results is not None else None}
    files = {"train.json": json_bytes(data)}
    if results is not None:
        files["train.md"] = results.markdown().encode()
    if folder is not None and (folder.path / LOG_FILE).exists():
        files["train.csv"] = read_bytes(folder.path / LOG_FILE, LARGE)
    logs = folder.path / TENSORBOARD_FOLDER if folder is not None else None
    if logs is not None and logs.is_dir():
        files |= {f"{TENSORBOARD_FOLDER}/{name}": read_bytes(logs / name, LARGE) for name in files_below(logs)}
    write_results(checkpoint, files)
