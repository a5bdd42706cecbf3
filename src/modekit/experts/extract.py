"""A full fine-tune as a LoRA adapter over its base: `modekit extract MODEL OUT --base BASE --rank 16`.

    MODEL - BASE, one linear weight of the decoder layers at a time
        -> the best factors B A (weights/factorise.py)
        -> OUT/adapter_config.json, adapter_model.safetensors    an ordinary PEFT folder, scale 1 everywhere
           OUT/extract.json                                      what was kept, and what an adapter cannot carry
           OUT/trained-on.txt                                    copied from MODEL, so that its text is never scored

All of it without torch, where the family has a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import BaseModel

from modekit.errors import MismatchError, UnsupportedError, some_of
from modekit.evaluation.inspection.likeness import compare_each
from modekit.experts.peft_folder import ModuleChange, PeftTensor, lora_config, peft_name, write_lora
from modekit.files.change import refuse_existing
from modekit.files.copies import copy_file
from modekit.files.place import replaced_by
from modekit.files.staging import staging
from modekit.files.write import digest_of_data, write_json
from modekit.recipes.layers import order_of, stack_of
from modekit.run import QUIET, Run
from modekit.sources.class_names import named_by_class
from modekit.sources.compatible import check_same_architecture, check_sizes
from modekit.sources.config import is_mixture
from modekit.sources.contents import OpenFiles
from modekit.sources.families import family_of, row_of
from modekit.sources.family import Family
from modekit.sources.header import TensorRef, check_floats
from modekit.sources.names import is_ignored, split_layer
from modekit.sources.source import ModelSource, open_source
from modekit.text.splits import TRAINED_FILE
from modekit.weights.factorise import Factors, factorise
from modekit.weights.flat import read_float32
from modekit.weights.numeric import to_bytes

_LITTLE = 0.5  # share of the squared difference below which an adapter is more lost than kept


@dataclass(frozen=True)
class TensorDifference:
    """One tensor in both models. `squared_delta` and `squared_base` are sums over its elements."""

    name: str
    tuned: TensorRef
    base: TensorRef
    squared_delta: float
    squared_base: float

    @property
    def module(self) -> str:
        """Name without `.weight`."""
        return self.name.removesuffix(".weight")

    @property
    def kind(self) -> str:
        """Name under the layer: self_attn.q_proj; of a model with an encoder with the stack before it: encoder.fc1."""
        layer, path = split_layer(self.module)
        stack = "" if layer is None else stack_of(layer)[0]
        return f"{stack}.{path}" if stack else path

    @property
    def drift(self) -> float | None:
        """|| delta || / || W ||; None when W is zero and the difference is not."""
        if self.squared_base == 0:
            return None if self.squared_delta else 0.0
        return math.sqrt(self.squared_delta / self.squared_base)


def shared_names(tuned: ModelSource, origin: ModelSource, family: Family) -> list[str]:
    """Tensors of both models in the base's order.

    Raises SourceError, MismatchError or UnsupportedError unless both are unquantised models of the base's family.
    """
    for source in (tuned, origin):
        check_floats((ref for name, ref in source.tensors.items() if not is_ignored(name)), where=source.where)
        check_sizes(source, row_of(source.config) or family)
    check_same_architecture(origin, tuned, family)
    names = family.own_names(origin)
    for name in names:
        tuned.matching(origin.tensors[name])
        if ".experts." in name or (is_mixture(origin.config) and len(origin.tensors[name].shape) == 3):
            raise UnsupportedError(
                "the experts of a mixture are no linear layers in memory, so an adapter cannot reach them",
                where=f"{origin.where}: {name}",
                remedy="extract from dense models",
            )
    return names


def differences_of(tuned: ModelSource, origin: ModelSource, family: Family, run: Run) -> list[TensorDifference]:
    """How far every tensor has moved, in the base's order. Raises as `shared_names`, and SourceError for NaN or Inf."""
    names = shared_names(tuned, origin, family)
    found = zip(names, compare_each(origin, [tuned], names, run), strict=True)
    return [
        TensorDifference(name, tuned.tensors[name], origin.tensors[name], float(each.products[0, 0]), each.base)
        for name, each in found
    ]


def linears_of(differences: Sequence[TensorDifference], family: Family) -> list[TensorDifference]:
    """The linear weights of the decoder layers, by layer and name."""
    found = []
    for each in differences:
        layer, path = split_layer(each.module)
        parts = [path] if family.derived is None else family.derived.parts
        is_linear = path in parts and "norm" not in path and not family.looks_up(each.module)
        if layer is not None and is_linear and each.name != each.module and len(each.base.shape) == 2:
            found.append((layer, path, each))
    return [each for _, _, each in sorted(found, key=lambda entry: (order_of(entry[0]), entry[1]))]


def check_differs(chosen: Sequence[TensorDifference], differences: Sequence[TensorDifference]) -> None:
    """Raise MismatchError when an adapter would be empty."""
    if not chosen:
        moved = [each.name for each in differences if each.squared_delta]
        raise MismatchError(
            "no linear weight that could be adapted differs" if moved else "the model is its base: no tensor differs",
            where="MODEL, BASE",
            found=f"only {some_of(moved)}" if moved else None,
            remedy="use the full model: an adapter would be empty" if moved else "give the fine-tuned model as MODEL",
        )


