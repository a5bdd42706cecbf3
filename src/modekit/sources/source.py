"""Model folders read by config and header."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from modekit.errors import MismatchError, SourceError
from modekit.files.read import UNREADABLE, read_json
from modekit.run import QUIET, Run
from modekit.sources.config import Config, damaged_model
from modekit.sources.contents import read_header
from modekit.sources.header import FileState, TensorRef
from modekit.sources.quantised import unpack
from modekit.sources.remote_code import check_no_code
from modekit.sources.towers import unwrapped
from modekit.sources.weight_files import refuse_other_kinds, weight_files

SPECIALIST_FILE = "specialist.json"
"""Beside a model that `modekit specialize` made: what it trained."""


@dataclass(frozen=True)
class ModelSource:
    """A dense model on disk; of one that wraps a language model, that alone.

    `label` is what messages call it (base_model, experts[2] 'law'); `spec` is what the recipe says. `wrapper` is
    config.json as it stands where the files are a wrapper's, or name the language model as a wrapper does; `beside` are tensors
    that are no part of the language model, such as those of a vision tower. `on_disk` is its config where `config` has more
    tokens (vocabulary.py). `packed` says in what its weights are quantised: 4 bits (bitsandbytes); empty where they are not.
    """

    label: str
    spec: str
    folder: Path
    revision: str | None
    config: Config = field(compare=False)
    tensors: Mapping[str, TensorRef] = field(compare=False)
    wrapper: Config | None = field(default=None, compare=False, kw_only=True)
    beside: Mapping[str, TensorRef] = field(default_factory=dict, compare=False, kw_only=True)
    on_disk: Config | None = field(default=None, compare=False, kw_only=True)
    packed: str = field(default="", compare=False, kw_only=True)

    @property
    def where(self) -> str:
        """What messages call it, with what the recipe says."""
        return f"{self.label} ({self.spec})"

    @property
    def parameters(self) -> int:
        """Numbers in its tensors."""
        return sum(ref.numel for ref in self.tensors.values())

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """Weight files in name order."""
        return tuple(sorted(self.states))

    @cached_property
    def states(self) -> dict[Path, FileState | None]:
        """Every weight file, and its state when its header was read."""
        return {part.file: part.state for ref in (*self.tensors.values(), *self.beside.values()) for part in ref.parts}

    def tensor(self, name: str) -> TensorRef:
        """A tensor by name. Raises SourceError when it is missing."""
        try:
            return self.tensors[name]
        except KeyError:
            raise SourceError(
                "tensor is missing",
                where=f"{self.label}: {name}",
                found=f"{len(self.tensors)} other tensors in {self.spec}",
                remedy="check that the download is complete and the model is of the base model's family",
            ) from None

    def matching(self, ref: TensorRef) -> TensorRef:
        """Its tensor for one of the base model's. Raises SourceError without one, MismatchError when it has another shape."""
        other = self.tensor(ref.name)
        if other.shape != ref.shape:
            raise MismatchError(
                "the expert's tensor has another shape than the base model's",
                where=f"{self.where}: {ref.name}",
                found=list(other.shape),
                expected=list(ref.shape),
                remedy="use an expert fine-tuned from this base model",
            )
        return other


def open_source(label: str, spec: str, folder: Path, *, revision: str | None = None, run: Run = QUIET) -> ModelSource:
    """Read config and headers of a model folder.

    Raises SourceError: missing folder or weights, pickle checkpoints, an adapter, custom code without the flag, damage.
    """
    where = f"{label} ({spec})"
    config = read_config(folder, where=where)
    files = weight_files(folder, where=where)
    tensors = dict[str, TensorRef]()
    check_no_code(config, where=where, run=run)
    for file in files:
        tensors |= read_header(file, where=where)
    packing = config.pop("quantization_config", None)
    packed = ""
    if packing:
        tensors, packed = unpack(packing, config, tensors, where=where)
    if (folder / "adapter_config.json").exists():  # transformers would take it into the model, modekit would not
        raise SourceError(
            "the folder holds both a model and an adapter",
            where=where,
            found="adapter_config.json",
            remedy="take the adapter's files into a folder of their own",
        )
    return unwrapped(ModelSource(label, spec, folder, revision, config, tensors, packed=packed))


def read_config(folder: Path, *, where: str) -> dict[str, object]:
    """A model's config.json as data, by its folder or the file. Raises SourceError when it is missing or no JSON."""
    try:
        config = read_json(folder if folder.is_file() else folder / "config.json")
    except FileNotFoundError:
        refuse_other_kinds([path.name for path in folder.glob("*")], where=where)
        raise SourceError("config.json is missing", where=where, remedy="give a transformers model folder") from None
    except UNREADABLE as error:
        raise damaged_model("config.json cannot be read", where, error) from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise SourceError("config.json names no model_type", where=where, remedy="give a transformers model folder")
    return config
