"""A file that one process holds at a time."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout


class Lock:
    """Held from `take` to `release`.

    The file is removed while the lock is held; who had it open by then gets a lock on no file, which `FileLock` sees, and
    asks again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = FileLock(path)

    @property
    def is_held(self) -> bool:
        """Whether this object holds it."""
        return self._lock.is_locked

    def take(self, *, patience: float = 0.0) -> bool:
        """Take it if it becomes free within some seconds; whether it did.

        Raises OSError where its folder is not there, or a link has its name.
        """
        try:
            self._lock.acquire(timeout=patience, poll_interval=0.01)
        except Timeout:
            return False
        return True

    def release(self) -> None:
        """Give it free, if it is held, and remove its file."""
        if self._lock.is_locked:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
            self._lock.release()
