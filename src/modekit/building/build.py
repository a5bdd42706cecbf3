"""Runs a plan: tensors stream from memory-mapped sources to shards, then the router is set, then the folder appears.

A copied tensor goes from the page cache of its source to that of the result without passing through the process. A second
thread reads every source file once meanwhile, hashes it and looks for NaN and Inf.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import threading
from pathlib import Path

import numpy as np
from blake3 import blake3

from modekit.building.tensors import PieceReader, check_finite, computed_blocks
from modekit.checkpoint.checkpoint import (
    RECORD_FILE,
    STATISTICS_FOLDER,
    Checkpoint,
    RouterRecord,
    make_record,
    write_index,
    write_router_file,
)
from modekit.checkpoint.staging import Staging, staging, write_all, write_json
from modekit.errors import SourceError
from modekit.planning.plan import ROUTER_FILE, Piece, Plan, PlannedTensor
from modekit.progress import Progress, silent
from modekit.routing.constant import constant_gates
from modekit.sources.model import Mappings, TensorRef
from modekit.text.documents import is_local
from modekit.text.held_out import fit_documents

_CHUNK = 2**20  # bytes: stays in the processor's cache between the hash and the check


def build(plan: Plan, out: Path, *, overwrite: bool = False, progress: Progress = silent) -> Checkpoint:
    """Write the checkpoint that a plan describes.

    Raises OutputError, SourceError (NaN weights, a file that changed or ended early) or TextError; nothing is left
    behind then. After a kill, the same call goes on where the journal ends, and ends in the same bytes.
    """
    if plan.recipe.mixture.needs_text:
        _check_text(plan)
    with staging(out, plan.digest(), overwrite=overwrite, marker=RECORD_FILE) as stage:
        inspector = _Inspector(plan, stage)
        inspector.start()
        try:
            _write_shards(plan, stage, progress)
        except BaseException:
            inspector.stop()
            raise
        hashes = inspector.finish()
        write_index(plan, stage.folder)
        write_json(stage.folder / "config.json", dict(plan.config))
        for file in (*plan.copied_files, *plan.code_files):
            shutil.copyfile(file, stage.folder / file.name)
        checkpoint = _set_router(plan, out, stage, hashes, progress)
        write_json(stage.folder / RECORD_FILE, checkpoint.record.model_dump(mode="json"))
    return Checkpoint(out, checkpoint.record)


def _check_text(plan: Plan) -> None:
    """Read the text on disk that the fit will read, so that what is wrong with it shows before gigabytes are copied."""
    for place, expert in enumerate(plan.recipe.experts):
        if all(is_local(spec, plan.root) for spec in expert.text or []):
            fit_documents(expert, plan.root, place)


def _set_router(plan: Plan, out: Path, stage: Staging, hashes: dict[str, str], progress: Progress) -> Checkpoint:
    gates = constant_gates(plan.recipe, plan.slots)
    # Zero gates stand in while the fit reads the staged experts through the same door as a finished checkpoint.
    placeholder = [np.zeros(slot.shape, np.float32) for slot in plan.slots]
    sha256 = write_router_file(
        stage.folder / ROUTER_FILE, plan.slots, placeholder if gates is None else gates, plan.router_dtype
    )
    checkpoint = Checkpoint(stage.folder, make_record(plan, out, hashes, RouterRecord.unfitted(plan.recipe, sha256)))
    if gates is not None:
        return checkpoint
    from modekit.routing.fit import fit_router

    fitted = fit_router(
        checkpoint, plan.recipe, plan.root, stage.folder / STATISTICS_FOLDER, trust_remote_code=plan.trust_remote_code,
        progress=progress,
    )  # fmt: skip
    return checkpoint.with_router(fitted.gates, fitted.record, plan.recipe)


def _write_shards(plan: Plan, stage: Staging, progress: Progress) -> None:
    mappings = Mappings()
    read = PieceReader(mappings)
    total = sum(shard.nbytes for shard in plan.shards)
    written = 0
    try:
        for shard in plan.shards:

            def write_next(place: int, stream: io.FileIO, tensors: tuple[PlannedTensor, ...] = shard.tensors) -> None:
                nonlocal written
                progress("build", min(written, total), total)
                write_tensor(plan, tensors[place], read, stream)
                written += tensors[place].nbytes

            entries = [(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes) for tensor in shard.tensors]
            stage.write_shard(shard.file, entries, write_next)
        progress("build", total, total)
    finally:
        mappings.close()


def write_tensor(plan: Plan, tensor: PlannedTensor, read: PieceReader, stream: io.FileIO) -> None:
    """Write the bytes of a planned tensor. Raises SourceError."""
    if tensor.operation == "copy":
        for piece in tensor.pieces:
            _copy(piece, read.mappings, stream)
    else:
        for block in computed_blocks(plan, tensor, read):
            write_all(stream, block)
    for piece in tensor.pieces:
        for ref in piece.refs:
            read.mappings.forget(ref)


def _copy(piece: Piece, mappings: Mappings, stream: io.FileIO) -> None:
    """From page cache to page cache inside the kernel where the system can, else through the memory map."""
    source, position = mappings.descriptor(piece.ref.file), piece.ref.start
    while position < piece.ref.end:
        try:
            sent = os.sendfile(stream.fileno(), source, position, piece.ref.end - position)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in {errno.EINVAL, errno.ENOSYS, errno.ENOTSOCK, errno.ENOTSUP}:
                raise
            write_all(stream, mappings.view(piece.ref)[position - piece.ref.start :])
            return
        if sent == 0:
            raise SourceError(
                "a source file became shorter during the build", where=str(piece.ref.file),
                remedy="leave the models alone while they are read, and build again",
            )  # fmt: skip
        position += sent


class _Inspector(threading.Thread):
    """Reads every source file once, beside the copying: its blake3 hash, and NaN or Inf in the tensors that are used.

    Both run outside the interpreter lock, several times faster than the copy they accompany.
    """

    def __init__(self, plan: Plan, stage: Staging) -> None:
        super().__init__(daemon=True)
        self._plan = plan
        self._stage = stage
        self._hashes: dict[str, str] = {}
        self._error: Exception | None = None
        self._halt = threading.Event()

    def run(self) -> None:
        """Inspect files until done, halted or something is wrong."""
        mappings = Mappings()
        try:
            for file, refs in self._used_refs().items():
                known = self._stage.recall(f"blake3 {file}")
                if known is None:
                    known = self._inspect(mappings.file(file), refs)
                    if known is None:
                        return
                    self._stage.record(f"blake3 {file}", known)
                self._hashes[str(file)] = known
        except (OSError, ValueError, SourceError) as error:
            self._error = error
        finally:
            mappings.close()

    def stop(self) -> None:
        """End the inspection early."""
        self._halt.set()
        self.join()

    def finish(self) -> dict[str, str]:
        """Wait for the hashes by file. Raises SourceError when something is wrong with a source."""
        try:
            self.join()
        except KeyboardInterrupt:
            self.stop()
            raise
        if isinstance(self._error, SourceError):
            raise self._error
        if self._error is not None:
            raise SourceError(
                "a source file cannot be read", found=self._error, remedy="leave the models alone while they are read"
            ) from None
        return self._hashes

    def _used_refs(self) -> dict[Path, list[TensorRef]]:
        files: dict[Path, list[TensorRef]] = {file: [] for source in self._plan.sources for file in source.files}
        for ref in dict.fromkeys(ref for tensor in self._plan.tensors for piece in tensor.pieces for ref in piece.refs):
            files[ref.file].append(ref)
        return files

    def _inspect(self, content: memoryview, refs: list[TensorRef]) -> str | None:
        """Hash of a file's content, or None when halted."""
        hasher = blake3()
        position = 0
        for ref in sorted(refs, key=lambda ref: (ref.start, ref.end)):
            for start, end, check in ((position, ref.start, False), (max(position, ref.start), ref.end, True)):
                for at in range(start, end, _CHUNK):
                    if self._halt.is_set():
                        return None
                    chunk = content[at : min(at + _CHUNK, end)]
                    hasher.update(chunk)
                    if check:
                        check_finite(self._plan, ref, chunk)
            position = max(position, ref.end)
        for at in range(position, len(content), _CHUNK):
            hasher.update(content[at : at + _CHUNK])
        return hasher.hexdigest()
