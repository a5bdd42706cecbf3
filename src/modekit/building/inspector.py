"""Reads every source file once, beside the copying and after it: its blake3 hash, and NaN or Inf in the tensors that are used.

Reading, hash and check all run outside the interpreter lock.
"""

from __future__ import annotations

import os
import threading
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
    """Threads that start at once; `finish` waits for them and gives what was found, `stop` ends them early.

    `known`: hashes of files as they were when they were read for a mixture that is changed now. Of them only those are read
    from which something is taken again, and they must be what they were.
    """

    def __init__(self, plan: Plan, known: Mapping[Path, str] = {}) -> None:
        self._plan, self._known, self._halt = plan, known, threading.Event()
        used: dict[Path, list[TensorRef]] = {file: [] for file in plan.source_states}
        for ref in dict.fromkeys(part for tensor in plan.tensors for read in tensor.made.refs for part in read.parts):
            if ref.file in used:  # and not of a mixture that is changed, which was looked at when it was built
                used[ref.file].append(ref)
        unread = {*known, *(file for file, state in plan.source_states.items() if state is None)}
        files = {file: refs for file, refs in used.items() if refs or file not in unread}
        self._threads = ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), "inspector")
        self._hashes = {file: self._threads.submit(self._inspect, file, refs) for file, refs in files.items()}

    def stop(self) -> None:
        """End the inspection early."""
        self._halt.set()
        self._threads.shutdown(cancel_futures=True)

    def finish(self) -> dict[str, str]:
        """The hashes by file. Raises SourceError when something is wrong with a source, and whatever else ended a thread."""
        try:
            found = {**self._known, **{file: future.result() for file, future in self._hashes.items()}}
            return {str(file): found.get(file, "") for file in self._plan.source_states}
        finally:
            self.stop()

    def _inspect(self, file: Path, refs: list[TensorRef]) -> str:
        """Hash of a file's content; empty when halted."""
        opened, hasher = WeightFile(file, self._plan.source_states[file]), blake3()
        try:
            for start, end, ref in _stretches(refs, opened.state.size):
                for chunk in opened.chunks(start, end):
                    if self._halt.is_set():
                        return ""
                    hasher.update(chunk)
                    if ref is not None and ref.dtype in DTYPES:
                        check_finite(self._plan.models, ref, chunk)
            opened.check_unchanged()
        finally:
            opened.close()
        digest: str = hasher.hexdigest()
        keep_digest(file, opened.state, digest)
        if self._known.get(file, digest) != digest:
            raise SourceError(
                "a model has changed since the mixture was built, and something of it is needed again",
                where=str(file),
                remedy="put back what it was, or build the mixture again",
            )
        return digest


def _stretches(refs: list[TensorRef], size: int) -> Iterator[tuple[int, int, TensorRef | None]]:
    """All of a file in order: where a tensor of the list lies, and what lies between."""
    position = 0
    for ref in sorted(refs, key=lambda ref: (ref.start, ref.end)):
        yield position, ref.start, None
        yield max(position, ref.start), ref.end, ref
        position = max(position, ref.end)
    yield position, size, None
