"""A search in this process, in several on this machine, or where Ray puts them: the same function everywhere."""

from __future__ import annotations

import multiprocessing

from modekit.errors import TuneError
from modekit.run import Run
from modekit.search.tune.on_ray import search_on_ray
from modekit.search.tune.selection import Selection
from modekit.search.tune.study import Job, work

_GO_ON = "see what it said above; the same command goes on from what is there, with --processes 1 in less memory"


def launch(job: Job, select: Selection, processes: int, ray: bool, run: Run) -> None:
    """Search until there are `trials` candidates. Raises what `work` raises, and TuneError when another process ended early."""
    if ray:
        search_on_ray(job, select, processes, run)
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
