"""A mixture of adapters as GGUF files for llama.cpp: `modekit export OUT FOLDER --gguf`.

FOLDER/<base>-<outtype>.gguf    the backbone, which is the base model
FOLDER/<expert>.lora.gguf       what an expert changes of it
FOLDER/export.json              what they were made of and with, what to know of them, and the proofs

The folder appears when all are proven: the backbone alone, and the backbone with each adapter, against the mixture in
transformers that always takes this expert.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.pairs import refuse_pairs
from modekit.engines.adapters import Adapter, chosen_adapters
from modekit.engines.converter import Conversion, check_installed, guessed_pre_tokenizer
from modekit.engines.gguf import GgufFile, Made, convert_into, made_of, staged_export, write_record
from modekit.engines.proof import in_both
from modekit.engines.proof_result import EXACT, Proof
from modekit.engines.proof_texts import texts_of
from modekit.engines.registry import SMALL, GgufSettings
from modekit.files.output import Replace
from modekit.loaded.modekit import flow_of
from modekit.recipes.paths import name_of
from modekit.recipes.strict import BASE
from modekit.run import QUIET, Run


def export_adapters_gguf(
    checkpoint: Checkpoint,
    out: Path,
    settings: GgufSettings,
    *,
    experts: Sequence[str] | None = None,
    replace: Replace = "nothing",
    run: Run = QUIET,
) -> list[GgufFile]:
    """Write a folder with the backbone and adapters as GGUF, proven in llama.cpp; returns the backbone's file and theirs.

    `experts`: those that are written; None: all. Raises UnsupportedError, before anything is written, when one of them has no
    such form; EngineError when one cannot be converted, or is another model there; OutputError.
    """
    refuse_pairs(checkpoint, "llama.cpp does not run the mixture", option="--gguf")
    adapters = chosen_adapters(checkpoint, experts)
    check_installed()
    made: Made = {**made_of(checkpoint, settings), "experts": [adapter.name for adapter in adapters]}
    names = [_base_file(checkpoint, made["outtype"]), *map(_file_of, adapters)]
    with staged_export(checkpoint, out, made, replace, run) as stage:
        files, guess = [stage.folder / name for name in names], guessed_pre_tokenizer(checkpoint.folder)
        theirs = [(adapter.expert, name) for adapter, name in zip(adapters, names[1:], strict=True)]
        how = Conversion(made["outtype"], settings.pre_tokenizer, guess, adapters=theirs, name=_base_name(checkpoint))
        convert_into(stage, checkpoint, names[0], how, run)
        base, *proofs = prove_adapters(
            checkpoint, files, adapters, GgufSettings(made["outtype"], accept=settings.accept), run=run
        )
        written = [GgufFile(out / files[0].name, base, (*_notes(checkpoint), *base.notes))]
        for adapter, proof in zip(adapters, proofs, strict=True):
            written.append(
                GgufFile(out / _file_of(adapter), proof, (*_notes_of(adapter, checkpoint), *proof.notes), adapter.name)
            )
        said = [each.as_data() for each in written]
        write_record(stage, made, {"base": said[0], "adapters": said[1:]})
    return written


def prove_adapters(
    checkpoint: Checkpoint, files: Sequence[Path], adapters: Sequence[Adapter], settings: GgufSettings, *, run: Run = QUIET
) -> list[Proof]:
    """Compare the backbone's file, the first, and each adapter's on it with the mixture in transformers; in this order.

    Raises EngineError where one is another model, or lost too much.
    """
    outtype, texts = str(settings.outtype), texts_of(checkpoint)
    with in_both(checkpoint.folder, files[0], adapters=files[1:], run=run) as both:
        both.model.use_expert(adapters[0].name)
        with _without_changes(both.model):
            of_base = both.proof(files[0], outtype, texts=texts, run=run)
        proofs = [of_base.beside(of_base if outtype in SMALL else None).judged(files[0], accept=settings.accept)]
        told_once = dataclasses.replace(both, notes=())
        for place, (adapter, file) in enumerate(zip(adapters, files[1:], strict=True)):
            both.model.use_expert(adapter.name)
            both.llama.use_adapter(place)
            proof = told_once.proof(file, outtype, texts=texts, run=run).beside(None if outtype == EXACT else of_base)
            proofs.append(proof.judged(file, accept=settings.accept))
    return proofs


@contextmanager
@torch.no_grad()
def _without_changes(model: PreTrainedModel) -> Iterator[None]:
    """While open, low-rank changes are zero: a mixture that takes an expert which is nothing else is its backbone alone."""
    kept = [(mixed.lora_B, mixed.lora_B.clone()) for mixed in flow_of(model).mixed.values() if any(mixed.ranks)]
    try:
        for changes, _ in kept:
            changes.zero_()
        yield
    finally:
        for changes, values in kept:
            changes.copy_(values)


def _base_name(checkpoint: Checkpoint) -> str:
    """Of the base model: its folder's, or the last part of its hub id; the mixture's where that folder is gone and has none."""
    name = Path(name_of(checkpoint.record.recipe.base_model, checkpoint.recipe_root)).name
    return name if name.strip(".") else checkpoint.folder.name


def _base_file(checkpoint: Checkpoint, outtype: str) -> str:
    return f"{_base_name(checkpoint)}-{outtype}.gguf"


def _file_of(adapter: Adapter) -> str:
    return f"{adapter.name}.lora.gguf"


def _notes(checkpoint: Checkpoint) -> Iterator[str]:
    """What to know of the backbone's file."""
    if checkpoint.record.recipe.mixture.backbone != BASE:
        yield "it is the mixture's merged backbone (mixture.backbone) and not the base model; the adapters belong to it"
    window = checkpoint.record.dense_config.get("sliding_window")
    if window:
        yield f"texts longer than the model's window of {window:,} tokens were not compared; start llama.cpp with --swa-full"


def _notes_of(adapter: Adapter, checkpoint: Checkpoint) -> Iterator[str]:
    """What to know of an adapter's file."""
    if adapter.folded:
        yield f"the scale of {len(adapter.folded)} of {len(adapter.changes)} modules is folded into B: a file has one alpha"
    mixture = checkpoint.record.recipe.mixture
    if isinstance(mixture.modules, list) or mixture.layers is not None:
        yield "only what the mixture mixes is in it (mixture.modules, mixture.layers)"
