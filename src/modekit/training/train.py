"""`modekit train OUT`: from settings and text to a better checkpoint, or to the same one when training does not help.

    OUT.training/      states, logs (folder.py); removed when all is done
    OUT                the trained mixture: only what was to move has other bytes
    OUT/results/       train.json, train.md (held-out losses before and after), train.csv (loss by step)

States are compared on the select split; what the tables report was never looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.errors import TrainingError
from modekit.files.change import refuse_existing
from modekit.processes import processes
from modekit.run import QUIET, Run
from modekit.sources.folders import model_folder
from modekit.sources.source import open_source
from modekit.sources.tokenizer import Readers, check_same_tokenizer
from modekit.text.amounts import SAMPLE_TOKENS
from modekit.training.end_to_end import train_end_to_end
from modekit.training.finish import TrainedMixture, finish
from modekit.training.folder import TrainingFolder, digest_of_request, state_of
from modekit.training.request import Request, memory_errors
from modekit.training.settings import TrainSettings
from modekit.training.texts import read_texts


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
