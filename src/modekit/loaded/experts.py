"""The models that experts were made from, with all that they learned: full models, and the base with an adapter folded in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.loaded.load import load_adapted, load_model
from modekit.run import QUIET, Run
from modekit.sources.adapter import is_adapter, open_adapter
from modekit.sources.model import open_source


def load_expert(base: Path, folder: Path, *, run: Run = QUIET) -> PreTrainedModel:
    """A full model, or the base with an adapter folded in. Raises SourceError, and MismatchError for another base's adapter."""
    if not is_adapter(folder):
        return load_model(folder, run=run)
    source = open_source("base_model", str(base), base, run=run)
    return load_adapted(base, open_adapter("expert", str(folder), folder, source), run=run)


def load_expert_source(checkpoint: Checkpoint, expert: int | None, *, run: Run = QUIET) -> PreTrainedModel:
    """The model that the expert at a place was made from, with all that it learned; None: the base.

    Only for one that is what it was (checkpoint/sources.py).
    """
    record = checkpoint.record
    place = 0 if expert is None else record.expert_sources[expert]
    base, folder = (checkpoint.source_folder(record.sources[each]) for each in (0, place))
    return load_expert(base, folder, run=run)


def average_of(loads: Sequence[Callable[[], PreTrainedModel]]) -> PreTrainedModel:
    """The mean of the models' tensors, summed in float64; two models are in memory at a time."""
    model = loads[0]()
    sums = {name: tensor.double() for name, tensor in model.state_dict().items()}
    for load in loads[1:]:
        for name, tensor in load().state_dict().items():
            sums[name] += tensor
    model.load_state_dict({name: tensor / len(loads) for name, tensor in sums.items()})
    return model
