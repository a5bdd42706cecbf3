"""One address before many servers: `model: auto` goes to the expert whose text it is.

    client -> front -> a worker that serves the expert (an adapter in vLLM, a whole model in llama.cpp, the base)

What decides is a mixture's own router (routing/text_router.py), once per request and for all of it: that is another model than
the mixture, which decides token by token. A model that is named outright is passed on. A request is tried at another worker
only while nothing of an answer has come.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from modekit.engines.metrics import Metrics
from modekit.engines.workers import Answer, Workers
from modekit.errors import ModekitError
from modekit.recipes.strict import BASE
from modekit.routing.text_router import Decision, TextRouter
from modekit.text.chat import conversation_of

AUTO = "auto"
LARGEST_BODY = 2**23
_MOST_WAITING = 256
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
    _waiting: int = 0
    _deciding: asyncio.Lock = field(default_factory=asyncio.Lock)

    def app(self) -> Starlette:
        """As an ASGI application."""
        routes = [
            Route("/v1/chat/completions", self._complete, methods=["POST"]),
            Route("/v1/completions", self._complete, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
        ]
        return Starlette(routes=routes, lifespan=self._lifespan, exception_handlers={Exception: _unforeseen})

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        await self.workers.look()
        looking = asyncio.create_task(self.workers.keep_looking())
        try:
            yield
        finally:
            looking.cancel()
            with suppress(asyncio.CancelledError):
                await looking
            await self.workers.close()

    async def _complete(self, request: Request) -> Response:
        started = time.perf_counter()
        if self._waiting >= _MOST_WAITING:
            return _error(429, "too many requests wait", {"retry-after": "1"})
        self._waiting += 1
        passed_on = False
        try:
            refused = self._refusal(request)
            if refused is not None:
                return refused
            body = await _body_of(request)
            if isinstance(body, Response):
                return body
            expert, decision = await self._expert_of(body)
            self.metrics.decided(time.perf_counter() - started)
            response = await self._pass_on(request.url.path, body, expert, decision)
            passed_on = isinstance(response, _PassedOn)
            return response
        except _RefusedError as error:
            return _error(error.status, error.why)
        except ClientDisconnect:
            return Response(status_code=499)
        finally:
            if not passed_on:
                self._waiting -= 1

    def _refusal(self, request: Request) -> Response | None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if self.key and not hmac.compare_digest(given, self.key.encode()):
            return _error(401, "the key is missing or wrong")
        length = request.headers.get("content-length", "0")
        if not length.isdigit() or int(length) > LARGEST_BODY:
            return _error(413, f"a request may have {LARGEST_BODY} bytes")
        return None

    async def _expert_of(self, body: Mapping[str, Any]) -> tuple[str, Decision | None]:
        """Who takes a request, and why. Raises _RefusedError."""
        model = body.get("model", AUTO)
        if model != AUTO:
            if not isinstance(model, str) or model not in self.workers.models:
                known = ", ".join(sorted([AUTO, *self.workers.models])[:20])
                raise _RefusedError(404, f"there is no such model; there are {known}")
            return model, None
        said = _said(body)
        try:
            async with self._deciding:  # a router is at one text at a time; a long one must not hold up the others' answers
                decision = await asyncio.to_thread(self.router.decide, said)
        except ModekitError as error:
            raise _RefusedError(400, error.what) from None
        return decision.expert, decision

    async def _pass_on(self, path: str, body: dict[str, Any], expert: str, decision: Decision | None) -> Response:
        """The answer of whoever serves the expert, of the base where nobody does."""
        experts = [expert] if decision is None or expert == BASE else [expert, BASE]
        for taken in experts:
            model = self.names.get(taken, taken)
            answered = self.workers.asked(model, path, json.dumps({**body, "model": model}).encode())
            answer = await answered.__aenter__()
            if answer is not None:
                break
            await answered.__aexit__(None, None, None)
        else:
            self._log(expert, 503, decision)
            return _error(503, f"nobody serves {' or '.join(experts)} now", {"retry-after": "2"})
        self._log(taken, answer.response.status_code, decision)
        headers = {"x-modekit-expert": taken}
        if decision is not None:
            headers["x-modekit-probabilities"] = json.dumps({name: round(p, 4) for name, p in decision.probabilities.items()})

        async def ended() -> None:
            self._waiting -= 1
            await answered.__aexit__(None, None, None)

        return _PassedOn(answer, headers, ended, self.workers.timeout_s)

    async def _models(self, request: Request) -> Response:
        refused = self._refusal(request)
        names = sorted({AUTO, *self.workers.models})
        return refused or JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in names]})

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
    """A worker's answer; whatever becomes of the client, the worker is free again afterwards, at the latest after `limit_s`."""

    def __init__(
        self, answer: Answer, headers: Mapping[str, str], ended: Callable[[], Awaitable[None]], limit_s: float
    ) -> None:
        kind = answer.response.headers.get("content-type", "application/json")
        super().__init__(answer.chunks(), answer.response.status_code, headers, media_type=kind)
        self._ended, self._limit_s = ended, limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.wait_for(super().__call__(scope, receive, send), self._limit_s)
        finally:
            await self._ended()


class _RefusedError(Exception):
    def __init__(self, status: int, why: str) -> None:
        self.status, self.why = status, why


async def _body_of(request: Request) -> dict[str, Any] | Response:
    """A request's JSON, or what is wrong with it."""
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > LARGEST_BODY:
            return _error(413, f"a request may have {LARGEST_BODY} bytes")
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return _error(400, "the request is not JSON")
    return body if isinstance(body, dict) else _error(400, "the request is no object")


def _said(body: Mapping[str, Any]) -> str | list[dict[str, str]]:
    """The text of a request, or its messages with their text. Raises _RefusedError."""
    if "messages" not in body:
        prompt = body.get("prompt")
        if isinstance(prompt, str):
            return prompt
        raise _RefusedError(400, "to choose an expert, the prompt must be one text")
    conversation = conversation_of(body["messages"])
    if conversation is None:
        raise _RefusedError(400, "messages are a list of objects with role and text")
    return [dict(message) for message in conversation.messages]


def _error(status: int, why: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"error": {"message": why, "type": "invalid_request_error", "code": status}}, status, headers)


async def _unforeseen(_request: Request, _error_: Exception) -> Response:
    return _error(500, "something went wrong here")
