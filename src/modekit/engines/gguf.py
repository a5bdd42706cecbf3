"""A mixture as GGUF for llama.cpp and what is built on it: `modekit export OUT FOLDER --gguf`.

    of a native mixture     FOLDER/<OUT>-<outtype>.gguf     all of it
    of adapters             FOLDER/<base>-<outtype>.gguf    the backbone, which is the base model
                            FOLDER/<expert>.lora.gguf       what an expert changes of it
    FOLDER/Modelfile        how Ollama runs it; of an adapter FOLDER/<expert>.Modelfile
    FOLDER/export.json      what it was made of and with, what to know of it, and the proof that llama.cpp computes the same

The folder appears when all is proven, so that no file is ever there that was not compared with transformers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TypedDict

import torch
from transformers import PreTrainedModel

from modekit.checkpoint.checkpoint import Checkpoint, refuse_pairs
from modekit.engines.adapters import Adapter, chosen_adapters
from modekit.engines.converter import CONVERTER, Conversion, check_installed, convert, guessed_pre_tokenizer
from modekit.engines.modelfile import MODELFILE, modelfile
from modekit.engines.proof import ProofTexts, compare, in_both, texts_of
from modekit.engines.proof_result import EXACT, Proof
from modekit.engines.registry import SMALL, GgufSettings, Outtype
from modekit.engines.sampling import longest_conversation
from modekit.errors import ModekitError, SourceError, UnsupportedError
from modekit.files.marker import foreign_files
from modekit.files.output import Replace, is_there
from modekit.files.read import UNREADABLE, read_json
from modekit.files.staging import Staging, staging
from modekit.files.user_cache import is_proven_here, keep_proven
from modekit.files.write import digest_of_data, library_writes, remove, write_file, write_json
from modekit.loaded.load import load_tokenizer
from modekit.loaded.modekit import flow_of
from modekit.planning.shapes import Shape
from modekit.recipes.paths import name_of
from modekit.recipes.strict import BASE
from modekit.run import QUIET, Run
from modekit.sources.contents import known_blake3

EXPORT_FILE = "export.json"
ADAPTER = ".lora.gguf"
_BY_DTYPE: Mapping[str, Outtype] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_COARSE = {"bf16", "q8_0", *SMALL}
_CARRIER = r"token_embd\.weight|blk\.0\.attn_(q|k|v|output)\.weight"
"""What carries a lexical router's evidence to its average: numbers of some 2^-12, too small for the 16-bit scale of a block of
8-bit ones. Log-probabilities came out 0.14 nats apart where other mixtures have 0.01 (docs/serve.md).
"""
_KEEPS_WINDOW = {"cohere2_moe"}


class Made(TypedDict, total=False):
    """What decides what an export holds, as export.json says it; `experts` where they are files of their own."""

    identity: dict[str, str]
    outtype: Outtype
    pre_tokenizer: str | None
    engines: dict[str, str]
    experts: list[str]


@dataclass(frozen=True)
class GgufFile:
    """One file, the proof that llama.cpp computes what it holds, and what to know of both. `expert`: whose changes it holds;
    None for a whole model.
    """

    file: Path
    proof: Proof
    notes: tuple[str, ...]
    expert: str | None = None

    def as_data(self) -> dict[str, object]:
        """For export.json."""
        expert = {} if self.expert is None else {"expert": self.expert}
        return {**expert, "file": self.file.name, "notes": self.notes, "proof": self.proof.as_data()}


def export_gguf(
    checkpoint: Checkpoint,
    out: Path,
    settings: GgufSettings,
    *,
    experts: Sequence[str] | None = None,
    replace: Replace = "nothing",
    run: Run = QUIET,
) -> list[GgufFile]:
    """Write a folder with a mixture as GGUF, proven in llama.cpp; returns its files: of a native mixture one, else the
    backbone's and an adapter's per expert (`experts`; None: all).

    Raises UnsupportedError, before anything is written, when there is no such form; EngineError when something cannot be
    converted, or is another model there; OutputError.
    """
    refuse_pairs(checkpoint, "llama.cpp does not run the mixture", option="--gguf")
    shape = checkpoint.shape
    if shape.plain and shape.without_gguf is not None:
        raise UnsupportedError(
            "llama.cpp does not run the mixture",
            where=str(checkpoint.folder),
            found=shape.without_gguf,
            remedy="serve it with vLLM or transformers; a native mixture (output.format: native) of another family runs there",
        )
    adapters = [] if shape.plain else chosen_adapters(checkpoint, experts)
    check_installed()
    made = made_of(checkpoint, settings, adapters)
    names = [_name(checkpoint, made), *(f"{adapter.name}{ADAPTER}" for adapter in adapters)]
    digest = digest_of_data(made)
    with staging(out, digest, "gguf", sources=[checkpoint.folder], replace=replace, sync=run.sync) as stage:
        run.begin("convert")
        with library_writes(stage.folder) as folder:
            convert(checkpoint.folder, folder / names[0], conversion_of(checkpoint, settings, adapters))
        written = list(_proven(checkpoint, stage.folder, out, names, adapters, settings, run))
        _write_modelfiles(stage, checkpoint, names[0], names[1:], run)
        said = [each.as_data() for each in written]
        record = {"base": said[0], "adapters": said[1:]} if adapters else said[0]
        write_json(stage.folder / EXPORT_FILE, {**made, "transformers": version("transformers"), **record})
    if not adapters:
        keep_proven(_claim(made, written[0].file, run))
    return written


def conversion_of(checkpoint: Checkpoint, settings: GgufSettings, adapters: Sequence[Adapter] = ()) -> Conversion:
    """How a mixture is converted: what carries its router's evidence keeps 16 bits where others get fewer."""
    outtype, guess = settings.outtype or _own_outtype(checkpoint), guessed_pre_tokenizer(checkpoint.folder)
    if adapters:
        theirs = [(adapter.expert, f"{adapter.name}{ADAPTER}") for adapter in adapters]
        return Conversion(outtype, settings.pre_tokenizer, guess, adapters=theirs, name=_base_name(checkpoint))
    finer = _CARRIER if checkpoint.shape.channels is not None and outtype in _COARSE else None
    return Conversion(outtype, settings.pre_tokenizer, guess, finer)


