"""Reads every source file once, beside the copying: its blake3 hash, and NaN or Inf in the tensors that are used.

Both run outside the interpreter lock, several times faster than the copy they accompany.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from blake3 import blake3

from modekit.building.tensors import check_finite
from modekit.errors import SourceError
from modekit.files.staging import Staging
from modekit.planning.plan import Plan
from modekit.sources.model import Mappings, TensorRef

_CHUNK = 2**20  # bytes: stays in the processor's cache between the hash and the check


class Inspector:
    """A second thread that starts at once; `finish` gives what it found, `stop` ends it early."""

    def __init__(self, plan: Plan, stage: Staging) -> None:
        self._plan, self._stage = plan, stage
        self._halt = threading.Event()
        self._thread = ThreadPoolExecutor(1, "inspector")
        self._found = self._thread.submit(self._run)

    def stop(self) -> None:
        """End the inspection early."""
        self._halt.set()
        self._thread.shutdown()

    def finish(self) -> dict[str, str]:
        """Wait for the hashes by file.

        Raises SourceError when something is wrong with a source, and whatever else ended the inspection.
        """
        try:
            return self._found.result()
        except (OSError, ValueError) as error:
            raise SourceError(
                "a source file cannot be read", found=error, remedy="leave the models alone while they are read"
            ) from None
        finally:
            self.stop()

    def _run(self) -> dict[str, str]:
        """Inspect files until done, halted or something is wrong."""
        hashes: dict[str, str] = {}
        mappings = Mappings()
        try:
            for file, refs in self._used_refs().items():
                known = self._stage.recall(f"blake3 {file}")
                if known is None:
                    known = self._inspect(mappings.file(file), refs)
                    if known is None:
                        break
                    self._stage.record(f"blake3 {file}", known)
                hashes[str(file)] = known
        finally:
            mappings.close()
        return hashes

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
