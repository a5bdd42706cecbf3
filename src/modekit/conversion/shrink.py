"""`modekit shrink OUT NEW --to 6`: a plain mixture with fewer experts, near duplicates merged.

OUT is any mixture in a native architecture (sources/native.py), modekit's or a stranger's. Merged are the experts that are
nearest to each other, weighted by how often a text chooses them, and with them their rows of the gate. In a mixture of
modekit's, whose experts are the same models in every layer, the groups are the same in every layer, too.

    NEW                plain transformers, no modekit.json: its experts are no longer the models of a recipe
    NEW/shrink.json    who was merged, and the loss before and after

Shape legend: L layers, E experts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from modekit.conversion.chosen import measure_text
from modekit.conversion.near import Array64, Group, groups_of, squared_distances
from modekit.conversion.plain import PlainMixture, write_smaller
from modekit.errors import ModekitError, check_packages
from modekit.files.output import refuse_existing, replaced_by
from modekit.files.staging import staging
from modekit.files.write import copy_file, write_json
from modekit.run import QUIET, Run
from modekit.sources.contents import OpenFiles
from modekit.sources.tokenizer import copied_files
from modekit.text.splits import TRAINED_FILE

SHRINK_FILE = "shrink.json"


class ShrinkRecord(BaseModel):
    """The content of shrink.json. `groups` [L][to]: experts of OUT by number; losses are nats per token of held-out text."""

    model_config = ConfigDict(frozen=True)

    mixture: str
    experts: int
    to: int
    groups: list[list[list[int]]]
    names: list[str] = []
    loss_before: float | None = None
    loss_after: float | None = None


@dataclass(frozen=True)
class Shrinking:
    """What is asked for: `to` experts, and `texts` relative to `root`, of which `tokens` are read, as many of each; none: all
    experts count the same.

    `overwrite`: whether another result may go.
    """

    to: int
    texts: Sequence[str] = ()
    root: Path = field(default_factory=Path)
    tokens: int = 8_192
    overwrite: bool = False


def shrink(folder: Path, asked: Shrinking, out: Path, *, run: Run = QUIET) -> ShrinkRecord:
    """Write the smaller mixture; returns what shrink.json says.

    Raises UnsupportedError for what is no plain mixture, SourceError, TextError, OutputError, and ModekitError for a number of
    experts that it cannot have.
    """
    check_packages(("scipy.optimize",), "pip install 'modekit[discover]'")
    refuse_existing(out, replaced_by(asked.overwrite), sources=(folder,))
    plain = PlainMixture.opened(folder)
    if not 1 <= asked.to < plain.experts:
        raise ModekitError(
            "there is nothing to merge", where="--to", found=asked.to, expected=f"1 to {plain.experts - 1}", remedy="correct it"
        )
    measured = measure_text(folder, plain.native, asked.texts, asked.root, asked.tokens, run)
    with OpenFiles() as opened:
        chosen = np.ones((plain.layers, plain.experts)) if measured is None else measured.counts_LE + 1.0
        groups = _groups(plain, opened, chosen, asked.to, run)
        record = ShrinkRecord(mixture=folder.name, experts=plain.experts, to=asked.to, groups=groups, names=plain.names)
        digest = hashlib.sha256(json.dumps([record.model_dump(), plain.identity, chosen.tolist()]).encode()).hexdigest()
        replace = replaced_by(asked.overwrite)
        with staging(out, f"shrink {digest}", "model", sources=(folder,), replace=replace, sync=run.sync) as stage:
            write_smaller(plain, opened, groups, chosen, stage, run)
            for file in copied_files(folder, where=str(folder)):
                copy_file(file, stage.folder / file.name)
            if (folder / TRAINED_FILE).exists():
                copy_file(folder / TRAINED_FILE, stage.folder / TRAINED_FILE)
            if measured is not None:
                after = measured.loss_of(stage.folder, run)
                record = record.model_copy(update={"loss_before": measured.loss, "loss_after": after})
            write_json(stage.folder / SHRINK_FILE, record.model_dump(mode="json"))
    return record


def _groups(plain: PlainMixture, opened: OpenFiles, chosen_LE: Array64, to: int, run: Run) -> list[list[Group]]:
    """Per layer; the same in all layers of a mixture of modekit's."""
    apart = []
    for layer in run.over("compare experts", range(plain.layers), plain.layers):
        apart.append(squared_distances([plain.expert(opened, layer, expert) for expert in range(plain.experts)]))
    if plain.names:
        return [groups_of(np.sum(apart, axis=0), chosen_LE.sum(0), to)] * plain.layers
    return [groups_of(each, counts, to) for each, counts in zip(apart, chosen_LE, strict=True)]
