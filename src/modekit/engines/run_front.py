"""The front as a server: `modekit front OUT --worker URL`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.engines.serve import INSTALL, KEY, bound_socket, url_of
from modekit.errors import EngineError
from modekit.recipes.strict import BASE, Strict
from modekit.run import QUIET, Run

if TYPE_CHECKING:
    from modekit.engines.front import Front

WORKERS_KEY = "MODEKIT_WORKERS_KEY"
"""The environment variable with the key that the workers want to see; unset: none."""
_BACKLOG = 1_024
_GRACE_S = 5  # in which answers may end
_HEAD = 2**16  # bytes of a request's head


class FrontSettings(Strict):
    """Whom the front passes requests to: what `modekit front` and deploy/ray_serve.yaml both take.

    Attributes:
        workers: URLs of servers.
        names: EXPERT=MODEL, where the workers call an expert, or `base`, otherwise.
        timeout: seconds that an answer may take.
        adapters: a folder of adapters that workers are told to load; None: they have what they have.
    """

    workers: Sequence[str]
    names: Sequence[str] = ()
    timeout: float = Field(600.0, ge=1)
    adapters: Annotated[Path, Field(strict=False)] | None = None


@dataclass(frozen=True)
class Address:
    """Where a server listens; port 0: any that is free."""

    host: str = "127.0.0.1"
    port: int = 8000


def run_front(
    checkpoint: Checkpoint, settings: FrontSettings, at: Address, listening: Callable[[str], None], *, run: Run = QUIET
) -> None:  # fmt: skip
    """Serve until interrupted; `listening` is called with the address once it is heard.

    Raises UnsupportedError when the mixture's router needs the model; EngineError when it cannot listen.
    """
    front = front_of(checkpoint, settings, run=run)
    import uvicorn

    with bound_socket(at.host, at.port) as listener:
        listener.listen(_BACKLOG)  # who connects from now on waits until the server is up
        logging.getLogger("modekit.front").setLevel(logging.INFO)
        logging.basicConfig(format="%(message)s")
        config = uvicorn.Config(
            front.app(),
            log_level="critical",
            access_log=False,
            timeout_graceful_shutdown=_GRACE_S,
            http="h11",  # httptools, which uvicorn takes where it finds it, bounds no head
            h11_max_incomplete_event_size=_HEAD,
        )
        listening(url_of(*listener.getsockname()[:2]))
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])


def front_of(checkpoint: Checkpoint, settings: FrontSettings, *, run: Run = QUIET) -> Front:
    """A front that is not yet heard; the keys are those of the environment.

    Raises UnsupportedError when the mixture's router needs the model; EngineError for settings that fit no mixture or server.
    """
    missing = [name for name in ("starlette", "uvicorn", "aiohttp", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise EngineError("a package is missing", where=", ".join(missing), remedy=INSTALL)
    from modekit.engines.adapter_folder import AdapterFolder
    from modekit.engines.front import Front
    from modekit.engines.workers import Workers
    from modekit.routing.text_router import TextRouter

    names = checked_names(checkpoint, settings.names)
    if settings.adapters is not None and not settings.adapters.is_dir():
        raise EngineError(
            "there is no such folder", where=f"--adapters {settings.adapters}", remedy="make it: modekit export OUT FOLDER"
        )
    _check_urls(settings.workers)
    router = TextRouter(checkpoint, run=run)
    adapters = None if settings.adapters is None else AdapterFolder(settings.adapters, checkpoint.names, names)
    workers = Workers(settings.workers, os.environ.get(WORKERS_KEY), settings.timeout, adapters)
    return Front(router, workers, names, os.environ.get(KEY))


def checked_names(checkpoint: Checkpoint, given: Sequence[str]) -> dict[str, str]:
    """Expert -> what the workers call it. Raises EngineError for an expert that there is not."""
    names: dict[str, str] = {}
    known = [*checkpoint.names, BASE]
    for each in given:
        expert, equals, model = each.partition("=")
        if expert not in known or not equals or not model:
            raise EngineError(
                "that names no expert's model", where="--name", found=each, expected=f"EXPERT=MODEL of {', '.join(known)}",
                remedy="name an expert of the mixture",
            )  # fmt: skip
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
                "that is no address of a server", where="--worker", found=url, expected="such as http://127.0.0.1:8001",
                remedy=f"correct it; a key that the workers want is {WORKERS_KEY} in the environment",
            )  # fmt: skip
