"""An expert's low-rank parts cut out of a mixture: the rows of A and columns of B that are its own, bit for bit.

Shape legend: O outputs, I inputs, R rank of the expert in a module, N experts with a bias of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.experts.own_files import places_of
from modekit.experts.peft_folder import ModuleChange, PeftTensor, lora_config, peft_name
from modekit.recipes.paths import locate
from modekit.sources.contents import OpenFiles
from modekit.sources.header import ITEMSIZE
from modekit.sources.model import TensorRef
from modekit.weights.numeric import as_array


def adapter_config_of(checkpoint: Checkpoint, expert: int, known: Mapping[str, object]) -> dict[str, object]:
    """adapter_config.json of what the mixture has of an expert; `known` is the config of its own folder, or empty."""
    places = places_of(checkpoint, expert)
    changes = {module: ModuleChange(place.ranks[expert], place.scales[expert]) for module, place in places.items()}
    biased = any(expert in place.biased for place in places.values())
    revision = {"revision": checkpoint.record.recipe.revision}
    return lora_config(_base_model(checkpoint), changes, lora_bias=biased, known={**known, **revision})


def adapter_tensors_of(checkpoint: Checkpoint, expert: int, opened: OpenFiles) -> Iterator[PeftTensor]:
    """A (R, I), B (O, R) and, where it has one, the bias (O,) of every module."""
    for module, place in sorted(places_of(checkpoint, expert).items()):
        start, rank = sum(place.ranks[:expert]), place.ranks[expert]
        own = slice(start, start + rank)
        a, b = (checkpoint.tensors[f"{module}.lora_{side}"] for side in "AB")
        yield _tensor(peft_name(module, "lora_A.weight"), a, (own, slice(None)), (rank, a.shape[1]), opened)
        yield _tensor(peft_name(module, "lora_B.weight"), b, (slice(None), own), (b.shape[0], rank), opened)
        if expert in place.biased:
            bias = checkpoint.tensors[f"{module}.lora_bias"]
            row = (place.biased.index(expert), slice(None))
            yield _tensor(peft_name(module, "lora_B.bias"), bias, row, (bias.shape[1],), opened)


_Index = tuple[slice | int, slice]


def _tensor(name: str, ref: TensorRef, index: _Index, shape: tuple[int, ...], opened: OpenFiles) -> PeftTensor:
    nbytes = int(np.prod(shape)) * ITEMSIZE[ref.dtype]
    return PeftTensor(name, ref.dtype, shape, nbytes, partial(_read, ref, index, opened))


def _read(ref: TensorRef, index: _Index, opened: OpenFiles) -> memoryview:
    part = np.ascontiguousarray(as_array(opened.read(ref), ref.dtype).reshape(ref.shape)[index])
    view: memoryview = part.view(np.uint8).reshape(-1).data
    return view


def _base_model(checkpoint: Checkpoint) -> str:
    """Where PEFT finds the base model, whatever folder it is called from: a hub id, or the folder itself."""
    recipe = checkpoint.record.recipe
    folder = locate(recipe.base_model, checkpoint.recipe_root)
    return recipe.base_model if folder is None else str(folder.resolve())
