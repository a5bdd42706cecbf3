"""One mixture behind an OpenAI-compatible API: `modekit serve OUT` starts the server of the engine that fits, waits until it
answers, starts it again where it dies, and ends it.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import refuse_pairs
from modekit.engines.child import KEY, Child, ProcessSettings, default_threads, threads_environment
from modekit.engines.registry import ENGINES, INSTALL, EngineName, ServeSettings
from modekit.errors import CheckpointError, EngineError, UnsupportedError
from modekit.run import QUIET, Run

_PARALLEL = 4
LONGEST = 8_192
"""Tokens of a context that nobody asked for: engines keep memory for all of it."""
_FAILURES = 3
_NONE: Mapping[str, str] = {}
_STEADY_S = 60.0
_LOG = logging.getLogger("modekit.serve")


@dataclass
class ServedMixture:
    """A mixture that is being served: where, by which engine and why, with how many threads (None: as the engine likes)."""

    address: str
    engine: str
    why: str
    threads: int | None
    start: Callable[[], Child]
    child: Child

    def wait(self) -> None:
        """Keep the engine running. Raises EngineError once it has ended three times, never having answered for a minute."""
        failures: int = 0
        answered: float | None = time.monotonic()
        while True:
            while self.child.answer() is not None:
                answered = time.monotonic()
            steady = answered is not None and time.monotonic() - answered >= _STEADY_S
            failures = 1 if steady else failures + 1
            complaint = self.child.complaint()
            self.child.stop()
            if failures == _FAILURES:
                raise EngineError(
                    f"the engine ended {_FAILURES} times, each time before it had answered for {_STEADY_S:.0f} seconds",
                    where=self.engine,
                    found=complaint,
                    remedy="read its message, then serve again",
                )
            _LOG.warning("%s ended and is started again: %s", self.engine, complaint)
            self.child, answered = self.start(), None


def choose_engine(checkpoint: Checkpoint, asked: EngineName, failed: Mapping[str, str] = _NONE) -> tuple[str, str]:
    """The engine for a mixture, and why it is that one; none that has `failed`, for the reason given there. Raises
    UnsupportedError when none can serve it, or not the one asked for.
    """
    refuse_pairs(checkpoint, "no engine can serve the mixture")
    refused: list[str] = []
    for name in ENGINES if asked == "auto" else [asked]:
        reason = failed.get(name) or ENGINES[name].refusal(checkpoint.shape)
        if reason is None:
            return name, "; ".join(refused) or "it fits"
        refused.append(f"not {name}: {reason}")
    raise UnsupportedError(
        "the mixture cannot be served",
        where=str(checkpoint.folder),
        found="; ".join(refused),
        remedy=INSTALL if asked == "auto" else "leave --engine out, and one that can is taken",
    )


def without_effect(settings: ServeSettings, engine: str) -> dict[str, object]:
    """Options that were given, and that an engine does not read, with their values."""
    options = {option for each in ENGINES.values() for option in each.options} - ENGINES[engine].options
    return {f"--{name}": value for name in sorted(options) if (value := getattr(settings, name)) is not None}


def _prepared(
    checkpoint: Checkpoint, settings: ServeSettings, run: Run, failed: Mapping[str, str]
) -> tuple[str, str, ProcessSettings]:
    """The engine, why it is that one, and what its process needs to know. After an engine that turns out not to run the mixture
    comes the next one, if that reads all options that were given. Raises UnsupportedError and EngineError.
    """
    name, why = choose_engine(checkpoint, settings.engine, failed)
    try:
        return name, why, ENGINES[name].prepared(checkpoint, settings, run)
    except EngineError as error:
        failed = {**failed, name: error.what}
        if settings.engine != "auto" or without_effect(settings, choose_engine(checkpoint, "auto", failed)[0]):
            raise
    return _prepared(checkpoint, settings, run, failed)


def context_of(checkpoint: Checkpoint, asked: int | None) -> int:
    """Tokens of a conversation: those that were asked for, else what the model was trained to read, at most LONGEST. Raises
    EngineError for more than it was trained for; CheckpointError where its config does not say.
    """
    longest = checkpoint.config.get("max_position_embeddings")
    if type(longest) is not int or longest < 1:
        raise CheckpointError(
            "config.json does not say how long a text may be",
            where=f"{checkpoint.folder}: max_position_embeddings",
            found=longest,
            expected="a whole number of tokens",
            remedy="add what the base model's config.json says",
        )
    if asked is not None and asked > longest:
        raise EngineError(
            "the context is longer than the model's",
            where="--context",
            found=asked,
            expected=f"at most {longest}",
            remedy="ask for less; the model was not trained for more",
        )
    return asked or min(longest, LONGEST)


def key_of_clients(host: str, *, no_key: bool) -> str | None:
    """The key in the environment; None where clients need none. Raises EngineError where other machines could reach `host`
    without one.
    """
    key = os.environ.get(KEY, "").strip() or None
    if key is None and not no_key and not _is_local(host):
        raise EngineError(
            "other machines could send requests without a key",
            where=f"--host {host}",
            found=f"no {KEY} in the environment",
            remedy=f"set {KEY} to the key that clients must send; --no-key serves everybody who reaches the address",
        )
    return key


def _is_local(host: str) -> bool:
    try:
        found = {str(address[0]) for *_, address in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return True  # it cannot be listened on either, which is another error
    return all(ip_address(each.partition("%")[0]).is_loopback for each in found)


def free_port(host: str, port: int) -> int:
    """The port, or for 0 one that nobody listens on now. Raises EngineError when it cannot be listened on."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as bound:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            return int(bound.getsockname()[1])
    except (OSError, UnicodeError) as error:
        raise EngineError(
            "the address cannot be listened on",
            where=f"{host}:{port}",
            found=getattr(error, "strerror", None) or str(error),
            remedy="choose another --port (0: any that is free) or --host",
        ) from None


@contextmanager
def serving(checkpoint: Checkpoint, settings: ServeSettings, *, run: Run = QUIET) -> Iterator[ServedMixture]:
    """Start an engine with a mixture; it answers inside the block. Raises UnsupportedError and EngineError before it listens,
    never at the first request.
    """
    key = key_of_clients(settings.host, no_key=settings.no_key)
    shared = {
        **{"host": settings.host, "port": free_port(settings.host, settings.port), "name": checkpoint.folder.name, "key": key},
        "context": context_of(checkpoint, settings.context),
        "parallel": settings.parallel or _PARALLEL,
    }
    name, why, prepared = _prepared(checkpoint, settings, run, {})
    engine = ENGINES[name]
    threads = (settings.threads or default_threads()) if "threads" in engine.options else None
    wanted = {**shared, "threads": threads, **prepared}
    environment = {"HF_HUB_OFFLINE": "1", **engine.environment(), **(threads_environment(threads) if threads else {})}

    def start() -> Child:
        return Child(f"modekit.engines.{name}_process", wanted, environment)

    run.begin(f"start {name}")
    served = ServedMixture("", name, why, threads, start, start())
    try:
        ready = served.child.answer()
        if ready is None:
            raise EngineError(
                "the engine did not start",
                where=name,
                found=served.child.complaint(),
                remedy="read its message; it needs enough memory for the model",
            )
        served.address = ready["address"]
        yield served
    finally:
        served.child.stop()
