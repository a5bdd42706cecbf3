"""The front as a server: `modekit front OUT --worker URL`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.engines.listening import KEY, bound_socket, key_in, refuse_other_machines, server_of, url_of
from modekit.engines.registry import INSTALL
from modekit.errors import EngineError, check_packages
from modekit.recipes.strict import BASE, Strict
from modekit.run import QUIET, Run

if TYPE_CHECKING:
    from modekit.engines.front import Front

WORKERS_KEY = "MODEKIT_WORKERS_KEY"
"""The environment variable with the key that the front sends to workers; unset: none."""
_EVERYWHERE = "0.0.0.0"


class FrontSettings(Strict):
    """Whom the front passes requests to: what `modekit front` and deploy/ray_serve.yaml both take. `names`: EXPERT=MODEL, where
    the workers call an expert, or `base`, otherwise.
    """

    workers: Sequence[str]
    names: Sequence[str] = ()
    timeout: float = Field(600.0, ge=1)
    adapters: Annotated[Path, Field(strict=False)] | None = None
    no_key: bool = False


def run_front(
    checkpoint: Checkpoint, settings: FrontSettings, host: str, port: int, listening: Callable[[str], None], *, run: Run = QUIET
) -> None:
    """Serve until interrupted; `listening` is called with the address once the server listens. Raises UnsupportedError when the
    mixture's router needs the model; EngineError when it cannot listen.
    """
    front = front_of(checkpoint, settings, host, run=run)
    with bound_socket(host, port) as listener:
        logging.getLogger("modekit.front").setLevel(logging.INFO)
        logging.basicConfig(format="%(message)s")
        server = server_of(front.app(), listener)
        listening(url_of(*listener.getsockname()[:2]))
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listener])


def front_of(checkpoint: Checkpoint, settings: FrontSettings, host: str = _EVERYWHERE, *, run: Run = QUIET) -> Front:
    """A front that does not listen yet, for the address `host`; the keys are those of the environment. Raises UnsupportedError
    when the mixture's router needs the model; EngineError for settings that fit no mixture or server.
    """
    check_packages(("starlette", "uvicorn", "aiohttp", "prometheus_client"), INSTALL)
    key, workers_key = key_in(KEY), key_in(WORKERS_KEY)
    if key is None and not settings.no_key:
        refuse_other_machines(host)
    from modekit.engines.front import Front
    from modekit.engines.workers import AdapterFolder, WorkerPool
    from modekit.routing.text_router import TextRouter

    names = checked_names(checkpoint, settings.names)
    if settings.adapters is not None and not settings.adapters.is_dir():
        raise EngineError(
            "there is no such folder", where=f"--adapters {settings.adapters}", remedy="make it: modekit export OUT FOLDER"
        )
    _check_urls(settings.workers)
    router = TextRouter(checkpoint, run=run)
    adapters = None if settings.adapters is None else AdapterFolder(settings.adapters, checkpoint.names, names)
    workers = WorkerPool(settings.workers, workers_key, settings.timeout, adapters)
    return Front(router, workers, names, key)


def checked_names(checkpoint: Checkpoint, given: Sequence[str]) -> dict[str, str]:
    """Expert -> what the workers call it. Raises EngineError for an expert that there is not."""
    names: dict[str, str] = {}
    known = [*checkpoint.names, BASE]
    for each in given:
        expert, equals, model = each.partition("=")
        if expert not in known or not equals or not model:
            raise EngineError(
                "this names no expert's model",
                where="--name",
                found=each,
                expected=f"EXPERT=MODEL of {', '.join(known)}",
                remedy="name an expert of the mixture",
            )
        names[expert] = model
    return names


def _check_urls(urls: Sequence[str]) -> None:
    """Raise EngineError for what is no address of a server. A key belongs into the environment, not into an address."""
    from yarl import URL

    for url in urls:
        try:
            parsed = URL(url)
            named = parsed.user is not None or parsed.password is not None
            good = parsed.scheme in {"http", "https"} and parsed.host and not named and not parsed.query_string
        except ValueError:
            good = False
        if not good or parsed.path.rstrip("/") not in {"", "/v1"}:
            raise EngineError(
                "this is no address of a server",
                where="--worker",
                found=url,
                expected="such as http://127.0.0.1:8001",
                remedy=f"correct it; a key that the workers want is {WORKERS_KEY} in the environment",
            )