@dataclass(frozen=True)
class _Adapted:
    """A module's difference and its factors."""

    difference: TensorDifference
    factors: Factors

    def tensors(self) -> Iterator[PeftTensor]:
        """Both factors as PEFT has them."""
        for side, array in (("A", self.factors.a), ("B", self.factors.b)):
            name = peft_name(self.difference.module, f"lora_{side}.weight")
            yield PeftTensor(name, "F32", array.shape, array.nbytes, partial(to_bytes, array, "F32"))


class AdaptedRow(BaseModel, frozen=True):
    """Of several weights together.

    Attributes:
        modules: how many.
        rank: the largest.
        error: || delta - B A || / || delta ||.
        drift: || delta || / || W ||; None where the base is zero.
    """

    modules: int
    rank: int
    error: float
    drift: float | None

    @classmethod
    def of(cls, adapted: Sequence[_Adapted]) -> AdaptedRow:
        """Of these."""
        delta = sum(entry.difference.squared_delta for entry in adapted)
        base = sum(entry.difference.squared_base for entry in adapted)
        missed = sum(entry.difference.squared_delta * entry.factors.error**2 for entry in adapted)
        return cls(
            modules=len(adapted),
            rank=max(len(entry.factors.a) for entry in adapted),
            error=math.sqrt(missed / delta),
            drift=math.sqrt(delta / base) if base else None,
        )


class Extraction(BaseModel, frozen=True):
    """The content of extract.json.

    Attributes:
        kinds: by kind of module, over all layers.
        all: of the whole adapter; `bytes` is its size.
        carried: share of the squared difference of all tensors that the adapter holds.
        not_carried: everything else that differs, with its drift (None where the base is zero).
    """

    model: str
    base_model: str
    kinds: dict[str, AdaptedRow]
    all: AdaptedRow
    bytes: int
    carried: float
    not_carried: dict[str, float | None]

    def notes(self) -> list[str]:
        """Says so where an adapter keeps little, and why."""
        if self.carried >= _LITTLE:
            return []
        kept = 1 - self.all.error**2
        small = f"rank {self.all.rank} is too small for its matrices ({kept:.0%} of them kept): raise --rank"
        why = small if kept < _LITTLE else "much of the difference is in tensors that it does not hold: use the full model"
        return [f"the adapter keeps {self.carried:.0%} of the model's squared difference: more is lost than kept", why]


def extract(
    model: Path,
    base: Path,
    out: Path,
    *,
    rank: int = 16,
    base_name: str | None = None,
    overwrite: bool = False,
    run: Run = QUIET,
) -> Extraction:
    """Write the adapter whose sum with `base` comes closest to `model`, in float32; returns what extract.json says.

    Every linear weight of the decoder layers that differs gets factors of at most that rank. `base_name`: what the adapter
    calls its base; the folder by default. Memory: the adapter, and one weight's difference with a few copies. Raises
    SourceError, MismatchError (another architecture, or nothing to extract), UnsupportedError (experts in a mixture) and
    OutputError.
    """
    replace = replaced_by(overwrite)
    refuse_existing(out, replace, sources=(model, base))
    tuned = named_by_class(open_source("MODEL", str(model), model, run=run))
    origin = named_by_class(open_source("BASE", str(base), base, run=run))
    family = family_of(origin.config, where=origin.where)
    differences = differences_of(tuned, origin, family, run)
    chosen = [each for each in linears_of(differences, family) if each.squared_delta]
    check_differs(chosen, differences)
    adapted = []
    with OpenFiles() as opened:
        for each in run.over("factorise", chosen, len(chosen)):
            delta = read_float32(opened, each.tuned) - read_float32(opened, each.base)
            adapted.append(_Adapted(each, factorise(delta.T if family.keeps_columns(each.module) else delta, rank=rank)))
    record = _record(model.name, base_name or base.name, adapted, differences)
    run.begin("write")
    # alpha equals the rank in every module, so that every scale is exactly 1
    changes = {entry.difference.module: ModuleChange(len(entry.factors.a), 1.0) for entry in adapted}
    pair = bool(origin.config.get("is_encoder_decoder"))
    config = lora_config(base_name or str(base), changes, {}, has_encoder=pair)
    made_by = f"extract {digest_of_data(record.model_dump(mode='json'))}"  # whose errors have all their digits
    with staging(out, made_by, "adapter", sources=(model, base), replace=replace, sync=run.sync) as stage:
        write_lora(stage, config, [tensor for entry in adapted for tensor in entry.tensors()])
        if (model / TRAINED_FILE).exists():
            copy_file(model / TRAINED_FILE, stage.folder / TRAINED_FILE)
        write_json(stage.folder / "extract.json", record.model_dump(mode="json"))
    return record


def _record(model: str, base: str, adapted: Sequence[_Adapted], differences: Sequence[TensorDifference]) -> Extraction:
    by_kind: dict[str, list[_Adapted]] = {}
    for entry in adapted:
        by_kind.setdefault(entry.difference.kind, []).append(entry)
    together, names = AdaptedRow.of(adapted), {entry.difference.name for entry in adapted}
    moved = sum(each.squared_delta for each in differences)
    return Extraction(
        model=model,
        base_model=base,
        kinds={kind: AdaptedRow.of(entries) for kind, entries in by_kind.items()},
        all=together,
        bytes=sum(entry.factors.a.nbytes + entry.factors.b.nbytes for entry in adapted),
        carried=(1 - together.error**2) * sum(entry.difference.squared_delta for entry in adapted) / moved,
        not_carried={each.name: each.drift for each in differences if each.squared_delta and each.name not in names},
    )
