"""A search in this process, in several on this machine, or where Ray puts them: the same function everywhere."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

from modekit.errors import TuneError
from modekit.run import Run
from modekit.search.tune.selection import Selection
from modekit.search.tune.study import Job, work

_GO_ON = "see what it said above; the same command goes on from what is there, with --processes 1 in less memory"


def launch(job: Job, select: Selection, processes: int, ray: bool, run: Run) -> None:
    """Search until there are `trials` candidates. Raises what `work` raises, and TuneError when another process ended early."""
    if ray:
        _search_with_ray(job, select, processes)
    elif processes > 1:
        context = multiprocessing.get_context("spawn")
        others = [context.Process(target=work, args=(job, select), kwargs={"process": index}) for index in range(1, processes)]
        for process in others:
            process.start()
        try:
            work(job, select, run)
        except BaseException:
            for process in others:
                process.terminate()
            raise
        finally:
            for process in others:
                process.join()
        if any(process.exitcode for process in others):
            raise TuneError("a process of the search ended early", where=str(job.work), remedy=_GO_ON)
    else:
        work(job, select, run)


def _search_with_ray(job: Job, select: Selection, processes: int) -> None:
    try:
        import ray
    except ImportError:
        raise TuneError("Ray is not installed", where="--ray", remedy="pip install ray, or use --processes") from None
    ray.init(ignore_reinit_error=True, logging_level="error")
    remote: Callable[..., Any] = ray.remote(work).remote
    ray.get([remote(job, select, process=index) for index in range(processes)])
