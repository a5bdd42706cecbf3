"""A full fine-tune as a LoRA adapter over its base: `modekit extract MODEL OUT --base BASE --rank 16`.

    MODEL - BASE, one linear weight of the decoder layers at a time (differences.py)
        -> the best factors B A (weights/factorise.py)
        -> OUT/adapter_config.json, adapter_model.safetensors    an ordinary PEFT folder, scale 1 everywhere
           OUT/extract.json                                      what was kept per tensor, and what an adapter cannot carry
           OUT/trained-on.txt                                    copied from MODEL, so that its text is never scored

All of it without torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from modekit.experts.differences import TensorDifference, check_differs, chosen_of, compare, linears_of, shared_names
from modekit.experts.extract_record import RECORD_FILE, AdaptedWeight, Extraction, extraction_of
from modekit.experts.peft_folder import ModuleChange, PeftTensor, lora_config, peft_name, write_lora
from modekit.files.output import refuse_existing, replaced_by
from modekit.files.staging import staging
from modekit.files.write import copy_file, write_json
from modekit.run import QUIET, Run
from modekit.sources.contents import OpenFiles
from modekit.sources.source import open_source
from modekit.text.splits import TRAINED_FILE
from modekit.weights.factorise import factorise
from modekit.weights.numeric import read_float32, to_bytes


@dataclass(frozen=True)
class ExtractSettings:
    """What the adapter holds.

    Attributes:
        rank: of every module, 1 or more.
        modules: only these, by the end of their name (q_proj, mlp.down_proj).
        base_name: what the adapter calls its base; the folder by default.
    """

    rank: int = 16
    modules: Sequence[str] | None = None
    base_name: str | None = None


def extract(
    model: Path, base: Path, out: Path, settings: ExtractSettings, *, overwrite: bool = False, run: Run = QUIET
) -> Extraction:
    """Write the adapter whose sum with `base` comes closest to `model`, in float32; returns what extract.json says.

    Every linear weight of the decoder layers that differs gets factors. Memory: the adapter, and one weight's difference with a
    few copies. Raises SourceError, MismatchError (another architecture, or nothing to extract), UnsupportedError (experts in a
    mixture), OutputError, and ModekitError for modules that there are not.
    """
    replace = replaced_by(overwrite)
    refuse_existing(out, replace, sources=(model, base))
    tuned = open_source("MODEL", str(model), model, run=run)
    origin = open_source("BASE", str(base), base, run=run)
    names = shared_names(tuned, origin)
    with OpenFiles() as opened:
        differences = [compare(tuned, origin, name, opened) for name in run.over("compare", names, len(names))]
        linears = linears_of(differences)
        chosen = [each for each in chosen_of(linears, settings.modules) if each.squared_delta]
        check_differs(chosen, differences)
        adapted = []
        for each in run.over("factorise", chosen, len(chosen)):
            delta_OI = read_float32(opened, each.tuned) - read_float32(opened, each.base)
            adapted.append(AdaptedWeight(each, factorise(delta_OI, rank=settings.rank)))
    name = settings.base_name or base.name
    record = extraction_of(model.name, name, adapted, differences, [each.name for each in linears])
    run.begin("write")
    # alpha equals the rank in every module, so that every scale is exactly 1
    changes = {entry.difference.module: ModuleChange(len(entry.factors.a), 1.0) for entry in adapted}
    config = lora_config(
        settings.base_name or str(base),
        changes,
        targets=_targets(adapted, linears),
        has_encoder=bool(origin.config.get("is_encoder_decoder")),
    )
    with staging(out, _digest_of(record, adapted), "adapter", sources=(model, base), replace=replace, sync=run.sync) as stage:
        write_lora(stage, config, [tensor for entry in adapted for tensor in _tensors(entry)])
        if (model / TRAINED_FILE).exists():
            copy_file(model / TRAINED_FILE, stage.folder / TRAINED_FILE)
        write_json(stage.folder / RECORD_FILE, record.model_dump(mode="json"))
    return record


def _digest_of(record: Extraction, adapted: Sequence[AdaptedWeight]) -> str:
    """Of an adapter with its factors, so that a killed write goes on only with equal ones."""
    digest = hashlib.sha256(record.model_dump_json().encode())
    for factor in (factor for entry in adapted for factor in (entry.factors.a, entry.factors.b)):
        digest.update(to_bytes(factor, "F32"))
    return f"extract {digest.hexdigest()}"


def _tensors(entry: AdaptedWeight) -> Iterator[PeftTensor]:
    for side, array in (("A", entry.factors.a), ("B", entry.factors.b)):
        name = peft_name(entry.difference.module, f"lora_{side}.weight")
        yield PeftTensor(name, "F32", array.shape, array.nbytes, partial(to_bytes, array, "F32"))


def _targets(adapted: Sequence[AdaptedWeight], linears: Sequence[TensorDifference]) -> list[str]:
    """Kinds of module where each is adapted in every layer that has it, else full names: peft adapts all that match."""
    modules = [entry.difference.module for entry in adapted]
    left_out = {each.module for each in linears}.difference(modules)
    kinds = {module.rsplit(".", 1)[1] for module in modules}
    return modules if kinds & {module.rsplit(".", 1)[1] for module in left_out} else sorted(kinds)
