"""A search that Ray places: on the cluster that RAY_ADDRESS names, else on a Ray of its own, which ends with the command.

| RAY_ADDRESS | where the processes run |
|---|---|
| not set, or local | a Ray that is started here and ended again |
| auto | the cluster that `ray start` made this machine a part of |
| HOST:PORT | the cluster whose head this is; this machine must be a part of it |
| ray://HOST:PORT | a cluster that this machine is no part of, by way of its head |
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from modekit.errors import ModekitError, TuneError
from modekit.files.read import UNREADABLE, read_text
from modekit.files.typed import shortened
from modekit.run import Run
from modekit.search.tune.selection import Selection
from modekit.search.tune.study import Job, is_done, open_study, work

ADDRESS = "RAY_ADDRESS"
"""The environment variable by which Ray is told of a cluster."""
INSTALL = "pip install 'modekit[ray]', or use --processes"
_GO_ON = "see what it says; the same command goes on from what is there, with --processes 1 in less memory"
_ANSWER_S = 5.0  # in which a head must answer: Ray itself would try for two minutes, and longer
_LOOK_S = 1.0  # between two looks at how far the search is
_STORE = 2**27  # bytes that the processes share: what they are sent is text in tokens
# Ray speaks HTTP/2: each end begins with its settings, the client's after a line by which it is known.
_NO_SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # length, kind, flags, stream
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _NO_SETTINGS


def search_on_ray(job: Job, selection: Selection, processes: int, run: Run) -> None:
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


def check_ray() -> str:
    """The address that Ray is to be given. Raises TuneError where nobody answers there, or Ray is not installed."""
    address = os.environ.get(ADDRESS, "").strip() or "local"
    check_answers(address)
    try:
        import_module("ray")
    except ImportError:
        raise TuneError("Ray is not installed", where="--ray", remedy=INSTALL) from None
    return address


def _work_there(job: Job, selection: Selection, process: int) -> None:
    """What Ray runs, on whichever machine."""
    if not job.work.is_dir():
        raise TuneError(
            "a machine of the cluster does not see the search's folder",
            where=f"{socket.gethostname()}: {job.work}",
            remedy="put recipe, models, texts and OUT where all machines have them, by the same paths",
        )
    work(job, selection, process=process)


def _check_end(ray: Any, ended: object, job: Job) -> None:
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
    try:
        _start(ray, address, processes)
        yield
    finally:
        ray.shutdown()


def _start(ray: Any, address: str, processes: int) -> None:
    """Start Ray, or join a cluster. Raises TuneError."""
    settings: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "error"}
    if address == "local":
        cores = max(processes, os.cpu_count() or 1)
        settings |= {"include_dashboard": False, "num_cpus": cores, "object_store_memory": _STORE}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reads it, here and in all that it starts
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


def check_answers(address: str) -> None:
    """Raise TuneError in seconds where no Ray answers at an address."""
    if address == "local":
        return
    named = _last_started() if address == "auto" else address.removeprefix("ray://")
    if named is None:  # Ray looks for itself, and says soon when there is none
        return
    where = f"{ADDRESS}={address}" + (f" ({named})" if address == "auto" else "")
    try:
        answer = _greeted(*_host_and_port(named))
    except OSError as error:
        raise _no_answer(where, error.strerror or str(error) or type(error).__name__) from None
    except ValueError:
        raise TuneError(
            "that is no address of a Ray cluster",
            where=where,
            expected="HOST:PORT, ray://HOST:PORT or auto",
            remedy=f"correct {ADDRESS}, or unset it: Ray is then started here",
        ) from None
    if answer is not None and answer[3:4] != _NO_SETTINGS[3:4]:
        raise _no_answer(where, "a server that is not Ray")


def _no_answer(where: str, found: str) -> TuneError:
    return TuneError(
        "the Ray cluster does not answer",
        where=where,
        found=found,
        remedy=f"see whether it runs (`ray status`), or unset {ADDRESS}: Ray is then started here",
    )


def _last_started() -> str | None:
    """Where `ray start` has noted the head of this machine's cluster."""
    try:
        return read_text(Path(os.environ.get("RAY_TMPDIR") or gettempdir()) / "ray" / "ray_current_cluster").strip() or None
    except UNREADABLE:
        return None


def _host_and_port(address: str) -> tuple[str, int]:
    """Of HOST:PORT. Raises ValueError."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or "/" in address or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(address)
    return host.strip("[]"), int(port)


def _greeted(host: str, port: int) -> bytes | None:
    """The first bytes of a server's answer; None where it speaks TLS, and only that it is there is known. Raises OSError."""
    with socket.create_connection((host, port), timeout=_ANSWER_S) as connection:
        if os.environ.get("RAY_USE_TLS", "0") != "0":
            return None
        connection.sendall(_GREETING)
        return connection.recv(len(_NO_SETTINGS))
