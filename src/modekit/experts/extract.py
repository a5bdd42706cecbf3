"""A full fine-tune as a LoRA adapter over its base: `modekit extract MODEL OUT --base BASE --rank 16`.

    MODEL - BASE, one linear weight of the decoder layers at a time (differences.py)
        -> the best factors B A (weights/factorise.py)
        -> OUT/adapter_config.json, adapter_model.safetensors    an ordinary PEFT folder, scale 1 everywhere
           OUT/extract.json                                      what was kept, and what an adapter cannot carry
           OUT/trained-on.txt                                    copied from MODEL, so that its text is never scored

All of it without torch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import BaseModel

from modekit.experts.differences import TensorDifference, check_differs, compare, linears_of, shared_names
from modekit.experts.peft_folder import ModuleChange, PeftTensor, lora_config, peft_name, write_lora
from modekit.files.change import refuse_existing
from modekit.files.copies import copy_file
from modekit.files.place import replaced_by
from modekit.files.staging import staging
from modekit.files.write import write_json
from modekit.run import QUIET, Run
from modekit.sources.contents import OpenFiles
from modekit.sources.source import open_source
from modekit.text.splits import TRAINED_FILE
from modekit.weights.factorise import Factors, factorise
from modekit.weights.flat import read_float32
from modekit.weights.numeric import to_bytes

_LITTLE = 0.5  # share of the squared difference below which an adapter is more lost than kept


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
    tuned = open_source("MODEL", str(model), model, run=run)
    origin = open_source("BASE", str(base), base, run=run)
    names = shared_names(tuned, origin)
    with OpenFiles() as opened:
        differences = [compare(tuned, origin, name, opened) for name in run.over("compare", names, len(names))]
        linears = linears_of(differences)
        chosen = [each for each in linears if each.squared_delta]
        check_differs(chosen, differences)
        adapted = []
        for each in run.over("factorise", chosen, len(chosen)):
            delta_OI = read_float32(opened, each.tuned) - read_float32(opened, each.base)
            adapted.append(_Adapted(each, factorise(delta_OI, rank=rank)))
    record = _record(model.name, base_name or base.name, adapted, differences)
    run.begin("write")
    # alpha equals the rank in every module, so that every scale is exactly 1
    changes = {entry.difference.module: ModuleChange(len(entry.factors.a), 1.0) for entry in adapted}
    pair = bool(origin.config.get("is_encoder_decoder"))
    config = lora_config(base_name or str(base), changes, targets=_targets(adapted, linears), has_encoder=pair)
    with staging(out, _digest_of(record, adapted), "adapter", sources=(model, base), replace=replace, sync=run.sync) as stage:
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


def _digest_of(record: Extraction, adapted: Sequence[_Adapted]) -> str:
    """Of an adapter with its factors, so that a killed write goes on only with equal ones."""
    digest = hashlib.sha256(record.model_dump_json().encode())
    for tensor in (tensor for entry in adapted for tensor in entry.tensors()):
        digest.update(tensor.read())
    return f"extract {digest.hexdigest()}"


def _targets(adapted: Sequence[_Adapted], linears: Sequence[TensorDifference]) -> list[str]:
    """Kinds of module where each is adapted in every layer that has it, else full names: peft adapts all that match."""
    modules = [entry.difference.module for entry in adapted]
    left_out = {each.module for each in linears}.difference(modules)
    kinds = {module.rsplit(".", 1)[1] for module in modules}
    return modules if kinds & {module.rsplit(".", 1)[1] for module in left_out} else sorted(kinds)
