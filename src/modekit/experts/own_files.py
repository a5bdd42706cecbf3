"""Whether an adapter's own folder still holds what a mixture was built from, so that it can be given back as it came.

The weights are known by the blake3 in modekit.json. adapter_config.json is not, so it is read again and must say the same
rules: rank and scale of what is kept low-rank, and the weights of what was folded into whole modules (DoRA, IA3, biases).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.errors import ModekitError
from modekit.planning.mixture_config import Place
from modekit.planning.pieces import piece_of
from modekit.planning.plan import Piece
from modekit.run import Run
from modekit.sources.adapter import AdapterSource, LowRank, open_adapter
from modekit.sources.contents import OpenFiles, blake3_of
from modekit.sources.model import ModelSource, TensorRef, open_source
from modekit.weights.folding import Folded, folded_bias, reader
from modekit.weights.numeric import BLOCK, as_array, to_bytes, to_float32
from modekit.weights.stored import Stored

TRAINED = "it was trained on in the mixture (modekit train)"
_ALIKE = 0.01
"""Largest difference of two folds, as a share of the change: they are float64 sums rounded once, so more is another rule."""


@dataclass(frozen=True)
class OwnFiles:
    """An adapter's folder and its config as they are now; `problem` says why they are not what the mixture was built from."""

    folder: Path
    config: Mapping[str, object] = field(default_factory=dict)
    problem: str | None = None


def places_of(checkpoint: Checkpoint, expert: int) -> dict[str, Place]:
    """Module -> its place, where an expert has something of its own."""
    return {module: place for module, place in checkpoint.shape.mixture.places.items() if place.has(expert)}


def is_trained(checkpoint: Checkpoint, expert: int) -> bool:
    """Whether `modekit train` moved a part of an expert since the build."""
    for module, place in places_of(checkpoint, expert).items():
        own = f"{module}.experts.{place.own.index(expert)}." if expert in place.own else f"{module}.lora_"
        if any(name.startswith(own) for name in checkpoint.record.trained):
            return True
    return False


def own_files(checkpoint: Checkpoint, expert: int) -> OwnFiles:
    """Look at the folder of an adapter expert. Reads its weights once; raises nothing, a problem is part of the answer."""
    record = checkpoint.record.sources[checkpoint.record.expert_sources[expert]]
    folder = (checkpoint.folder / record.folder).resolve()
    try:
        for name, expected in record.files.items():
            file = folder / name
            if not file.is_file():
                return OwnFiles(folder, problem=f"its own folder is gone ({folder})")
            if file.stat().st_size != expected.size or blake3_of(file) != expected.blake3:
                return OwnFiles(folder, problem=f"{name} in its own folder has changed since the build")
        base, source = _opened(checkpoint, expert, folder)
        return OwnFiles(folder, source.config, _problem(checkpoint, expert, base, source))
    except ModekitError as error:
        return OwnFiles(folder, problem=f"its own folder cannot be read any more ({error.what})")


def _opened(checkpoint: Checkpoint, expert: int, folder: Path) -> tuple[ModelSource, AdapterSource]:
    recipe, base = checkpoint.record.recipe, checkpoint.record.sources[0]
    # Headers alone are read: no code of the model's runs, whatever it brings.
    model = open_source(base.label, base.spec, (checkpoint.folder / base.folder).resolve(), run=Run(trust_remote_code=True))
    return model, open_adapter(f"experts[{expert}]", str(recipe.experts[expert].adapter), folder, model)


def _problem(checkpoint: Checkpoint, expert: int, base: ModelSource, source: AdapterSource) -> str | None:
    if is_trained(checkpoint, expert):
        return TRAINED
    places = places_of(checkpoint, expert)
    changed = {*source.changes, *source.bias_changes, *source.replaced}
    outside = [name for name in changed if not any(name.startswith(f"{module}.") for module in places)]
    if outside:
        return f"only a part of it is mixed: {len(outside)} of the {len(changed)} tensors that it changes are not"
    with OpenFiles() as opened:
        same = all(_is_as_built(checkpoint, expert, module, (base, source), opened) for module in places)
    return None if same else "adapter_config.json in its own folder has changed since the build"


def _is_as_built(
    checkpoint: Checkpoint, expert: int, module: str, sources: tuple[ModelSource, AdapterSource], opened: OpenFiles
) -> bool:
    """Whether the adapter's rules give what the mixture has at a place."""
    place = checkpoint.shape.mixture.places[module]
    if place.ranks[expert]:
        change = sources[1].changes.get(f"{module}.weight")
        if not isinstance(change, LowRank) or change.magnitude is not None:
            return False
        return (change.rank, change.scale) == (place.ranks[expert], place.scales[expert])
    prefix = f"{module}.experts.{place.own.index(expert)}."
    pieces = [(name, piece_of(sources, 1, ref)) for name, ref in sources[0].tensors.items() if name.startswith(f"{module}.")]
    return all(
        _is_folded(checkpoint.tensors[prefix + name.removeprefix(f"{module}.")], piece, opened)
        for name, piece in pieces
        if piece.change is not None
    )


_Single = npt.NDArray[np.float32]


def _is_folded(ref: TensorRef, piece: Piece, opened: OpenFiles) -> bool:
    """Whether a tensor of the mixture is what the adapter is folded into, rounded as it was."""
    found = to_float32(Stored(opened, ref)[:BLOCK])
    folded, before = _fold(piece, opened)
    rounded = to_float32(as_array(to_bytes(folded, ref.dtype), ref.dtype))
    return bool(np.linalg.norm(found - rounded) <= _ALIKE * np.linalg.norm(rounded - before))


def _fold(piece: Piece, opened: OpenFiles) -> tuple[_Single, _Single]:
    """The first block of a folded tensor, and of the tensor that it was folded into."""
    change, ref, read = piece.change, piece.ref, reader(opened)
    assert change is not None
    if piece.of_bias:
        return folded_bias(change, read(ref), read), to_float32(read(ref))
    plain = Stored(opened, ref)
    return Folded(change, plain, (ref.shape[0], ref.shape[1]), read)[:BLOCK], to_float32(plain[:BLOCK])
