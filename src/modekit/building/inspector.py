"""Reads every source file once, beside the copying and after it: its blake3 hash, and NaN or Inf in the tensors that are used.

WeightReader, hash and check all run outside the interpreter lock, on the cores that the copying leaves.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from blake3 import blake3

from modekit.errors import SourceError
from modekit.files.user_cache import keep_digest
from modekit.planning.plan import Plan
from modekit.sources.contents import WeightFile
from modekit.sources.header import TensorRef
from modekit.weights.numeric import DTYPES
from modekit.weights.reading import check_finite

_MOST_THREADS = 4
"""A disk that has to be read gives no more to more."""


class Inspector:
    """Threads that start at once; `finish` helps them and gives what was found, `stop` ends them early.

    `known`: hashes of files as they were when they were read for a mixture that is changed now. Of them only those are read
    from which something is taken again, and they must be what they were.
    """

    def __init__(self, plan: Plan, known: Mapping[Path, str] = {}) -> None:
        self._plan, self._known = plan, known
        self._halt = threading.Event()
        unread = {*known, *(file for file, state in plan.source_states.items() if state is None)}
        self._files = deque((file, refs) for file, refs in self._used_refs().items() if refs or file not in unread)
        self._hashes = {str(file): digest for file, digest in known.items()}
        count = max(1, min(_MOST_THREADS, (os.cpu_count() or 1) - 1, len(self._files)))
        self._threads = ThreadPoolExecutor(count, "inspector")
        self._inspections = [self._threads.submit(self._run) for _ in range(count)]

    def stop(self) -> None:
        """End the inspection early."""
        self._halt.set()
        self._threads.shutdown()

    def finish(self) -> dict[str, str]:
        """Take a share of the files that are left, wait for the others, and give the hashes by file.

        Raises SourceError when something is wrong with a source, and whatever else ended the inspection.
        """
        try:
            self._run()
            for inspection in self._inspections:
                inspection.result()
            return {str(file): self._hashes.get(str(file), "") for file in self._plan.source_states}
        finally:
            self.stop()

    def _run(self) -> None:
        """Inspect files, as many threads as like at once, until none is left, or halted, or something is wrong."""
        states = self._plan.source_states
        while not self._halt.is_set():
            try:
                file, refs = self._files.popleft()
            except IndexError:
                return
            opened = WeightFile(file, states[file])
            try:
                known = self._inspect(opened, refs)
                opened.check_unchanged()
            finally:
                opened.close()
            if known is None:
                return
            keep_digest(file, opened.state, known)
            if self._known.get(file, known) != known:
                raise SourceError(
                    "a model has changed since the mixture was built, and something of it is needed again",
                    where=str(file),
                    remedy="put back what it was, or build the mixture again",
                )
            self._hashes[str(file)] = known

    def _used_refs(self) -> dict[Path, list[TensorRef]]:
        files: dict[Path, list[TensorRef]] = {file: [] for file in self._plan.source_states}
        for ref in dict.fromkeys(part for tensor in self._plan.tensors for used in tensor.made.refs for part in used.parts):
            if ref.file in files:  # and not of a mixture that is changed, which was looked at when it was built
                files[ref.file].append(ref)
        return files

    def _inspect(self, file: WeightFile, refs: list[TensorRef]) -> str | None:
        """Hash of a file's content, or None when halted."""
        hasher = blake3()
        for start, end, ref in _stretches(refs, file.state.size):
            for chunk in file.chunks(start, end):
                if self._halt.is_set():
                    return None
                hasher.update(chunk)
                if ref is not None and ref.dtype in DTYPES:
                    check_finite(self._plan.models, ref, chunk)
        return hasher.hexdigest()


def _stretches(refs: list[TensorRef], size: int) -> Iterator[tuple[int, int, TensorRef | None]]:
    """All of a file in order: where a tensor of the list lies, and what lies between."""
    position = 0
    for ref in sorted(refs, key=lambda ref: (ref.start, ref.end)):
        yield position, ref.start, None
        yield max(position, ref.start), ref.end, ref
        position = max(position, ref.end)
    yield position, size, None
