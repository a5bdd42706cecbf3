"""Servers with OpenAI's API that run somewhere: which models each has, who is free, and who does not answer.

A worker is asked what it serves, so that an adapter which is loaded or unloaded there at run time is known here soon.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx2

from modekit.engines.adapter_folder import AdapterFolder

_LOOK_S = 2.0  # between two looks at a worker's models
_ANSWER_S = 5.0  # a worker that takes longer to say what it serves is not there
_CONNECT_S = 3.0
_KEPT_S = 2.0  # an idle connection; servers close theirs after five
_ATTEMPTS = 2


@dataclass
class Worker:
    """One server.

    Attributes:
        url: up to before `/v1`.
        models: what it serves; empty while it does not answer.
        busy: requests that it is at.
    """

    url: str
    models: frozenset[str] = frozenset()
    busy: int = 0

    @property
    def name(self) -> str:
        """Host and port."""
        return self.url.partition("://")[2]


@dataclass(frozen=True)
class Answer:
    """A worker's answer, whose body is yet to come."""

    worker: Worker
    response: httpx2.Response

    def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes."""
        return self.response.aiter_bytes()


@dataclass
class Workers:
    """All of them.

    Attributes:
        urls: where they are.
        key: what they want to see, if anything.
        timeout_s: how long an answer may take.
        adapters: what they are to serve besides.
    """

    urls: Sequence[str]
    key: str | None = None
    timeout_s: float = 600.0
    adapters: AdapterFolder | None = None
    all: list[Worker] = field(init=False)
    _client: httpx2.AsyncClient = field(init=False)

    def __post_init__(self) -> None:
        self.all = [Worker(url.rstrip("/").removesuffix("/v1")) for url in self.urls]
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        limit = httpx2.Timeout(self.timeout_s, connect=_CONNECT_S)
        self._client = httpx2.AsyncClient(
            headers=headers, timeout=limit, trust_env=False, limits=httpx2.Limits(keepalive_expiry=_KEPT_S)
        )

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
            answer = await self._client.get(f"{worker.url}/v1/models", timeout=_ANSWER_S)
            worker.models = frozenset(str(each["id"]) for each in answer.raise_for_status().json()["data"])
        except Exception:  # whatever is wrong with what it says, it serves nothing
            worker.models = frozenset()

    @asynccontextmanager
    async def asked(self, model: str, path: str, body: bytes) -> AsyncIterator[Answer | None]:
        """The answer of the least busy worker that serves a model; of the next one where it gives none; None where nobody does.

        Once an answer has begun, nobody else is asked. Raises httpx2.TimeoutException where a worker takes too long, as another
        one would.
        """
        tried: Counter[str] = Counter()
        while (worker := self._free(model, tried)) is not None:
            tried[worker.url] += 1
            worker.busy += 1
            try:
                response = await self._send(worker, path, body, tried)
                if response is None:
                    continue
                try:
                    if response.status_code >= 500 and self._free(model, tried) is not None:
                        continue
                    yield Answer(worker, response)
                    return
                finally:
                    await response.aclose()
            finally:
                worker.busy -= 1
        yield None

    async def _send(self, worker: Worker, path: str, body: bytes, tried: Counter[str]) -> httpx2.Response | None:
        """A worker's answer, whose body is yet to come; None where there is none."""
        request = self._client.build_request("POST", worker.url + path, content=body, headers=_JSON)
        try:
            return await self._client.send(request, stream=True)
        except httpx2.ConnectTimeout:
            tried[worker.url] = _ATTEMPTS
        except httpx2.TimeoutException:
            raise
        except httpx2.TransportError as error:  # once more where it may just have closed a connection that was kept
            if isinstance(error, httpx2.ConnectError):
                worker.models = frozenset()  # until it says again what it serves
                tried[worker.url] = _ATTEMPTS
        return None

    def _free(self, model: str, tried: Counter[str]) -> Worker | None:
        able = [worker for worker in self.all if model in worker.models and tried[worker.url] < _ATTEMPTS]
        return min(able, key=lambda worker: (tried[worker.url], worker.busy), default=None)

    async def close(self) -> None:
        """Let go of all connections."""
        await self._client.aclose()


_JSON: Mapping[str, str] = {"Content-Type": "application/json"}
