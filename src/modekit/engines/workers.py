"""Servers with OpenAI's API that run somewhere: which models each has, who is free, and who does not answer.

A worker is asked what it serves, so that an adapter which is loaded or unloaded there at run time is known here soon.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx2

_LOOK_S = 2.0  # between two looks at a worker's models
_ANSWER_S = 5.0  # a worker that takes longer to say what it serves is not there
_CONNECT_S = 3.0


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
    """All of them. `key` is what they want to see, if anything."""

    urls: Sequence[str]
    key: str | None = None
    timeout_s: float = 600.0
    all: list[Worker] = field(init=False)
    _client: httpx2.AsyncClient = field(init=False)

    def __post_init__(self) -> None:
        self.all = [Worker(url.rstrip("/").removesuffix("/v1")) for url in self.urls]
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        limit = httpx2.Timeout(self.timeout_s, connect=_CONNECT_S)
        self._client = httpx2.AsyncClient(
            headers=headers, timeout=limit, trust_env=False, limits=httpx2.Limits(max_connections=None)
        )

    @property
    def models(self) -> set[str]:
        """What is served by anyone."""
        return {model for worker in self.all for model in worker.models}

    async def look(self) -> None:
        """Ask every worker what it serves."""
        await asyncio.gather(*map(self._look_at, self.all))

    async def keep_looking(self) -> None:
        """Do so for ever."""
        while True:
            started = time.monotonic()
            await self.look()
            await asyncio.sleep(max(0.0, _LOOK_S - (time.monotonic() - started)))

    async def _look_at(self, worker: Worker) -> None:
        try:
            answer = await self._client.get(f"{worker.url}/v1/models", timeout=_ANSWER_S)
            worker.models = frozenset(str(each["id"]) for each in answer.raise_for_status().json()["data"])
        except (httpx2.HTTPError, ValueError, KeyError, TypeError):
            worker.models = frozenset()

    @asynccontextmanager
    async def asked(self, model: str, path: str, body: bytes) -> AsyncIterator[Answer | None]:
        """The answer of the least busy worker that serves a model; of the next one where it gives none; None where nobody does.

        Once an answer has begun, nobody else is asked.
        """
        tried: set[str] = set()
        while (worker := self._free(model, tried)) is not None:
            tried.add(worker.url)
            request = self._client.build_request("POST", worker.url + path, content=body, headers=_JSON)
            worker.busy += 1
            try:
                try:
                    response = await self._client.send(request, stream=True)
                except httpx2.TransportError:
                    worker.models = frozenset()  # until it says again what it serves
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

    def _free(self, model: str, tried: Iterable[str]) -> Worker | None:
        able = [worker for worker in self.all if model in worker.models and worker.url not in tried]
        return min(able, key=lambda worker: worker.busy, default=None)

    async def close(self) -> None:
        """Let go of all connections."""
        await self._client.aclose()


_JSON: Mapping[str, str] = {"Content-Type": "application/json"}
