"""One address before many servers: `model: auto` goes to the expert whose text it is.

    client -> front -> a worker that serves the expert (an adapter in vLLM, a whole model in llama.cpp, the base)

What decides is a mixture's own router (routing/text_router.py), once per request and for all of it: that is another model than
the mixture, which decides token by token. A model that is named outright is passed on. A request is tried at another worker
only while nothing of an answer has come.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import aiohttp
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from modekit.engines.guard import BODY, App, Aside, Body, BrokenOffError, Guard, RefusedError, error_of
from modekit.engines.metrics import Metrics
from modekit.engines.passing import EVENTS, GoneError, unless_gone, whole_events
from modekit.engines.workers import Answer, Workers
from modekit.errors import ModekitError
from modekit.recipes.strict import BASE
from modekit.routing.text_router import Decision, TextRouter
from modekit.text.records import conversation_of

AUTO = "auto"
_GRACE_S = 5.0  # for the last event of an answer that took too long
_BROKEN_OFF = "the worker's answer broke off; send the request again"
_LOG = logging.getLogger("modekit.front")


@dataclass
class Front:
    """What the front knows.

    Attributes:
        router: whose text is it?
        workers: who serves what.
        names: expert -> the model's name at the workers, where that is another.
        key: what clients must bear.
        metrics: what /metrics says.
    """

    router: TextRouter
    workers: Workers
    names: Mapping[str, str] = field(default_factory=dict)
    key: str | None = None
    metrics: Metrics = field(default_factory=Metrics)
    _deciding: asyncio.Lock = field(default_factory=asyncio.Lock)
    _aside: Aside = field(default_factory=Aside)

    def app(self) -> App:
        """As an ASGI application."""
        routes = [
            Route("/v1/chat/completions", self._complete, methods=["POST"]),
            Route("/v1/completions", self._complete, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
        ]
        served = Starlette(routes=routes, lifespan=self._lifespan, exception_handlers={Exception: _unforeseen})
        return Guard(served, self.key, {route.path for route in routes}, open_paths=("/health", "/metrics"))

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

    async def _complete(self, request: Request) -> Response:
        held = AsyncExitStack()
        try:
            return await self._answer(request, held)
        except RefusedError as error:
            return _error(error.status, error.why)
        except (TimeoutError, asyncio.TimeoutError):
            return _error(504, "the answer took too long")
        except (ClientDisconnect, GoneError):
            return Response(status_code=499)
        finally:
            await held.aclose()  # of what was not handed on with the answer

    async def _answer(self, request: Request, held: AsyncExitStack) -> Response:
        """What the expert's worker says; `held` is let go after its last byte."""
        started = time.perf_counter()
        body: Body = request.scope[BODY]
        size = int(request.headers["content-length"])
        expert, decision = await self._expert_of(body, size)
        self.metrics.decided(time.perf_counter() - started)
        for taken in [expert] if decision is None or expert == BASE else [expert, BASE]:
            model = taken if decision is None else self.names.get(taken, taken)
            content = await self._aside(size, json.dumps, {**body, "model": model})
            asked = self.workers.asked(model, request.url.path, content.encode())
            answer = await unless_gone(request, held.enter_async_context(asked))
            if answer is not None:
                break
        else:
            self._log(expert, 503, decision)
            return _error(503, "nobody serves it now", {"retry-after": "2"})
        self._log(taken, answer.status, decision)
        headers = {"x-modekit-expert": quote(taken)}
        if decision is not None:
            headers["x-modekit-probabilities"] = json.dumps({name: round(p, 4) for name, p in decision.probabilities.items()})
        if answer.body is not None:
            return Response(answer.body, answer.status, headers, answer.kind)
        return _PassedOn(answer, headers, held.pop_all(), self.workers.timeout_s)

    async def _expert_of(self, body: Body, size: int) -> tuple[str, Decision | None]:
        """Who takes a request of some bytes, and why. Raises RefusedError."""
        model = body.get("model", AUTO)
        if model != AUTO:
            if not isinstance(model, str) or model not in self.workers.models:
                known = ", ".join(sorted([AUTO, *self.workers.models])[:20])
                raise RefusedError(404, f"there is no such model; there are {known}")
            return model, None
        said = await self._aside(size, _said, body)
        try:
            async with self._deciding:  # a router is at one text at a time; a long one must not hold up the others' answers
                quick = self.router.is_quick(said)
                decision = self.router.decide(said) if quick else await asyncio.to_thread(self.router.decide, said)
        except ModekitError as error:
            raise RefusedError(400, error.what) from None
        return decision.expert, decision

    async def _models(self, _request: Request) -> Response:
        names = sorted({AUTO, *self.workers.models})
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in names]})

    async def _health(self, _request: Request) -> Response:
        there = sum(bool(worker.models) for worker in self.workers.all)
        return JSONResponse({"workers": len(self.workers.all), "answering": there}, 200 if there else 503)

    async def _metrics(self, _request: Request) -> Response:
        return Response(self.metrics.text(self.workers.all), media_type="text/plain; version=0.0.4")

    def _log(self, expert: str, status: int, decision: Decision | None) -> None:
        """Who took a request, never what it said."""
        self.metrics.answered(expert, status)
        said = {"expert": expert, "status": status, "tokens": decision.tokens if decision else None}
        _LOG.info("%s", json.dumps(said))


class _PassedOn(StreamingResponse):
    """A worker's answer as it comes; whatever becomes of the client, what is held for it is let go, at last after a while."""

    def __init__(self, answer: Answer, headers: Mapping[str, str], held: AsyncExitStack, limit_s: float) -> None:
        chunks = _until(answer.chunks(), time.monotonic() + limit_s)
        if answer.kind.startswith(EVENTS):
            chunks = whole_events(chunks, _BROKEN_OFF)
        super().__init__(chunks, answer.status, headers, media_type=answer.kind)
        self._held, self._limit_s = held, limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            try:
                await asyncio.wait_for(super().__call__(scope, receive, send), self._limit_s + _GRACE_S)
            except (aiohttp.ClientError, TimeoutError, asyncio.TimeoutError):  # what was sent cannot be taken back
                raise BrokenOffError from None


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


def _said(body: Mapping[str, Any]) -> str | list[dict[str, str]]:
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


def _error(status: int, why: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse(error_of(status, why), status, headers)


async def _unforeseen(_request: Request, _fault: Exception) -> Response:
    return _error(500, "the front made a mistake; its log says where")  # which the guard writes
