"""Servers with OpenAI's API that run somewhere: which models each has, who is free, who does not answer; and their adapters.

Workers load and let go the adapters of a folder, as `modekit export OUT FOLDER` writes it, while they run. They must see it
under the same path and take adapters at run time, as vLLM does with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from modekit.sources.adapter import WEIGHTS_FILE

_LOAD, _UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
_LOAD_S = 120.0  # in which a worker must have read an adapter
_LOG = logging.getLogger("modekit.front")


@dataclass(frozen=True)
class Version:
    """An adapter as it lies there: its folder, and when its file was written, in nanoseconds."""

    folder: Path
    written: int

    @property
    def spelling(self) -> str:
        """The folder's path, spelled otherwise for every version: vLLM keeps what it computed by an adapter under this path.

        The bits of `written`, as steps that lead nowhere: `/.` for a one, `/` for a zero.
        """
        steps = f"{self.written % 2**64:b}".replace("0", "/").replace("1", "/.")
        return f"{self.folder}{steps}/."


@dataclass
class AdapterFolder:
    """Which adapters are there, and which worker has loaded which. `names`: expert -> its name at the workers, where that is
    another.
    """

    folder: Path
    experts: Sequence[str]
    names: Mapping[str, str] = field(default_factory=dict)
    _told: dict[tuple[str, str], Version] = field(default_factory=dict)  # by the worker's URL and the model's name
    _failed: dict[tuple[str, str], Version] = field(default_factory=dict)
    _unable: set[str] = field(default_factory=set)

    async def bring_to(self, url: str, models: frozenset[str], client: aiohttp.ClientSession) -> bool:
        """Have a worker, which serves `models`, load what is new or written again, and let go what is gone.

        An adapter that it serves under such a name, but not loaded from here, is loaded again: its version is unknown.
        Returns whether anything was changed.
        """
        there, changed = self._there(), False
        for model in {*there, *(model for known, model in self._told if known == url)}:
            version, at = there.get(model), (url, model)
            if url in self._unable or (version is not None and self._failed.get(at) == version):
                continue
            served = model in models
            if served and version == self._told.get(at):
                continue
            if served and not await self._tell(url, _UNLOAD, {"lora_name": model}, client):
                continue
            self._told.pop(at, None)
            changed = True
            if version is not None:
                request = {"lora_name": model, "lora_path": version.spelling}
                known = self._told if await self._tell(url, _LOAD, request, client) else self._failed
                known[at] = version
        return changed

    def forget(self, url: str) -> None:
        """A worker does not answer: it may be another one when it comes back, and able to do what it was not."""
        self._unable.discard(url)
        for at in [at for at in self._failed if at[0] == url]:
            del self._failed[at]

    def _there(self) -> dict[str, Version]:
        """By the model's name."""
        found = {}
        for expert in self.experts:
            try:
                written = (self.folder / expert / WEIGHTS_FILE).stat().st_mtime_ns
            except OSError:
                continue
            found[self.names.get(expert, expert)] = Version(self.folder / expert, written)
        return found

    async def _tell(self, url: str, path: str, request: Mapping[str, str], client: aiohttp.ClientSession) -> bool:
        limit = aiohttp.ClientTimeout(_LOAD_S)
        try:
            async with client.post(url + path, json=dict(request), timeout=limit, allow_redirects=False) as answer:
                status, said = answer.status, await answer.read()
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            self._log(url, request["lora_name"], path, type(error).__name__)
            return False
        if status == 405 or (status == 404 and b'"error"' not in said):  # no such command
            self._unable.add(url)
        if status >= 400:
            self._log(url, request["lora_name"], path, f"status {status}")
        return status < 400

    @staticmethod
    def _log(url: str, adapter: str, path: str, found: str) -> None:
        _LOG.warning("%s", json.dumps({"worker": url, "adapter": adapter, "asked": path, "found": found}))


_LOOK_S = 2.0  # between two looks at a worker's models
_ANSWER_S = 5.0  # a worker that takes longer to say what it serves is not there
_CONNECT_S = 3.0
_KEPT_S = 2.0  # an idle connection; servers close theirs after five
_ATTEMPTS = 2
_SHORT = 2**20  # bytes of an answer that is taken whole before it goes on


@dataclass
class Worker:
    """One server: its URL up to before `/v1`, what it serves (nothing while it does not answer), requests that it is at."""

    url: str
    models: frozenset[str] = frozenset()
    busy: int = 0

    @property
    def name(self) -> str:
        """Host and port."""
        return self.url.partition("://")[2]


