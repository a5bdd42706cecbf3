"""One address before many servers: `model: auto` goes to the expert whose text it is.

    client -> front -> a worker that serves the expert (an adapter in vLLM, a whole model in llama.cpp, the base)

A mixture's own router (routing/text_router.py) decides once per request. A model that is named outright is passed on.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import quote

import aiohttp
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from modekit.engines.gateway import PassedOn, gateway_app, unknown_model, unless_disconnected
from modekit.engines.guard import BODY, App, Body, RefusedError, SideThread
from modekit.engines.workers import Worker, WorkerPool, is_short
from modekit.errors import ModekitError
from modekit.recipes.strict import BASE
from modekit.routing.text_router import Decision, TextRouter
from modekit.text.records import conversation_of

AUTO = "auto"
_BROKEN_OFF = "the worker's answer broke off; send the request again"
_LOG = logging.getLogger("modekit.front")
_EDGES_S = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)


class Metrics:
    """Requests by expert and status, the time that deciding takes, and how busy each worker is; as Prometheus's text."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("modekit_requests", "Requests.", ["expert", "status"], registry=self.registry)
        self.deciding = Histogram(
            "modekit_deciding_seconds", "From the request to the expert.", buckets=_EDGES_S, registry=self.registry
        )
        self.busy = Gauge("modekit_worker_busy", "Requests that a worker is at.", ["worker"], registry=self.registry)

    def text(self, workers: Iterable[Worker]) -> bytes:
        """All of it."""
        for worker in workers:
            self.busy.labels(worker.name).set(worker.busy)
        return generate_latest(self.registry)


@dataclass
class Front:
    """What the front knows. `names`: expert -> the model's name at the workers, where that is another."""

    router: TextRouter
    workers: WorkerPool
    names: Mapping[str, str] = field(default_factory=dict)
    key: str | None = None
    metrics: Metrics = field(default_factory=Metrics)
    _deciding: asyncio.Lock = field(default_factory=asyncio.Lock)
    _aside: SideThread = field(default_factory=SideThread)

    def app(self) -> App:
        """As an ASGI application."""
        others = {"/health": self._health, "/metrics": self._metrics}
        return gateway_app(self._answer, lambda: {AUTO, *self.workers.models}, others, self.key, self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        async with self.workers.connected():
            await self.workers.look()
            looking = asyncio.create_task(self.workers.keep_looking())
            try:
                yield
            finally:
                looking.cancel()
                with suppress(asyncio.CancelledError):
                    await looking

    async def _answer(self, request: Request, held: AsyncExitStack) -> Response:
        """What the expert's worker says; `held` is let go after its last byte."""
        started = time.perf_counter()
        body: Body = request.scope[BODY]
        size = int(request.headers["content-length"])
        expert, decision = await self._expert_of(body, size)
        self.metrics.deciding.observe(time.perf_counter() - started)
        for taken in [expert] if decision is None or expert == BASE else [expert, BASE]:
            model = taken if decision is None else self.names.get(taken, taken)
            content = await self._aside(size, json.dumps, {**body, "model": model})
            asked = self.workers.asked(model, request.url.path, content.encode())
            answer = await unless_disconnected(request, held.enter_async_context(asked))
            if answer is not None:
                break
        else:
            self._log(expert, 503, decision)
            raise RefusedError(503, "no worker serves it now")
        self._log(taken, answer.status, decision)
        headers = {"x-modekit-expert": quote(taken)}
        if decision is not None:
            headers["x-modekit-probabilities"] = json.dumps({name: round(p, 4) for name, p in decision.probabilities.items()})
        kind = answer.headers.get("content-type", "application/json")
        if is_short(answer):
            return Response(await answer.read(), answer.status, headers, kind)
        limit_s = self.workers.timeout_s
        chunks = _until(answer.content.iter_any(), time.monotonic() + limit_s)
        passed = PassedOn(chunks, answer.status, kind, held.pop_all(), _BROKEN_OFF, limit_s)
        passed.headers.update(headers)
        return passed

    async def _expert_of(self, body: Body, size: int) -> tuple[str, Decision | None]:
        """Who takes a request of some bytes, and why. Raises RefusedError."""
        model = body.get("model", AUTO)
        if model != AUTO:
            if not isinstance(model, str) or model not in self.workers.models:
                raise RefusedError(404, unknown_model(model, [AUTO, *self.workers.models]))
            return model, None
        said = await self._aside(size, _said, body)
        try:
            async with self._deciding:  # a router is at one text at a time; a long one must not hold up the others' answers
                quick = self.router.is_quick(said)
                decision = self.router.decide(said) if quick else await asyncio.to_thread(self.router.decide, said)
        except ModekitError as error:
            raise RefusedError(400, error.what) from None
        return decision.expert, decision

    async def _health(self, _request: Request) -> Response:
        there = sum(bool(worker.models) for worker in self.workers.all)
        return JSONResponse({"workers": len(self.workers.all), "answering": there}, 200 if there else 503)

    async def _metrics(self, _request: Request) -> Response:
        return Response(self.metrics.text(self.workers.all), media_type="text/plain; version=0.0.4")

    def _log(self, expert: str, status: int, decision: Decision | None) -> None:
        """Who took a request, never what it said."""
        self.metrics.requests.labels(expert, str(status)).inc()
        said = {"expert": expert, "status": status, "tokens": decision.tokens if decision else None}
        _LOG.info("%s", json.dumps(said))


async def _until(chunks: AsyncIterator[bytes], end: float) -> AsyncIterator[bytes]:
    """An answer as it comes. Raises asyncio.TimeoutError where it does not end in time."""
    try:
        async for chunk in chunks:
            if time.monotonic() > end:
                raise asyncio.TimeoutError
            yield chunk
    except (aiohttp.ClientError, TimeoutError, asyncio.TimeoutError) as error:
        _LOG.warning("%s", json.dumps({"broken off": type(error).__name__}))
        raise


def _said(body: Body) -> str | list[dict[str, str]]:
    """The text of a request, or its messages with their text. Raises RefusedError."""
    if "messages" not in body:
        prompt = body.get("prompt")
        if isinstance(prompt, str):
            return prompt
        raise RefusedError(400, "to choose an expert, the prompt must be one text")
    messages = body["messages"]
    if isinstance(messages, list):  # of a turn that only calls tools there is no text
        messages = [each for each in messages if not isinstance(each, dict) or each.get("content") is not None]
    conversation = conversation_of(messages)
    if conversation is None:
        raise RefusedError(400, "messages are a list of objects with role and text")
    return [dict(message) for message in conversation.messages]
