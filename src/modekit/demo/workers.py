"""Tasks in processes of their own that run beside each other, each with its part of torch's threads.

Two models that train or are scored in a process each need less time, and much less processor time, than one after the other
with two threads.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from modekit.errors import ModekitError
from modekit.run import Progress


@dataclass(frozen=True)
class WorkerTask:
    """A call with the keyword `progress`; what it is, takes and returns can be pickled."""

    name: str
    call: Callable[..., Any]


class WorkerPool:
    """`count` processes, started when the first task comes; 1 is the calling process alone. Use in `with`."""

    def __init__(self, count: int, torch_threads: int, progress: Progress) -> None:
        self._count = count
        self._torch_threads = torch_threads
        self._progress = progress
        self._processes: dict[Connection, SpawnProcess] = {}

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for pipe, process in self._processes.items():
            pipe.close()  # an idle worker ends by that
            if kind is not None:
                process.terminate()
        for process in self._processes.values():
            process.join()

    def run(self, tasks: Iterable[WorkerTask | None]) -> Iterator[tuple[str, object]]:
        """Names and results as tasks end. A task is asked of `tasks` only when a process is free for it.

        None in place of a task says that the next one needs what is at work: it is asked for again when a task has ended.
        Raises what a task raises, and ModekitError when a process ended early.
        """
        if self._count == 1:
            yield from ((task.name, task.call(progress=self._progress)) for task in tasks if task is not None)
            return
        waiting = iter(tasks)
        busy: dict[Connection, str] = {}
        while True:
            for pipe in [pipe for pipe in self._started() if pipe not in busy]:
                task = next(waiting, None)
                if task is not None:
                    pipe.send(task.call)
                    busy[pipe] = task.name
            if not busy:
                return
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                kind, content = _received(ready, busy[ready])
                if kind == "progress":
                    self._progress(*content)
                elif kind == "error":
                    raise content
                else:
                    yield busy.pop(ready), content

    def _started(self) -> Iterable[Connection]:
        context = multiprocessing.get_context("spawn")
        while len(self._processes) < self._count:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, self._torch_threads), daemon=True)
            process.start()
            theirs.close()  # so that its end is seen here
            self._processes[ours] = process
        return self._processes


def _received(pipe: Connection, task: str) -> tuple[str, Any]:
    try:
        message: tuple[str, Any] = pipe.recv()
    except (EOFError, ConnectionError):
        raise ModekitError(
            "a process of the demo ended early",
            where=task,
            remedy="see its message above; the same command continues from here",
        ) from None
    return message


def _work(pipe: Connection, torch_threads: int) -> None:
    """Run the tasks that come through the pipe, until it closes: the demo is over, or was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the demo, which ends its processes
    import torch

    torch.set_num_threads(torch_threads)
    try:
        while True:
            call = pipe.recv()
            try:
                message = ("result", call(progress=lambda *report: pipe.send(("progress", report))))
            except (ModekitError, OSError) as error:
                message = ("error", error)
            pipe.send(message)
    except (EOFError, BrokenPipeError):
        return