@dataclass
class WorkerPool:
    """All of them. `key`: what they want to see, if anything."""

    urls: Sequence[str]
    key: str | None = None
    timeout_s: float = 600.0
    adapters: AdapterFolder | None = None
    all: list[Worker] = field(init=False)
    _client: aiohttp.ClientSession = field(init=False)

    def __post_init__(self) -> None:
        self.all = [Worker(url.rstrip("/").removesuffix("/v1")) for url in self.urls]

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """While open, workers can be asked; afterwards no connection is left."""
        headers = {"Accept-Encoding": "identity", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        limit = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=self.timeout_s)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEPT_S, ttl_dns_cache=int(_LOOK_S))
        jar = aiohttp.DummyCookieJar()  # what a worker sets for one client is no other's
        async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=limit, cookie_jar=jar) as self._client:
            yield

    @property
    def models(self) -> set[str]:
        """What is served by anyone."""
        return {model for worker in self.all for model in worker.models}

    async def look(self) -> None:
        """Ask every worker what it serves."""
        await asyncio.gather(*map(self._look_at, self.all))

    async def keep_looking(self) -> None:
        """Do so for ever, at each by itself, so that one which hangs does not hold up the others; and bring them adapters."""
        await asyncio.gather(*map(self._keep_looking_at, self.all))

    async def _keep_looking_at(self, worker: Worker) -> None:
        while True:
            await self._bring_adapters(worker)
            await asyncio.sleep(_LOOK_S)
            await self._look_at(worker)

    async def _bring_adapters(self, worker: Worker) -> None:
        if self.adapters is None:
            return
        if not worker.models:
            self.adapters.forget(worker.url)
        elif await self.adapters.bring_to(worker.url, worker.models, self._client):
            await self._look_at(worker)

    async def _look_at(self, worker: Worker) -> None:
        try:
            limit = aiohttp.ClientTimeout(_ANSWER_S)
            async with self._client.get(f"{worker.url}/v1/models", timeout=limit, allow_redirects=False) as answer:
                answer.raise_for_status()
                worker.models = frozenset(str(each["id"]) for each in (await answer.json(content_type=None))["data"])
        except Exception:  # whatever is wrong with what it says, it serves nothing
            worker.models = frozenset()

    @asynccontextmanager
    async def asked(self, model: str, path: str, body: bytes) -> AsyncIterator[aiohttp.ClientResponse | None]:
        """The answer of the least busy worker that serves a model; of the next one where it gives none; None where nobody does.

        Once an answer goes on, nobody else is asked. Raises asyncio.TimeoutError where one takes too long, as another would.
        """
        tried: Counter[str] = Counter()
        while (worker := self._free(model, tried)) is not None:
            tried[worker.url] += 1
            worker.busy += 1
            try:
                answer = await self._send(worker, path, body, tried)
                if answer is None:
                    continue
                try:
                    if answer.status >= 500 and self._free(model, tried) is not None:
                        continue
                    yield answer
                    return
                finally:
                    answer.release()
            finally:
                worker.busy -= 1
        yield None

    async def _send(self, worker: Worker, path: str, body: bytes, tried: Counter[str]) -> aiohttp.ClientResponse | None:
        """A worker's answer; None where there is none, or not all of a short one."""
        try:
            response = await self._client.post(worker.url + path, data=body, headers=_JSON, allow_redirects=False)
            if is_short(response):
                await response.read()  # and keep it
            return response
        except aiohttp.ConnectionTimeoutError:
            tried[worker.url] = _ATTEMPTS
        except asyncio.TimeoutError:
            raise
        except aiohttp.ClientError as error:  # once more where it may just have closed a connection that was kept
            if isinstance(error, aiohttp.ClientConnectorError):
                worker.models = frozenset()  # until it says again what it serves
                tried[worker.url] = _ATTEMPTS
        return None

    def _free(self, model: str, tried: Counter[str]) -> Worker | None:
        able = [worker for worker in self.all if model in worker.models and tried[worker.url] < _ATTEMPTS]
        return min(able, key=lambda worker: (tried[worker.url], worker.busy), default=None)


def is_short(response: aiohttp.ClientResponse) -> bool:
    """Whether an answer is read whole before it goes on."""
    return response.content_length is not None and response.content_length <= _SHORT


_JSON: Mapping[str, str] = {"Content-Type": "application/json"}
