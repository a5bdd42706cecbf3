"""A mixture as GGUF for llama.cpp and what is built on it: `modekit export OUT FOLDER --gguf`.

    FOLDER/<OUT>-<outtype>.gguf     the mixture
    FOLDER/Modelfile                names it, for `ollama create`
    FOLDER/export.json              what it was made of and with, what to know of it, and the proof

The folder appears when all is proven, so that no file is ever there that was not compared with transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import refuse_pairs
from modekit.engines.converter import CONVERTER, INSTALL, NEEDED, convert
from modekit.engines.proof import Proof, compare, documents_of
from modekit.engines.registry import Outtype
from modekit.errors import SourceError, UnsupportedError, check_packages
from modekit.files.change import mend
from modekit.files.copies import library_writes
from modekit.files.marker import foreign_files
from modekit.files.place import Replace
from modekit.files.read import UNREADABLE, read_json
from modekit.files.staging import staging
from modekit.files.user_cache import is_proven_here, keep_proven
from modekit.files.write import digest_of_data, write_file, write_json
from modekit.planning.plan import Shape
from modekit.run import QUIET, Run
from modekit.sources.digests import known_blake3

EXPORT_FILE = "export.json"
MODELFILE = "Modelfile"
_BY_DTYPE: Mapping[str, Outtype] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_COARSE = {"bf16", "q8_0"}
_CARRIER = r"token_embd\.weight|blk\.0\.attn_(q|k|v|output)\.weight"
"""What carries a lexical router's evidence to its average: numbers of some 2^-12, too small for the 16-bit scale of a block of
8-bit ones. Log-probabilities came out 0.14 nats apart where other mixtures have 0.01 (benchmarks/llama.md).
"""
_IN_FRONT = r"|blk\.0\.ffn_(gate|up|down)_exps\.weight"
"""What makes penalties of averages, whose differences activations in blocks of 8 bits lose (benchmarks/routed.md)."""


@dataclass(frozen=True)
class GgufFile:
    """A file, the proof that llama.cpp computes what it holds, and what to know of it."""

    file: Path
    proof: Proof
    notes: tuple[str, ...]


def export_gguf(
    checkpoint: Checkpoint, out: Path, outtype: Outtype | None = None, *, replace: Replace = "nothing", run: Run = QUIET
) -> GgufFile:
    """Write a folder with a mixture as GGUF, proven in llama.cpp; weights as `outtype` (None: as in the checkpoint).

    Raises UnsupportedError, before anything is written, when there is no such form; EngineError when it cannot be converted, or
    is another model there; OutputError.
    """
    refuse_pairs(checkpoint, "llama.cpp does not run the mixture")
    shape = checkpoint.shape
    if shape.without_gguf is not None:
        raise UnsupportedError(
            "llama.cpp does not run the mixture",
            where=str(checkpoint.folder),
            found=shape.without_gguf,
            remedy="serve it with vLLM or transformers; where the base model has a plain form, a mixture in it "
            "(output.format: plain) runs in llama.cpp",
        )
    check_packages(NEEDED, INSTALL)
    made = made_of(checkpoint, outtype)
    name = _name(checkpoint, made)
    with staging(out, digest_of_data(made), "gguf", sources=[checkpoint.folder], replace=replace, sync=run.sync) as stage:
        run.begin("convert")
        with library_writes(stage.folder) as folder:
            convert(checkpoint.folder, folder / name, made["outtype"], finer_of(checkpoint, made["outtype"]))
        file = stage.folder / name
        proof = compare(checkpoint.folder, file, made["outtype"], documents_of(checkpoint), run=run)
        proof.check(file)
        written = GgufFile(out / name, proof, tuple(_notes(shape)))
        write_file(stage.folder / MODELFILE, f"FROM ./{name}\n".encode())
        said = {"file": name, "notes": written.notes, "proof": asdict(proof)}
        write_json(stage.folder / EXPORT_FILE, {**made, "transformers": version("transformers"), **said})
    keep_proven(_claim(made, written.file, run))
    return written


def gguf_of(checkpoint: Checkpoint, out: Path, outtype: Outtype | None, *, run: Run = QUIET) -> Path:
    """The mixture's file in an export folder; written when that holds none of the mixture as it is.

    What export.json says, anybody can write: a file is taken only where this user's modekit has proven these very bytes
    (files/user_cache.py). Any other is made and proven anew. Raises as `export_gguf`.
    """
    try:
        mend(out)
        made = made_of(checkpoint, outtype)
        file, known = out / _name(checkpoint, made), read_json(out / EXPORT_FILE)
        said = foreign_files(out) == [] and all(known.get(key) == value for key, value in made.items()) and file.is_file()
        if said and is_proven_here(_claim(made, file, run)):
            return file
    except (*UNREADABLE, AttributeError, SourceError):
        pass
    return export_gguf(checkpoint, out, outtype, replace="modekit's own", run=run).file


def finer_of(checkpoint: Checkpoint, outtype: str) -> str | None:
    """GGUF names, as a regular expression, of tensors that keep 16 bits: what carries its router's evidence."""
    if checkpoint.shape.channels is None or outtype not in _COARSE:
        return None
    return _CARRIER + (_IN_FRONT if checkpoint.shape.inner > 1 else "")


def made_of(checkpoint: Checkpoint, outtype: Outtype | None) -> dict[str, Any]:
    """What decides what the file holds, as export.json says it: identity, outtype, engines."""
    engines = {"converter": CONVERTER, "xllamacpp": version("xllamacpp")}
    outtype = outtype or _BY_DTYPE[str(checkpoint.config["dtype"])]
    return {"identity": checkpoint.identity, "outtype": outtype, "engines": engines}


def _claim(made: Mapping[str, Any], file: Path, run: Run) -> str:
    """That a file, by its bytes, is the mixture. Raises SourceError where it cannot be read."""
    return json.dumps([made, known_blake3(file, partial(run.progress, f"look at {file.name}"))], sort_keys=True)


def _name(checkpoint: Checkpoint, made: Mapping[str, Any]) -> str:
    return f"{checkpoint.folder.name}-{made['outtype']}.gguf"


def _notes(shape: Shape) -> Iterator[str]:
    """What to know of the file."""
    window = shape.config.get("sliding_window")
    windowed = shape.config.get("use_sliding_window", True)
    if window and windowed and shape.native_type != "cohere2_moe":
        yield f"llama.cpp attends to all of the text where the model attends to {window:,} tokens: the same up to there"
    if window and shape.native_type == "cohere2_moe":
        yield "start llama.cpp with --swa-full: without it, a prompt that continues a cached one came out otherwise"