def _proven(
    checkpoint: Checkpoint,
    folder: Path,
    out: Path,
    names: Sequence[str],
    adapters: Sequence[Adapter],
    settings: GgufSettings,
    run: Run,
) -> Iterator[GgufFile]:
    """The files in a folder, which becomes `out`, each compared with transformers. Raises EngineError."""
    made, files = made_of(checkpoint, settings), [folder / name for name in names]
    if adapters:
        how = GgufSettings(made["outtype"], accept=settings.accept)
        proofs = prove_adapters(checkpoint, files, adapters, how, run=run)
        known = [_notes_of_backbone(checkpoint), *(_notes_of(adapter, checkpoint) for adapter in adapters)]
    else:
        texts = texts_of(checkpoint)
        proof = compare(checkpoint.folder, files[0], made["outtype"], texts=texts, run=run)
        if made["outtype"] not in {EXACT, _own_outtype(checkpoint)}:
            proof = proof.beside(_proof_of_base(checkpoint, folder, made, texts, run))
        proofs, known = [proof.judged(files[0], accept=settings.accept)], [_notes(checkpoint.shape)]
    for name, proof, notes, expert in zip(names, proofs, known, [None, *(each.name for each in adapters)], strict=True):
        yield GgufFile(out / name, proof, (*notes, *proof.notes), expert)


def _write_modelfiles(stage: Staging, checkpoint: Checkpoint, name: str, adapters: Sequence[str], run: Run) -> None:
    """Write what Ollama reads: of a file alone, and with each adapter."""
    tokenizer, context = load_tokenizer(checkpoint.folder, run=run), longest_conversation(checkpoint)
    for adapter in (None, *adapters):
        text = modelfile(checkpoint.folder, tokenizer, name, context, adapter)
        own = "" if adapter is None else f"{adapter.removesuffix(ADAPTER)}."
        write_file(stage.folder / f"{own}{MODELFILE}", text.encode())


