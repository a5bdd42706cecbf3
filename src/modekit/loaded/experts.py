"""The models that experts were made from, with all that they learned: full models, and the base with an adapter folded in."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.loaded.load import load_adapted, load_model
from modekit.run import QUIET, Run
from modekit.sources.adapter import is_adapter, open_adapter
from modekit.sources.adapter_config import read_adapter_config
from modekit.sources.model import open_source

OwnModel = Literal["base", "full model", "PEFT", "folded"]
"""How an expert's own model was made: PEFT's of base and adapter, or, where PEFT is not asked, the adapter folded in."""
_NAMES = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "feedforward_modules",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
)
_PLAIN_NAME = re.compile(r"[\w.^$-]*")


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


def load_own_model(checkpoint: Checkpoint, expert: int, *, run: Run = QUIET) -> tuple[PreTrainedModel, OwnModel]:
    """The expert's model as others run it, and how it was made: of an adapter PEFT's, in which modekit computes nothing.

    As `load_expert_source` else. The adapter is checked before PEFT reads it. PEFT is not asked where a name is a pattern that
    may take it for ever (it has no time limit), nor believed where it does not take every tensor.
    """
    record = checkpoint.record
    place = record.expert_sources[expert]
    base, folder = (checkpoint.source_folder(record.sources[each]) for each in (0, place))
    if not is_adapter(folder):
        return load_model(folder, run=run), "full model" if place else "base"
    open_adapter("expert", str(folder), folder, open_source("base_model", str(base), base, run=run))
    adapted = _in_peft(load_model(base, run=run), folder) if _names_are_plain(folder) else None
    return (load_expert(base, folder, run=run), "folded") if adapted is None else (adapted, "PEFT")


def _names_are_plain(folder: Path) -> bool:
    """Whether no name of a module in an adapter's config, which is checked, is more of a pattern than a dot or an end."""
    config = read_adapter_config(folder, where=str(folder))
    values = [config.get(key) for key in _NAMES]
    names = [[value] if isinstance(value, str) else value for value in values if isinstance(value, (str, list, dict))]
    return all(_PLAIN_NAME.fullmatch(name) for each in names for name in each)


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
    sums = {name: tensor.double() for name, tensor in model.state_dict().items()}
    for load in loads[1:]:
        for name, tensor in load().state_dict().items():
            sums[name] += tensor
    model.load_state_dict({name: tensor / len(loads) for name, tensor in sums.items()})
    return model
