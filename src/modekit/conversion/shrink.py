"""`modekit shrink OUT NEW --to 6`: a plain mixture with fewer experts, near duplicates merged.

OUT is any mixture in a native architecture (sources/native.py), modekit's or a stranger's. Merged are the experts that are
nearest to each other, weighted by how often a text chooses them, and with them their rows of the gate. In a mixture of
modekit's, whose experts are the same models in every layer, the groups are the same in every layer, too.

    NEW                plain transformers, no modekit.json: its experts are no longer the models of a recipe
    NEW/shrink.json    who was merged, and the loss before and after

Shape legend: L layers, E experts, T tokens of a batch, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel
from torch import nn
from transformers import PreTrainedModel

from modekit.conversion.near import Array64, Group, groups_of, squared_distances
from modekit.conversion.plain import PlainMixture, write_smaller
from modekit.errors import ModekitError, check_packages
from modekit.evaluation.domains import Domain
from modekit.evaluation.loss import tokens_per_pass
from modekit.experts.specialist import held_out_losses
from modekit.files.output import refuse_existing, replaced_by
from modekit.files.staging import staging
from modekit.files.write import copy_file, digest_of_data, write_json
from modekit.loaded.load import decoder_layers, load_model, load_tokenizer
from modekit.loaded.passes import losses_of, removed
from modekit.run import QUIET, Run
from modekit.sources.contents import OpenFiles
from modekit.sources.tokenizer import copied_files
from modekit.text.held_out import read_text
from modekit.text.sequences import TokenSequence, encode, make_batches
from modekit.text.splits import TRAINED_FILE

SHRINK_FILE = "shrink.json"
_LENGTH, _SHORTEST = 512, 64


class ShrinkRecord(BaseModel, frozen=True):
    """The content of shrink.json. `groups` [L][to]: experts of OUT by number; losses are nats per token of held-out text."""

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
    check_packages(("scipy.optimize",), "pip install 'modekit[classifier]'")
    refuse_existing(out, replaced_by(asked.overwrite), sources=(folder,))
    plain = PlainMixture.opened(folder)
    if not 1 <= asked.to < plain.experts:
        raise ModekitError(
            "there is nothing to merge", where="--to", found=asked.to, expected=f"1 to {plain.experts - 1}", remedy="correct it"
        )
    fit, held_out = _sequences(folder, asked, run)
    chosen, before = np.ones((plain.layers, plain.experts)), None
    if fit:
        model = load_model(folder, run=run)
        chosen += _counts(model, plain, fit, run)
        before = held_out_losses(model, [held_out], "OUT", run).get(held_out.name)
        del model
    with OpenFiles() as opened:
        groups = _groups(plain, opened, chosen, asked.to, run)
        record = ShrinkRecord(mixture=folder.name, experts=plain.experts, to=asked.to, groups=groups, names=plain.names)
        digest = digest_of_data([record.model_dump(), plain.identity, chosen.tolist()])
        replace = replaced_by(asked.overwrite)
        with staging(out, f"shrink {digest}", "model", sources=(folder,), replace=replace, sync=run.sync) as stage:
            write_smaller(plain, opened, groups, chosen, stage, run)
            for file in copied_files(folder, where=str(folder)):
                copy_file(file, stage.folder / file.name)
            if (folder / TRAINED_FILE).exists():
                copy_file(folder / TRAINED_FILE, stage.folder / TRAINED_FILE)
            if before is not None:
                after = held_out_losses(load_model(stage.folder, run=run), [held_out], "NEW", run)[held_out.name]
                record = record.model_copy(update={"loss_before": before, "loss_after": after})
            write_json(stage.folder / SHRINK_FILE, record.model_dump(mode="json"))
    return record


def _sequences(folder: Path, asked: Shrinking, run: Run) -> tuple[list[TokenSequence], Domain]:
    """The same share of each text: what weighs, and what losses are measured on. Raises TextError."""
    fit, report = list[TokenSequence](), list[TokenSequence]()
    for spec in asked.texts:
        text, tokenizer = read_text([spec], root=asked.root, where="--text"), load_tokenizer(folder, run=run)
        most = max(_SHORTEST, asked.tokens // len(asked.texts))
        own = encode(tokenizer, text.fit(), max_tokens=most, sequence_length=_LENGTH)
        if not own:
            raise text.nothing_left("no document is left to read")
        fit += own
        report += encode(tokenizer, text.report(), max_tokens=most, sequence_length=_LENGTH)
    return fit, Domain("held-out", None, report)


@torch.no_grad()
def _counts(model: PreTrainedModel, plain: PlainMixture, sequences: Sequence[TokenSequence], run: Run) -> Array64:
    """How many tokens choose each expert, pads left out."""
    counts_LE = np.zeros((plain.layers, plain.experts))
    batches = list(make_batches(sequences, tokens=tokens_per_pass(model.config)))

    def count(layer: int, real_T: torch.Tensor, _module: nn.Module, _args: object, output: tuple[torch.Tensor, ...]) -> None:
        chosen_TK = output[-1].reshape(len(real_T), -1)[real_T]
        counts_LE[layer] += torch.bincount(chosen_TK.flatten().cpu(), minlength=plain.experts).numpy()

    for batch in run.over("read the text", batches, len(batches)):
        given = batch.to(model.device)
        handles = [
            layer.get_submodule(plain.native.router_module).register_forward_hook(partial(count, place, given.mask.flatten()))
            for place, layer in enumerate(decoder_layers(model))
        ]
        with removed(handles):
            losses_of(model, given)
    return counts_LE


def _groups(plain: PlainMixture, opened: OpenFiles, chosen_LE: Array64, to: int, run: Run) -> list[list[Group]]:
    """Per layer; the same in all layers of a mixture of modekit's."""
    apart = []
    for layer in run.over("compare experts", range(plain.layers), plain.layers):
        apart.append(squared_distances([plain.expert(opened, layer, expert) for expert in range(plain.experts)]))
    if plain.names:
        return [groups_of(np.sum(apart, axis=0), chosen_LE.sum(0), to)] * plain.layers
    return [groups_of(each, counts, to) for each, counts in zip(apart, chosen_LE, strict=True)]
