"""Adapters of a modekit checkpoint back as ordinary PEFT folders, bit for bit: `modekit export OUT FOLDER`.

FOLDER/<expert>/adapter_config.json, adapter_model.safetensors    what PEFT reads
FOLDER/<expert>/export.json                                       where it comes from, and what to know of it
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.staging import Entry, staging, write_all, write_json
from modekit.errors import UnsupportedError
from modekit.planning.mixture_config import Place
from modekit.recipes.paths import locate
from modekit.recipes.strict import BASE
from modekit.sources.adapter import WEIGHTS_FILE
from modekit.sources.model import Mappings, TensorRef
from modekit.weights.numeric import as_array

CONFIG_FILE = "adapter_config.json"
EXPORT_FILE = "export.json"
_PREFIX = "base_model.model."
_Number = TypeVar("_Number", int, float)


def adapter_experts(checkpoint: Checkpoint) -> list[str]:
    """Experts that are adapters alone: low-rank wherever they differ from the base."""
    places = checkpoint.shape.mixture.places.values()
    return [
        name
        for expert, name in enumerate(checkpoint.names)
        if any(place.ranks[expert] for place in places) and not any(expert in place.own for place in places)
    ]


def export_adapter(checkpoint: Checkpoint, name: str, out: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Write one expert as a PEFT LoRA folder that changes the base model as the expert does; returns what export.json says.

    A and B are the tensors of the mixture, bit for bit: those that it was built from, unless the notes say otherwise.
    Raises UnsupportedError when the expert is no adapter, OutputError.
    """
    if name not in adapter_experts(checkpoint):
        raise UnsupportedError(
            "the expert is no adapter that PEFT could hold", where=f"{checkpoint.folder}: expert '{name}'",
            expected=", ".join(adapter_experts(checkpoint)) or "an expert kept low-rank (there is none here)",
            remedy="name one of these, or see `modekit extract` for full models",
        )  # fmt: skip
    expert = checkpoint.names.index(name)
    places = {module: place for module, place in checkpoint.shape.mixture.places.items() if place.ranks[expert]}
    config = _config(checkpoint, expert, places)
    tensors = dict(_tensors(checkpoint, expert, places))
    entries: list[Entry] = [(key, ref.dtype, shape, _nbytes(ref, shape)) for key, (ref, _, shape) in tensors.items()]
    digest = hashlib.sha256(f"{checkpoint.record.recipe_digest} {name}".encode()).hexdigest()
    record = {
        "expert": name, "recipe_digest": checkpoint.record.recipe_digest, "rank": config["r"], "modules": len(places),
        "notes": list(_notes(checkpoint, expert)),
    }  # fmt: skip
    mappings = Mappings()
    parts = list(tensors.values())

    def write(place: int, stream: io.FileIO) -> None:
        ref, (rows, columns), shape = parts[place]
        whole = as_array(mappings.view(ref), ref.dtype).reshape(ref.shape)
        part = np.ascontiguousarray(whole[rows] if len(shape) == 1 else whole[rows, columns])
        write_all(stream, part.view(np.uint8).reshape(-1).data)

    try:
        with staging(out, digest, overwrite=overwrite, marker=EXPORT_FILE) as stage:
            stage.write_shard(WEIGHTS_FILE, entries, write)
            write_json(stage.folder / CONFIG_FILE, config)
            write_json(stage.folder / EXPORT_FILE, record)
    finally:
        mappings.close()
    return record


def _notes(checkpoint: Checkpoint, expert: int) -> Iterator[str]:
    """Where the adapter is not the one that the mixture was built from."""
    recipe = checkpoint.record.recipe
    if recipe.output.dtype != "source":
        yield f"the mixture holds its tensors in {recipe.output.dtype} (output.dtype)"
    mine = {f"{module}.lora_A" for module, place in checkpoint.shape.mixture.places.items() if place.ranks[expert]}
    if mine & checkpoint.record.trained.keys():
        yield "it was trained on in the mixture (modekit train)"
    if recipe.mixture.modules not in ("auto", "all") or recipe.mixture.layers is not None:
        yield "only what the mixture mixes is here (mixture.modules, mixture.layers); the rest of the adapter is not in it"
    if recipe.mixture.backbone != BASE:
        yield "the adapter changes the base model; in the mixture it stands on a merged backbone (mixture.backbone)"
    if recipe.experts[expert].lora_rank is not None:
        yield "a low-rank part of a full model's difference to the base (as: lora)"


def _base_model(checkpoint: Checkpoint) -> str:
    """Where PEFT finds the base model, whatever folder it is called from: a hub id, or the folder itself."""
    recipe = checkpoint.record.recipe
    folder = locate(recipe.base_model, checkpoint.recipe_root)
    return recipe.base_model if folder is None else str(folder.resolve())


def _config(checkpoint: Checkpoint, expert: int, places: dict[str, Place]) -> dict[str, Any]:
    """adapter_config.json with one rank and alpha for most modules and patterns for the others."""
    ranks = {module: place.ranks[expert] for module, place in places.items()}
    alphas = {module: place.scales[expert] * place.ranks[expert] for module, place in places.items()}
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": _base_model(checkpoint),
        "revision": checkpoint.record.recipe.revision,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": alpha,
        "lora_bias": any(expert in place.biased for place in places.values()),
        "lora_dropout": 0.0,
        "r": rank,
        "target_modules": sorted(places),
        "rank_pattern": {module: each for module, each in sorted(ranks.items()) if each != rank},
        "alpha_pattern": {module: each for module, each in sorted(alphas.items()) if each != alpha},
    }


def _most_common(values: Iterable[_Number]) -> _Number:
    """The value that most have; of several the smallest."""
    counts = Counter(values)
    return max(sorted(counts), key=counts.__getitem__)


_Part = tuple[TensorRef, tuple[Any, Any], tuple[int, ...]]


def _tensors(checkpoint: Checkpoint, expert: int, places: dict[str, Place]) -> Iterator[tuple[str, _Part]]:
    """PEFT's name -> (tensor of the checkpoint, (rows, columns) of it, shape)."""
    everything = slice(None)
    for module, place in sorted(places.items()):
        start = sum(place.ranks[:expert])
        ranks = slice(start, start + place.ranks[expert])
        rank = place.ranks[expert]
        a, b = (checkpoint.tensors[f"{module}.lora_{side}"] for side in "AB")
        yield f"{_PREFIX}{module}.lora_A.weight", (a, (ranks, everything), (rank, a.shape[1]))
        yield f"{_PREFIX}{module}.lora_B.weight", (b, (everything, ranks), (b.shape[0], rank))
        biased = place.biased
        if expert in biased:
            bias = checkpoint.tensors[f"{module}.lora_bias"]
            yield f"{_PREFIX}{module}.lora_B.bias", (bias, (biased.index(expert), everything), (bias.shape[1],))


def _nbytes(ref: TensorRef, shape: tuple[int, ...]) -> int:
    return int(np.prod(shape)) * (ref.nbytes // max(1, ref.numel))
