"""Runs a plan: tensors stream from memory-mapped sources to shards, then the router is set, then the folder appears.

A copied tensor goes from the page cache of its source to that of the result, block by block; each block is checked for
NaN and Inf on the way. A second thread hashes the source files meanwhile.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from modekit.checkpoint import (
    RECORD_FILE,
    STATISTICS_FOLDER,
    Checkpoint,
    RouterRecord,
    make_record,
    write_index,
    write_router_file,
)
from modekit.errors import SourceError
from modekit.merge import merge_blocks
from modekit.numeric import DTYPES, as_array, blocks, is_finite, to_bytes, to_float32
from modekit.plan import ROUTER_FILE, Piece, Plan, PlannedTensor
from modekit.progress import Progress, silent
from modekit.routing.constant import constant_gates
from modekit.sources import Mappings
from modekit.writer import Staging, staging, write_json

_CHUNK = 4 * 2**20  # bytes per write: stays in the processor's cache between the check and the copy

Write = Callable[[memoryview], None]


def build(plan: Plan, out: Path, *, overwrite: bool = False, progress: Progress = silent) -> Checkpoint:
    """Write the checkpoint that a plan describes.

    Raises OutputError, SourceError (NaN weights, a file that changed or ended early) or TextError; nothing is left
    behind then. After a kill, the same call goes on where the journal ends, and ends in the same bytes.
    """
    with staging(out, plan.digest(), overwrite=overwrite) as stage:
        hasher = _Hasher(plan, stage)
        hasher.start()
        try:
            _write_shards(plan, stage, progress)
        finally:
            hashes = hasher.finish()
        write_index(plan, stage.folder)
        write_json(stage.folder / "config.json", dict(plan.config))
        for file in plan.copied_files:
            shutil.copyfile(file, stage.folder / file.name)
        checkpoint = _set_router(plan, out, stage, hashes, progress)
        write_json(stage.folder / RECORD_FILE, checkpoint.record.model_dump(mode="json"))
    return Checkpoint(out, checkpoint.record)


def _set_router(plan: Plan, out: Path, stage: Staging, hashes: dict[str, str], progress: Progress) -> Checkpoint:
    linear = plan.recipe.mixture.method == "linear"
    settings = None if linear else plan.recipe.mixture.router
    status = RouterRecord(status="unfitted", settings=settings, sha256="", text={}, report={})
    gates = None
    if not plan.recipe.mixture.needs_text:
        gates = constant_gates(plan.recipe, plan.layers, plan.hidden)
    names = [tensor.name for tensor in plan.router]
    # Zero gates stand in while the fit reads the staged experts through the same door as a finished checkpoint.
    placeholder = np.zeros((plan.layers, plan.experts, plan.hidden), np.float32)
    sha256 = write_router_file(stage.folder / ROUTER_FILE, names, placeholder if gates is None else gates, plan.router[0].dtype)
    checkpoint = Checkpoint(
        stage.folder, make_record(plan, out, hashes, status.model_copy(update={"sha256": sha256}))
    )
    if gates is not None:
        return checkpoint
    from modekit.routing.fit import fit_router  # torch and transformers only when a router reads text

    fitted = fit_router(
        checkpoint, plan.recipe, plan.root, stage.folder / STATISTICS_FOLDER, trust_remote_code=plan.trust_remote_code,
        progress=progress,
    )  # fmt: skip
    return checkpoint.with_router(fitted.gates, fitted.record, plan.recipe)


def _write_shards(plan: Plan, stage: Staging, progress: Progress) -> None:
    mappings = Mappings()
    total = sum(shard.nbytes for shard in plan.shards)
    written = 0
    try:
        for shard in plan.shards:

            def write_tensor(place: int, write: Write, tensors: tuple[PlannedTensor, ...] = shard.tensors) -> None:
                nonlocal written
                progress("build", min(written, total), total)
                _write_tensor(plan, tensors[place], mappings, write)
                written += tensors[place].nbytes

            entries = [(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes) for tensor in shard.tensors]
            stage.write_shard(shard.file, entries, write_tensor)
        progress("build", total, total)
    finally:
        mappings.close()


def _write_tensor(plan: Plan, tensor: PlannedTensor, mappings: Mappings, write: Write) -> None:
    if tensor.operation == "zeros":
        for part in blocks(tensor.nbytes):
            write(memoryview(bytes(part.stop - part.start)))
    elif tensor.operation == "copy":
        for piece in tensor.pieces:
            _copy(plan, piece, mappings, write)
    elif tensor.operation in {"cast", "scale"}:
        for piece in tensor.pieces:
            _convert(plan, piece, tensor, mappings, write)
    else:
        _merge(plan, tensor, mappings, write)
    for piece in tensor.pieces:
        mappings.forget(piece.ref)


def _copy(plan: Plan, piece: Piece, mappings: Mappings, write: Write) -> None:
    view = mappings.view(piece.ref)
    for start in range(0, len(view), _CHUNK):
        chunk = view[start : start + _CHUNK]
        _check_finite(plan, piece, chunk, piece.ref.dtype)
        write(chunk)


def _convert(plan: Plan, piece: Piece, tensor: PlannedTensor, mappings: Mappings, write: Write) -> None:
    values = as_array(mappings.view(piece.ref), piece.ref.dtype)
    for part in blocks(len(values)):
        block = to_float32(values[part])
        if tensor.factor != 1.0:
            block *= np.float32(tensor.factor)
        converted = to_bytes(block, tensor.dtype)
        _check_finite(plan, piece, converted, tensor.dtype)
        write(converted)


def _merge(plan: Plan, tensor: PlannedTensor, mappings: Mappings, write: Write) -> None:
    settings = plan.recipe.mixture.merge
    assert settings is not None
    base, *experts = (as_array(mappings.view(piece.ref), piece.ref.dtype) for piece in tensor.pieces)
    for block in merge_blocks(settings, base, experts):
        merged = to_bytes(block.astype(np.float32), tensor.dtype)
        if not is_finite(merged, tensor.dtype):
            for piece in tensor.pieces:
                _check_finite(plan, piece, mappings.view(piece.ref), piece.ref.dtype)
            raise SourceError(
                f"the merged backbone overflows {DTYPES[tensor.dtype]}", where=f"mixture.backbone: {tensor.name}",
                remedy="choose output: {dtype: bfloat16} or float32, or a smaller scale",
            )  # fmt: skip
        write(merged)


def _check_finite(plan: Plan, piece: Piece, view: memoryview, dtype: str) -> None:
    if not is_finite(view, dtype):
        source = plan.sources[piece.source]
        kept = dtype == piece.ref.dtype
        raise SourceError(
            "the weights hold NaN or Inf" if kept else f"the weights do not fit {DTYPES[dtype]}",
            where=f"{source.label} ({source.spec}): {piece.ref.name}",
            remedy="the model is damaged: save or download it again" if kept else "choose output: {dtype: bfloat16} or float32",
        )  # fmt: skip


class _Hasher(threading.Thread):
    """sha256 of every source file, beside the copying (hashlib releases the interpreter lock)."""

    def __init__(self, plan: Plan, stage: Staging) -> None:
        super().__init__(daemon=True)
        self._files = list(dict.fromkeys(file for source in plan.sources for file in source.files))
        self._stage = stage
        self._hashes: dict[str, str] = {}
        self._error: OSError | None = None
        self._halt = threading.Event()

    def run(self) -> None:
        """Hash files until done or stopped."""
        buffer = bytearray(_CHUNK)
        try:
            for file in self._files:
                known = self._stage.recall(f"sha256 {file}")
                if known is None:
                    digest = hashlib.sha256()
                    with file.open("rb", buffering=0) as stream:
                        while count := stream.readinto(buffer):
                            if self._halt.is_set():
                                return
                            digest.update(memoryview(buffer)[:count])
                    known = digest.hexdigest()
                    self._stage.record(f"sha256 {file}", known)
                self._hashes[str(file)] = known
        except OSError as error:
            self._error = error

    def finish(self) -> dict[str, str]:
        """Wait for the hashes; a failure of the copying (already being raised) stops the hashing instead."""
        if sys.exc_info()[0] is not None:
            self._halt.set()
        try:
            self.join()
        except KeyboardInterrupt:
            self._halt.set()
            self.join()
            raise
        if self._error is not None:
            raise SourceError("a source file cannot be read", where=str(self._error.filename), found=self._error.strerror)
        return self._hashes