def gguf_of(checkpoint: Checkpoint, out: Path, settings: GgufSettings, *, run: Run = QUIET) -> Path:
    """The mixture's file in an export folder; written when that holds none of the mixture as it is.

    What export.json says, anybody can write: a file is taken only where this user's modekit has proven these very bytes
    (files/user_cache.py). Any other is made and proven anew. Raises as `export_gguf`.
    """
    try:
        is_there(out)  # tidied up, if it is
        made = made_of(checkpoint, settings)
        file, known = out / _name(checkpoint, made), read_json(out / EXPORT_FILE)
        said = foreign_files(out) == [] and all(known.get(key) == value for key, value in made.items()) and file.is_file()
        if said and is_proven_here(_claim(made, file, run)):
            return file
    except (*UNREADABLE, AttributeError, SourceError):
        pass
    return export_gguf(checkpoint, out, settings, replace="modekit's own", run=run)[0].file


def made_of(checkpoint: Checkpoint, settings: GgufSettings, adapters: Sequence[Adapter] = ()) -> Made:
    """What decides what the files hold."""
    outtype = settings.outtype or _own_outtype(checkpoint)
    engines = {"converter": CONVERTER, "xllamacpp": version("xllamacpp")}
    made: Made = {"identity": checkpoint.identity, "outtype": outtype, "pre_tokenizer": settings.pre_tokenizer}
    made["engines"] = engines
    if adapters:
        made["experts"] = [adapter.name for adapter in adapters]
    return made


def _claim(made: Made, file: Path, run: Run) -> str:
    """That a file, by its bytes, is the mixture. Raises SourceError where it cannot be read."""
    return json.dumps([made, known_blake3(file, partial(run.progress, f"look at {file.name}"))], sort_keys=True)


def _own_outtype(checkpoint: Checkpoint) -> Outtype:
    """That which stores weights as the checkpoint does."""
    return _BY_DTYPE[str(checkpoint.config["dtype"])]


def _proof_of_base(checkpoint: Checkpoint, folder: Path, made: Made, texts: ProofTexts, run: Run) -> Proof | None:
    """What the dense base model loses when it is stored alike; None where it is gone, or does not run in llama.cpp.

    Its file is written into `folder` and removed.
    """
    base, file = checkpoint.source_folder(checkpoint.record.sources[0]), folder / "base.gguf"
    run.begin("convert the base model")
    try:
        with library_writes(folder) as written:
            how = Conversion(made["outtype"], made["pre_tokenizer"], guessed_pre_tokenizer(base))
            convert(base, written / file.name, how)
        return compare(base, file, made["outtype"], texts=texts, run=run)
    except ModekitError:
        return None
    finally:
        remove(file)


def _name(checkpoint: Checkpoint, made: Made) -> str:
    whole = checkpoint.folder.name if "experts" not in made else _base_name(checkpoint)
    return f"{whole}-{made['outtype']}.gguf"


def _notes(shape: Shape) -> Iterator[str]:
    """What to know of the file."""
    window = shape.config.get("sliding_window")
    windowed = shape.config.get("use_sliding_window", True)
    if window and windowed and shape.native_type not in _KEEPS_WINDOW:
        yield f"llama.cpp attends to all of the text where the model attends to {window:,} tokens: the same up to there"
    if window and shape.native_type in _KEEPS_WINDOW:
        yield "start llama.cpp with --swa-full: without it, a prompt that continues a cached one came out otherwise"


def prove_adapters(
    checkpoint: Checkpoint, files: Sequence[Path], adapters: Sequence[Adapter], settings: GgufSettings, *, run: Run = QUIET
) -> list[Proof]:
    """Compare the backbone's file, the first, and each adapter's on it with the mixture in transformers; in this order. Raises
    EngineError where one is another model, or lost too much.
    """
    outtype, texts = str(settings.outtype), texts_of(checkpoint)
    with in_both(checkpoint.folder, files[0], adapters=files[1:], run=run) as both:
        both.model.use_expert(adapters[0].name)
        with _without_changes(both.model):
            of_base = both.proof(files[0], outtype, texts=texts, run=run)
        proofs = [of_base.beside(of_base if outtype in SMALL else None).judged(files[0], accept=settings.accept)]
        without_notes = dataclasses.replace(both, notes=())
        for place, (adapter, file) in enumerate(zip(adapters, files[1:], strict=True)):
            both.model.use_expert(adapter.name)
            both.llama.use_adapter(place)
            proof = without_notes.proof(file, outtype, texts=texts, run=run).beside(None if outtype == EXACT else of_base)
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


def _notes_of_backbone(checkpoint: Checkpoint) -> Iterator[str]:
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
