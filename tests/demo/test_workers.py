"""Tasks in processes: results and reports come, tasks are asked for late, and errors and ends are told."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from modekit.demo.workers import WorkerPool, WorkerTask
from modekit.errors import ModekitError, TextError
from modekit.run import Progress, silent


def double(value: int, *, progress: Progress) -> tuple[int, int]:
    progress("double", value, value)
    return 2 * value, os.getpid()


def fail(*, progress: Progress) -> None:
    raise TextError("the text is empty", where="here", remedy="write some")


def end(*, progress: Progress) -> None:
    os._exit(3)


@pytest.mark.parametrize("count", [1, 2])
def test_results_and_reports_of_all_tasks_come_and_each_is_asked_for_when_one_is_free(count: int) -> None:
    reports: list[tuple[str, int, int]] = []
    found: dict[str, int] = {}
    ahead: list[int] = []

    def tasks() -> Iterator[WorkerTask]:
        for value in range(5):
            ahead.append(value - len(found))
            yield WorkerTask(str(value), partial(double, value))

    with WorkerPool(count, 1, lambda stage, done, total: reports.append((stage, done, total))) as workers:
        for name, (doubled, process) in workers.run(tasks()):
            found[name] = doubled
            assert (process == os.getpid()) == (count == 1)
    assert found == {str(value): 2 * value for value in range(5)}
    assert sorted(reports) == [("double", value, value) for value in range(5)]
    assert max(ahead) < max(2, count)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_task_that_needs_others_waits_for_them(count: int) -> None:
    ended: dict[str, int] = {}

    def tasks() -> Iterator[WorkerTask | None]:
        for value in (1, 2):
            yield WorkerTask(str(value), partial(double, value))
        while not ended.keys() >= {"1", "2"}:
            yield None
        yield WorkerTask("sum", partial(double, sum(ended.values())))

    with WorkerPool(count, 1, silent) as workers:
        for name, (doubled, _) in workers.run(tasks()):
            ended[name] = doubled
    assert ended == {"1": 2, "2": 4, "sum": 12}


def test_an_error_comes_with_its_parts_and_a_process_that_ends_is_told() -> None:
    for call, error, text in ((fail, TextError, "write some"), (end, ModekitError, "ended early")):
        run: Any = partial(call)
        with pytest.raises(error, match=text), WorkerPool(2, 1, silent) as workers:
            list(workers.run([WorkerTask("one", run)]))
