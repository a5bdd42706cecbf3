"""A native mixture as one GGUF file for llama.cpp and what is built on it: `modekit export OUT FOLDER --gguf`.

FOLDER/<OUT>-<outtype>.gguf    the mixture
FOLDER/export.json             what it was made of and with, what to know of it, and the proof that llama.cpp computes the same

The folder appears when the proof is done, so that no file is ever there that was not compared with transformers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TypedDict

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.pairs import refuse_pairs
from modekit.engines.converter import CONVERTER, Conversion, check_installed, convert, guessed_pre_tokenizer
from modekit.engines.proof import compare
from modekit.engines.proof_result import EXACT, Proof
from modekit.engines.proof_texts import ProofTexts, texts_of
from modekit.engines.registry import SMALL, GgufSettings, Outtype
from modekit.errors import ModekitError, SourceError, UnsupportedError
from modekit.files.libraries import library_writes
from modekit.files.marker import foreign_files
from modekit.files.output import Replace, is_there
from modekit.files.read import UNREADABLE, read_json
from modekit.files.staging import Staging, staging
from modekit.files.user_cache import is_proven_here, keep_proven
from modekit.files.write import remove, write_json
from modekit.planning.shapes import Shape
from modekit.run import QUIET, Run
from modekit.sources.contents import known_blake3

EXPORT_FILE = "export.json"
_BY_DTYPE: Mapping[str, Outtype] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_COARSE = {"bf16", "q8_0", *SMALL}
_CARRIER = r"token_embd\.weight|blk\.0\.attn_(q|k|v|output)\.weight"
"""What carries a lexical router's evidence to its average: numbers of some 2^-12, too small for the 16-bit scale of a block of
8-bit ones. Log-probabilities came out 0.14 nats apart where other mixtures have 0.01 (docs/serve.md).
"""
_KEEPS_WINDOW = {"cohere2_moe", "mellum"}


class Made(TypedDict, total=False):
    """What decides what an export holds, as export.json says it; `experts` where they are files of their own."""

    identity: dict[str, str]
    outtype: Outtype
    pre_tokenizer: str | None
    engines: dict[str, str]
    experts: list[str]


@dataclass(frozen=True)
class GgufFile:
    """One file, the proof that llama.cpp computes what it holds, and what to know of both.

    Attributes:
        expert: whose changes it holds; None for a whole model.
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
    checkpoint: Checkpoint, out: Path, settings: GgufSettings, *, replace: Replace = "nothing", run: Run = QUIET
) -> list[GgufFile]:
    """Write a folder with the mixture as GGUF, proven in llama.cpp; returns its one file.

    Raises UnsupportedError when the mixture has no such form; EngineError when it cannot be converted, or is another model
    there; OutputError.
    """
    refuse_pairs(checkpoint, "llama.cpp does not run the mixture", option="--gguf")
    shape = checkpoint.shape
    if shape.without_gguf is not None:
        raise UnsupportedError(
            "llama.cpp does not run the mixture",
            where=str(checkpoint.folder),
            found=shape.without_gguf,
            remedy="serve it with vLLM or transformers; a native mixture (output.format: native) of another family runs there",
        )
    check_installed()
    made = made_of(checkpoint, settings)
    name = _name(checkpoint, made)
    with staged_export(checkpoint, out, made, replace, run) as stage:
        convert_into(stage, checkpoint, name, conversion_of(checkpoint, settings), run)
        file, texts = stage.folder / name, texts_of(checkpoint)
        proof = compare(checkpoint.folder, file, made["outtype"], texts=texts, run=run)
        if made["outtype"] not in {EXACT, _own_outtype(checkpoint)}:
            proof = proof.beside(_proof_of_base(checkpoint, stage.folder, made, texts, run))
        proof = proof.judged(file, accept=settings.accept)
        written = GgufFile(out / name, proof, (*_notes(shape), *proof.notes))
        write_record(stage, made, written.as_data())
    keep_proven(_claim(made, written.file, run))
    return [written]


def conversion_of(checkpoint: Checkpoint, settings: GgufSettings) -> Conversion:
    """How a native mixture is converted: what carries its router's evidence keeps 16 bits where others get fewer."""
    outtype = made_of(checkpoint, settings)["outtype"]
    finer = _CARRIER if checkpoint.shape.channels is not None and outtype in _COARSE else None
    return Conversion(outtype, settings.pre_tokenizer, guessed_pre_tokenizer(checkpoint.folder), finer)


@contextmanager
def staged_export(checkpoint: Checkpoint, out: Path, made: Made, replace: Replace, run: Run) -> Iterator[Staging]:
    """The folder of an export in the making. Raises OutputError."""
    digest = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()
    with staging(out, digest, "gguf", sources=[checkpoint.folder], replace=replace, sync=run.sync) as stage:
        yield stage


def convert_into(stage: Staging, checkpoint: Checkpoint, name: str, how: Conversion, run: Run) -> None:
    """Write the mixture's GGUF files, unless an earlier, interrupted run has. Raises EngineError."""
    if not stage.recall("converted"):
        run.begin("convert")
        with library_writes(stage.folder) as folder:
            convert(checkpoint.folder, folder / name, how)
        stage.record("converted", True)


def write_record(stage: Staging, made: Made, said: Mapping[str, object]) -> None:
    """Write export.json."""
    write_json(stage.folder / EXPORT_FILE, {**made, "transformers": version("transformers"), **said})


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


def made_of(checkpoint: Checkpoint, settings: GgufSettings) -> Made:
    """What decides what the file holds."""
    outtype = settings.outtype or _own_outtype(checkpoint)
    engines = {"converter": CONVERTER, "xllamacpp": version("xllamacpp")}
    return {"identity": checkpoint.identity, "outtype": outtype, "pre_tokenizer": settings.pre_tokenizer, "engines": engines}


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
    return f"{checkpoint.folder.name}-{made['outtype']}.gguf"


def _notes(shape: Shape) -> Iterator[str]:
    """What to know of the file."""
    window = shape.config.get("sliding_window")
    windowed = shape.config.get("use_sliding_window", True)
    if window and windowed and shape.native_type not in _KEEPS_WINDOW:
        yield f"llama.cpp attends to all of the text where the model attends to {window:,} tokens: the same up to there"
    if window and shape.native_type in _KEEPS_WINDOW:
        yield "start llama.cpp with --swa-full: without it, a prompt that continues a cached one came out otherwise"
