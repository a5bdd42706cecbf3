"""The models that experts were made from, with all that they learned: full models, and the base with an adapter folded in."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.sources import OwnModel
from modekit.loaded.load import in_float64, load_adapted, load_model
from modekit.planning.make import make_plan
from modekit.run import QUIET, Run
from modekit.sources.adapter import AdapterSource, is_adapter, open_adapter
from modekit.sources.class_names import named_by_class
from modekit.sources.config import whole
from modekit.sources.contents import OpenFiles
from modekit.sources.rows import rows_of
from modekit.sources.source import ModelSource, open_source
from modekit.weights.folding import reader
from modekit.weights.numeric import to_float32


def load_expert(base: Path, folder: Path, *, run: Run = QUIET) -> PreTrainedModel:
    """A full model, or the base with an adapter folded in. Raises SourceError, and MismatchError for another base's adapter."""
    if not is_adapter(folder):
        return load_model(folder, run=run)
    return load_adapted(base, _opened(base, folder, run), run=run)


def _opened(base: Path, folder: Path, run: Run) -> AdapterSource:
    """An adapter, checked. Raises as `open_adapter` does."""
    source = named_by_class(open_source("base_model", str(base), base, run=run))
    return open_adapter("expert", str(folder), folder, source)


def load_expert_source(checkpoint: Checkpoint, expert: int | None, *, run: Run = QUIET) -> PreTrainedModel:
    """The model that the expert at a place was made from, with all that it learned; None: the base. It reads all tokens of the
    mixture, with the rows that this has.

    Only for one that is what it was (checkpoint/sources.py).
    """
    record = checkpoint.record
    place, base, folder = _folders(checkpoint, expert)
    model = load_expert(base, folder, run=run)
    if record.tokens is not None:
        sources = make_plan(record.pinned_recipe, checkpoint.recipe_root, run=run).sources
        give_rows(model, [*dict.fromkeys(sources)][place], sources[0])
    return model


def _folders(checkpoint: Checkpoint, expert: int | None) -> tuple[int, Path, Path]:
    """The place of an expert's model among the sources, and the folders of the base and of it."""
    sources = checkpoint.record.sources
    place = 0 if expert is None else checkpoint.record.expert_sources[expert]
    return place, checkpoint.source_folder(sources[0]), checkpoint.source_folder(sources[place])


def give_rows(model: PreTrainedModel, source: ModelSource, base: ModelSource) -> None:
    """Give a loaded model rows for the tokens of a mixture that it lacks, from the plan's `source` of it and of its base.

    Without them no text with such a token could be scored.
    """
    own = source.replaced if isinstance(source, AdapterSource) else source.tensors
    before = int(model.get_input_embeddings().weight.shape[0])
    rows = whole(base.config, "vocab_size")
    if rows == before:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    resized = {id(parameter) for module in ends for parameter in module.parameters()}
    with OpenFiles() as opened, torch.no_grad():
        for name, parameter in model.named_parameters():  # a tied head comes with the embedding
            if id(parameter) in resized:
                added = to_float32(reader(opened)(rows_of(own.get(name) or base.tensor(name), before, rows)))
                parameter[before:] = torch.from_numpy(added).view(rows - before, *parameter.shape[1:]).to(parameter)


def load_own_model(checkpoint: Checkpoint, expert: int, *, run: Run = QUIET) -> tuple[PreTrainedModel, OwnModel]:
    """The expert's model as others run it, and how it was made: of an adapter PEFT's, in which modekit computes nothing.

    As `load_expert_source` else. The adapter is checked before PEFT reads it, and PEFT not believed where it does not take
    every tensor.
    """
    place, base, folder = _folders(checkpoint, expert)
    if not is_adapter(folder):
        return load_expert_source(checkpoint, expert, run=run), "full model" if place else "base"
    if checkpoint.record.tokens is not None:  # PEFT's model may lack tokens of the mixture
        return load_expert_source(checkpoint, expert, run=run), "folded"
    _opened(base, folder, run)
    adapted = _in_peft(load_model(base, run=run), folder)
    return (load_expert(base, folder, run=run), "folded") if adapted is None else (adapted, "PEFT")


def _in_peft(model: PreTrainedModel, folder: Path) -> PreTrainedModel | None:
    """A model with an adapter in it; None where PEFT refuses it, or finds no place for one of its tensors."""
    from peft import PeftConfig, PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            adapted = PeftModel(model, PeftConfig.from_pretrained(str(folder)))
            loaded = adapted.load_adapter(str(folder), "default")
        except Exception:  # whatever PEFT raises
            return None
    whole: PreTrainedModel = adapted.get_base_model().eval()
    return None if loaded.missing_keys or loaded.unexpected_keys else whole


def average_of(loads: Sequence[Callable[[], PreTrainedModel]]) -> PreTrainedModel:
    """The mean of the models' tensors, summed in float64; two models are in memory at a time."""
    model = loads[0]()
    sums = {name: in_float64(tensor) for name, tensor in model.state_dict().items()}
    for load in loads[1:]:
        for name, tensor in load().state_dict().items():
            sums[name] += tensor.to(sums[name].device)
    model.load_state_dict({name: tensor / len(loads) for name, tensor in sums.items()})
    return model
