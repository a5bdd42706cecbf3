"""One mixture behind an OpenAI-compatible API, in the engine that fits it: `modekit serve OUT`.

Clients ask this process (proxy.py), which bounds what they may ask.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from modekit.checkpoint.checkpoint import Checkpoint, refuse_pairs
from modekit.engines.child import Child
from modekit.engines.listening import KEY, answering, bound_socket, key_in, refuse_other_machines, url_of
from modekit.engines.registry import ENGINES, INSTALL, EngineName, ServeSettings
from modekit.engines.sampling import context_of
from modekit.engines.supervisor import Supervisor
from modekit.engines.threads import default_threads, threads_environment
from modekit.errors import UnsupportedError, check_packages
from modekit.run import QUIET, Run

_INNER = "127.0.0.1"  # where engines listen
_PARALLEL = 4


@dataclass(frozen=True)
class ServedMixture:
    """A mixture that is being served: where, by which engine and why, with how many threads (None: as the engine likes)."""

    address: str
    engine: str
    why: str
    threads: int | None
    supervisor: Supervisor


def choose_engine(checkpoint: Checkpoint, asked: EngineName) -> tuple[str, str]:
    """The engine for a mixture, and why it is that one. Raises UnsupportedError when none can serve it, or not the one asked
    for.
    """
    refuse_pairs(checkpoint, "no engine can serve the mixture", option="" if asked == "auto" else f"--engine {asked}")
    if asked != "auto":
        reason = ENGINES[asked].refusal(checkpoint)
        if reason is None:
            return asked, "asked for"
        raise UnsupportedError(
            "the engine cannot serve the mixture",
            where=f"{checkpoint.folder}: --engine {asked}",
            found=reason,
            remedy="leave --engine out, and one that can is taken",
        )
    refused: list[str] = []
    for name, engine in ENGINES.items():
        reason = engine.refusal(checkpoint)
        if reason is None:
            return name, "; ".join(refused) or "it fits"
        refused.append(f"not {name}: {reason}")
    raise UnsupportedError(
        "no engine here can serve the mixture", where=str(checkpoint.folder), found="; ".join(refused), remedy=INSTALL
    )


@contextmanager
def serving(checkpoint: Checkpoint, settings: ServeSettings, *, run: Run = QUIET) -> Iterator[ServedMixture]:
    """Start an engine with a mixture; it listens inside the block. Raises UnsupportedError and EngineError before it listens,
    never at the first request.
    """
    check_packages(("starlette", "uvicorn", "aiohttp"), INSTALL)
    from modekit.engines.proxy import Proxy
    from modekit.engines.request_template import RequestTemplate
    from modekit.loaded.load import load_tokenizer

    name, why = choose_engine(checkpoint, settings.engine)
    engine, key = ENGINES[name], key_in(KEY)
    if key is None and not settings.no_key:
        refuse_other_machines(settings.host)
    threads = (settings.threads or default_threads()) if "threads" in engine.options else None  # of the load before the proof
    with bound_socket(settings.host, settings.port) as listener:
        inner_key = secrets.token_urlsafe()
        wanted = {
            **{"host": _INNER, "port": 0, "name": checkpoint.folder.name, "key": inner_key},
            "context": context_of(checkpoint, settings.context),
            "parallel": settings.parallel or _PARALLEL,
            "threads": threads,
            **engine.prepared(checkpoint, settings, run),
        }
        environment = {
            "HF_HUB_OFFLINE": "1",
            KEY: inner_key,
            **engine.environment(),
            **(threads_environment(threads) if threads else {}),
        }
        run.begin(f"start {name}")
        with Supervisor(name, lambda: Child(f"modekit.engines.{name}_process", wanted, environment)) as supervisor:
            template = None if engine.bounds_template else RequestTemplate(load_tokenizer(checkpoint.folder, run=run))
            app = Proxy(supervisor, engine, checkpoint.folder.name, inner_key, template).app(key)
            with answering(app, listener):
                yield ServedMixture(url_of(*listener.getsockname()[:2]), name, why, threads, supervisor)
