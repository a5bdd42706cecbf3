"""Where a dense model goes, and what is kept while it is taught."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from modekit.conversion.dense_record import DENSE_FILE, DenseRecord
from modekit.conversion.merged import write_tokenizer
from modekit.experts.specialist import SpecialistFolder
from modekit.files.output import Replace, settle, was_made_by
from modekit.files.read import SMALL
from modekit.files.staging import Staging, staging
from modekit.files.typed import read_as
from modekit.files.write import json_bytes, write_file, write_json
from modekit.planning.dense import DensePlan
from modekit.run import Run
from modekit.text.splits import TRAINED_FILE, digests_in


class DenseFolder(SpecialistFolder):
    """DENSE.training."""

    changed: ClassVar[str] = "the mixture is no longer what it started from"
    also_kept: ClassVar[tuple[str, ...]] = ("trained",)
    record_file: ClassVar[str] = DENSE_FILE


@dataclass(frozen=True)
class NewDense:
    """Where it goes, by which command, and of which folders; `replace`: what may go.

    `tokenizer`: a plan of the mixture's models, whose tokenizer goes along.
    """

    folder: DenseFolder
    made_by: str
    sources: tuple[Path, ...]
    replace: Replace
    tokenizer: DensePlan

    def finished(self) -> DenseRecord | None:
        """What OUT says where this very command made it and was killed while it tidied up; else None."""
        out = self.folder.out
        if not was_made_by(out, self.made_by):
            return None
        self.folder.tidy()
        settle(out)
        return read_as(out / DENSE_FILE, DenseRecord, SMALL)

    def write(self, record: DenseRecord, marks: Sequence[str], fill: Callable[[Staging], object], run: Run) -> None:
        """Put it in its place: what `fill` writes, tokenizer, record, and what it and its experts were trained on."""
        run.begin("write")
        data, out = record.model_dump(mode="json"), self.folder.out
        trained = sorted({*marks, *(mark for source in self.sources for mark in digests_in(source / TRAINED_FILE))})
        with staging(out, self.made_by, "model", sources=self.sources, replace=self.replace, sync=run.sync) as stage:
            stage.settles = not self.folder.is_held
            fill(stage)
            write_tokenizer(self.tokenizer, stage.folder)
            if trained:
                write_file(stage.folder / TRAINED_FILE, "".join(f"{mark}\n" for mark in trained).encode())
            if self.folder.is_held:
                self.folder.announce_digest(hashlib.sha256(json_bytes(data)).hexdigest())
            write_json(stage.folder / DENSE_FILE, data)
