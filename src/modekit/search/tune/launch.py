"""A search in this process, in several on this machine, or where Ray puts them: the same function everywhere.

With Ray, RAY_ADDRESS says where the processes run (docs/tune.md).
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import gettempdir
from typing import Any
from urllib.parse import urlsplit

from modekit.errors import ModekitError, TuneError, check_packages
from modekit.files.read import UNREADABLE, read_text
from modekit.files.typed import shortened
from modekit.run import Run
from modekit.search.tune.selection import Selection
from modekit.search.tune.study import SearchJob, is_done, open_study, work

ADDRESS = "RAY_ADDRESS"
"""The environment variable that names a Ray cluster."""
_GO_ON = "see the messages above; the same command continues from what is there, with --processes 1 in less memory"
_ANSWER_S = 5.0  # in which a head must answer: Ray itself would try for two minutes, and longer
_LOOK_S = 1.0  # between two looks at how far the search is
_STORE = 2**27  # bytes that the processes share: what they are sent is text in tokens


def launch(job: SearchJob, select: Selection, processes: int, ray: bool, run: Run) -> None:
    """Search until there are `trials` candidates. Raises what `work` raises, and TuneError when another process ended early."""
    if ray:
        search_on_ray(job, select, processes, run)
    elif processes > 1:
        _search_here(job, select, processes, run)
    else:
        work(job, select, run)


def _search_here(job: SearchJob, select: Selection, processes: int, run: Run) -> None:
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


def search_on_ray(job: SearchJob, selection: Selection, processes: int, run: Run) -> None:
    """Search until there are `trials` candidates. Raises what a process raises, and TuneError for all that is Ray's."""
    address = check_ray()
    ray: Any = import_module("ray")
    with _connected(ray, address, processes):
        remote = ray.remote(max_retries=0, **share_of(ray.nodes(), processes))(_work_there)
        shared = ray.put(selection)
        waiting = [remote.remote(job, shared, index) for index in range(processes)]
        study = open_study(job)
        while waiting:
            ended, waiting = ray.wait(waiting, timeout=_LOOK_S)
            is_done(job, study, run)
            for each in ended:
                _check_end(ray, each, job)


def _work_there(job: SearchJob, selection: Selection, process: int) -> None:
    """What Ray runs, on whichever machine."""
    if not job.work.is_dir():
        raise TuneError(
            "a machine of the cluster does not see the search's folder",
            where=f"{socket.gethostname()}: {job.work}",
            remedy="put recipe, models, texts and OUT where all machines have them, by the same paths",
        )
    work(job, selection, process=process)


def _check_end(ray: Any, ended: object, job: SearchJob) -> None:
    """Raise what a process has raised: our own errors as they are, any other, and its death, as TuneError."""
    try:
        ray.get(ended)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, ModekitError):
            raise cause from None
        raise TuneError(
            "a process of the search ended early",
            where=str(job.work),
            found=f"{type(cause).__name__}: {shortened(cause)}",
            remedy=_GO_ON,
        ) from None


@contextmanager
def _connected(ray: Any, address: str, processes: int) -> Iterator[None]:
    """While open, Ray is there; one that was started for it is gone afterwards. Raises TuneError."""
    if ray.is_initialized():  # by whoever calls this from Python, and ends it
        yield
        return
    settings: dict[str, object] = {"address": address, "log_to_driver": False, "logging_level": "error"}
    if address == "local":
        cores = max(processes, os.cpu_count() or 1)
        settings |= {"include_dashboard": False, "num_cpus": cores, "object_store_memory": _STORE}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reads it, here and in all that it starts
    try:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ray.init(**settings)
        except (Exception, SystemExit) as error:  # Ray ends the process where it gives up
            raise TuneError(
                "Ray does not start" if address == "local" else "the Ray cluster cannot be joined",
                where=f"{ADDRESS}={address}",
                found=shortened(error) or type(error).__name__,
                remedy="all machines need the same Ray and Python; without RAY_ADDRESS Ray is started here",
            ) from None
        yield
    finally:
        ray.shutdown()


def share_of(nodes: Sequence[Mapping[str, Any]], processes: int) -> dict[str, float]:
    """Cores and accelerator that each process asks for: as many as leave room for all of them at once.

    By default Ray lets a process have one core, whatever there is. Machines without an accelerator are left out where others
    have one.
    """
    alive = [node["Resources"] for node in nodes if node.get("Alive")]
    accelerators = sum(int(node.get("GPU", 0)) for node in alive)
    cores = [int(node.get("CPU", 0)) for node in alive if node.get("GPU") or not accelerators]
    fitting = (each for each in range(max(cores, default=1), 1, -1) if sum(own // each for own in cores) >= processes)
    share: dict[str, float] = {"num_cpus": next(fitting, 1)}
    return share | ({"num_gpus": 1 / -(-processes // accelerators)} if accelerators else {})


def check_ray() -> str:
    """The address for Ray. Raises TuneError where nothing answers there, ModekitError where Ray is not installed."""
    address = os.environ.get(ADDRESS, "").strip() or "local"
    check_answers(address)
    check_packages(("ray",), "pip install 'modekit[ray]', or use --processes")
    return address


def check_answers(address: str) -> None:
    """Raise TuneError in seconds where nothing answers at an address."""
    named = None if address == "local" else _last_started() if address == "auto" else address.removeprefix("ray://")
    if named is None:  # Ray looks for itself, and says soon when there is none
        return
    where = f"{ADDRESS}={address}" + (f" ({named})" if address == "auto" else "")
    try:
        parts = urlsplit(f"//{named}")
        if not parts.hostname or not parts.port or parts.path:
            raise ValueError
    except ValueError:
        raise TuneError(
            "that is no address of a Ray cluster",
            where=where,
            expected="HOST:PORT, ray://HOST:PORT or auto",
            remedy=f"correct {ADDRESS}, or unset it: Ray is then started here",
        ) from None
    try:
        socket.create_connection((parts.hostname, parts.port), timeout=_ANSWER_S).close()
    except OSError as error:
        raise TuneError(
            "the Ray cluster does not answer",
            where=where,
            found=error.strerror or str(error) or type(error).__name__,
            remedy=f"see whether it runs (`ray status`), or unset {ADDRESS}: Ray is then started here",
        ) from None


def _last_started() -> str | None:
    """Where `ray start` has noted the head of this machine's cluster."""
    try:
        return read_text(Path(os.environ.get("RAY_TMPDIR") or gettempdir()) / "ray" / "ray_current_cluster").strip() or None
    except UNREADABLE:
        return None
