"""An engine that is kept running: where its process ends by itself, it is started again, until that happens too often."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from modekit.engines.child import Child
from modekit.errors import EngineError

_FAILURES = 3
_WITHIN_S = 60.0
_LOOK_S = 0.05
_LOG = logging.getLogger("modekit.serve")


class Supervisor:
    """Use it as a context manager: the engine answers inside the block, and is gone afterwards. Raises EngineError on entering
    where the engine does not start.
    """

    def __init__(self, engine: str, start: Callable[[], Child]) -> None:
        self.engine = engine
        self.address: str | None = None
        self._start = start
        self._child: Child | None = None
        self._failures: deque[float] = deque(maxlen=_FAILURES)
        self._complaint = ""
        self._stopping = False
        self._changing = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> Supervisor:
        self._child = self._start()
        if not self._listen(self._child):
            self._child.stop()
            raise EngineError(
                "the engine did not start",
                where=self.engine,
                found=self._child.complaint(),
                remedy="read its message; it needs enough memory for the model",
            )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changing:
            self._stopping = True
        if self._child is not None:
            self._child.end()
            self._thread.join()
            self._child.stop()

    def wait(self) -> None:
        """Return never: raises EngineError once the engine has failed too often."""
        self._over.wait()
        raise EngineError(
            f"the engine failed {_FAILURES} times in {_WITHIN_S:.0f} seconds",
            where=self.engine,
            found=self._complaint,
            remedy="read its message, then serve again",
        )

    async def address_within(self, seconds: float) -> str | None:
        """Where it answers, as soon as it does; None where it does not in time."""
        end = time.monotonic() + seconds
        while self.address is None and time.monotonic() < end and not self._over.is_set():
            await asyncio.sleep(_LOOK_S)
        return self.address

    def _listen(self, child: Child) -> bool:
        """Whether a process that was just started came to answer."""
        ready = child.answer()
        self.address = None if ready is None else ready["address"]
        return ready is not None

    def _keep(self) -> None:
        child = self._child
        while child is not None:
            while child.answer() is not None:
                pass
            self.address = None
            child = self._again(child)

    def _again(self, ended: Child) -> Child | None:
        """A new process in place of one that ended; None where it is not wanted any more, or ended too often."""
        self._complaint = ended.complaint()
        self._failures.append(time.monotonic())
        with self._changing:
            if self._stopping:
                return None
            ended.stop()
            if len(self._failures) == _FAILURES and self._failures[-1] - self._failures[0] < _WITHIN_S:
                self._over.set()
                return None
            _LOG.warning("%s ended and is started again: %s", self.engine, self._complaint)
            self._child = self._start()
        self._listen(self._child)
        return self._child
