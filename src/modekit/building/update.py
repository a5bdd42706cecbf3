"""A mixture that a build changes: who in the new one was in it, and what goes over beside the weights (planning/reuse.py).

Statistics of a fit go with the experts that stay, whose text is not needed again; so do the record of a training, the tensors
that it moved, and its rows of the gates. In place, everything else that lies there stays, too; elsewhere, the lists of text
that no table may show any more.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from modekit.checkpoint.carried import CARRIED_FILE
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.record import RECORD_FILE, STATISTICS_FOLDER, Change, MixtureRecord, SourceRecord
from modekit.files.copies import carry_over, link_file
from modekit.files.marker import INTERNAL
from modekit.files.write import make_folder
from modekit.planning.plan import ROUTER_FILE, Plan
from modekit.planning.reuse import Origins
from modekit.sources.contents import OpenFiles
from modekit.sources.header import TensorRef
from modekit.sources.source import ModelSource
from modekit.sources.tokenizer import COPIED_FILES
from modekit.sources.weight_files import INDEX_FILE
from modekit.text.splits import SELECTED_FILE, TRAINED_FILE


@dataclass(frozen=True)
class CheckpointUpdate:
    """What is changed, and how.

    Attributes:
        checkpoint: the mixture as it is.
        plan: of the mixture as it is to be, which takes what it can from the checkpoint.
        origins: per expert of that its number in the checkpoint; None for a new one.
        statistics: experts whose kept statistics stay.
        change: what the history will say.
        refits: the router is set anew even where it was trained.
    """

    checkpoint: Checkpoint
    plan: Plan
    origins: Origins
    statistics: Collection[str]
    change: Change
    refits: bool = False

    @property
    def keeps_training(self) -> bool:
        """Whether the router is what a training made, and stays that."""
        record = self.checkpoint.record
        return record.router.status == "trained" and bool(record.training) and not self.refits

    def is_of(self, out: Path) -> bool:
        """Whether the new mixture takes the old one's place."""
        return os.path.realpath(out) == os.path.realpath(self.checkpoint.folder)

    @property
    def sources(self) -> dict[ModelSource, SourceRecord]:
        """Of the base and of every expert that stays, what was recorded when they were read."""
        record = self.checkpoint.record
        known = {self.plan.sources[0]: record.sources[0]}
        for source, origin in zip(self.plan.sources[1:], self.origins, strict=True):
            if origin is not None:
                known[source] = record.sources[record.expert_sources[origin]]
        return known

    @property
    def hashes(self) -> dict[Path, str]:
        """Of the files of those."""
        return {source.folder / name: each.blake3 for source, said in self.sources.items() for name, each in said.files.items()}

    def carry_statistics(self, folder: Path) -> None:
        """Into the folder in which the new mixture is made. Raises OSError."""
        for name in self.statistics:
            kept = self.checkpoint.folder / STATISTICS_FOLDER
            file = kept / f"{name}.safetensors"
            if file.is_file() and not (file.is_symlink() or kept.is_symlink()):
                make_folder(folder / STATISTICS_FOLDER)
                link_file(file, folder / STATISTICS_FOLDER / f"{name}.safetensors")

    def carry_over(self, folder: Path, out: Path) -> None:
        """What else lies beside the weights, into the folder in which the mixture `out` is made.

        Raises CheckpointError when the checkpoint has been changed meanwhile, and OSError.
        """
        self.checkpoint.check_unchanged()
        old = self.checkpoint.folder
        if self.is_of(out):
            made_anew = {RECORD_FILE, ROUTER_FILE, INDEX_FILE, CARRIED_FILE, "config.json", STATISTICS_FOLDER, *INTERNAL}
            if self.plan.vocabulary is not None and (self.plan.vocabulary.is_grown or self.checkpoint.record.tokens):
                made_anew |= {*COPIED_FILES}  # of another model, perhaps
            made_anew |= self.checkpoint.recipe_file(self.plan.recipe, out).keys()
            weights = {ref.file.name for ref in self.checkpoint.tensors.values()}
            carry_over(old, folder, but=made_anew | weights, links=True)
            return
        for name in (TRAINED_FILE, SELECTED_FILE):
            if (old / name).is_file():
                link_file(old / name, folder / name)

    def continued(self, record: MixtureRecord, tensors: Mapping[str, TensorRef]) -> MixtureRecord:
        """The record of the new mixture, whose tensors these are, with what was trained and who came and went."""
        old = self.checkpoint.record
        assert self.plan.reused is not None
        trained = [name for name, was in self.plan.reused.names.items() if was in old.trained]
        with OpenFiles() as opened:
            digests = {name: opened.blake3(tensors[name]) for name in sorted(trained)}
        update = {"trained": digests, "training": old.training, "history": [*old.history, self.change]}
        return record.model_copy(update=update)
