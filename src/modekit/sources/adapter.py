"""PEFT adapter folders read by header: which weights of the base an adapter changes.

Nothing here imports peft or torch, and nothing reads a tensor; by which rule says adapter_rules.py. PEFT's merged models are
the oracle of tests/sources/test_adapters.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from modekit.sources.adapter_config import CONFIG_FILE, damaged, parse_settings, read_adapter_config
from modekit.sources.adapter_rules import Change, Rules, peft_plain
from modekit.sources.header import TensorRef, read_header
from modekit.sources.source import ModelSource, no_weights
from modekit.sources.towers import naming_of

WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterSource(ModelSource):
    """An adapter on disk and what it does to one base model. `tensors` and `config` are the adapter's own.

    Replacing comes first: a tensor in both `replaced` and `changes` is the replacement with the change on top.

    Attributes:
        changes: name of a 2-D weight of the base -> change.
        bias_changes: name of a bias of the base -> the change that holds lora_bias or IA3's scaling of it.
        replaced: name of a tensor of the base -> the whole tensor that takes its place.
        notes: what a user may want to know.
    """

    changes: Mapping[str, Change] = field(default_factory=dict, compare=False)
    bias_changes: Mapping[str, Change] = field(default_factory=dict, compare=False)
    replaced: Mapping[str, TensorRef] = field(default_factory=dict, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (folder / CONFIG_FILE).exists()


def open_adapter(label: str, spec: str, folder: Path, base: ModelSource, *, revision: str | None = None) -> AdapterSource:
    """Read an adapter folder as changes of a base model. Only headers are read.

    Raises SourceError when the adapter is damaged or contradicts itself, MismatchError when it is not for this base, and
    UnsupportedError when it does what no plain weight of the base can say.
    """
    where = f"{label} ({spec})"
    config = read_adapter_config(folder, where=where)  # before the weights, so that another kind of folder is named first
    parse_settings(config, where=where)
    if not (folder / WEIGHTS_FILE).exists():
        raise no_weights([path.name for path in folder.iterdir()], where=where)
    tensors = read_header(folder / WEIGHTS_FILE, where=where)
    naming = naming_of((peft_plain(name) for name in tensors), where=where)
    rules = Rules(where, parse_settings(config, where=where, naming=naming), base, tensors, naming)
    changes, replaced, notes = rules.changes(), rules.replaced(), tuple(rules.notes())
    if not changes and not replaced:
        raise damaged("the adapter changes nothing", where, f"no tensor in {WEIGHTS_FILE}")
    bias_changes, beside = rules.bias_changes(changes), rules.beside
    return AdapterSource(label, spec, folder, revision, config, tensors, changes, bias_changes, replaced, notes, beside=beside)
