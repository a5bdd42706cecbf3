"""What `modekit serve` and `modekit front` share: requests that are answered by somebody behind them.

An answer is passed on while the client is there, and to an end that it understands; what cannot be answered gets a status and
a reason as OpenAI's API says it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import TypeVar

import aiohttp
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from modekit.engines.guard import App, BrokenOffError, Guard, RefusedError, error_of

CHATS, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MODELS = "/v1/models"
AGAIN: Mapping[str, str] = {"retry-after": "2"}
_EVENTS = "text/event-stream"
_GRACE_S = 5.0  # for the last event of an answer that took too long
_LOOK_S = 0.5  # between two looks whether a client is still there
_LONGEST_LINE = 2**20
_SHOWN, _MOST_NAMED = 60, 20
_T = TypeVar("_T")


class DisconnectedError(Exception):
    """The client has gone."""


def gateway_app(
    answer: Callable[[Request, AsyncExitStack], Awaitable[Response]],
    names: Callable[[], Collection[str]],
    others: Mapping[str, Callable[[Request], Awaitable[Response]]],
    key: str | None,
    lifespan: Callable[[Starlette], AbstractAsyncContextManager[None]],
) -> App:
    """An ASGI application for clients with a key, if any: chats and completions by `answer`, the models by their `names`, and
    `others`, which need no key.
    """
    routes = [
        *(Route(path, _answering_with(answer), methods=["POST"]) for path in (CHATS, COMPLETIONS)),
        *_models_routes(names, int(time.time())),
        *(Route(path, endpoint) for path, endpoint in others.items()),
    ]
    served = Starlette(routes=routes, lifespan=lifespan, exception_handlers={Exception: _unforeseen})
    return Guard(served, key, {*(route.path for route in routes), f"{MODELS}/"}, open_paths=others)


async def _unforeseen(_request: Request, _fault: Exception) -> Response:
    return error_response(500, "an error in the gateway; see its log")  # which the guard writes


def _answering_with(
    answer: Callable[[Request, AsyncExitStack], Awaitable[Response]],
) -> Callable[[Request], Awaitable[Response]]:
    """What `answer` gives, or why it gives nothing. What is entered into the stack, and not handed on, is let go."""

    async def answered(request: Request) -> Response:
        async with AsyncExitStack() as held:
            try:
                return await answer(request, held)
            except RefusedError as error:
                return error_response(error.status, error.why)
            except (TimeoutError, asyncio.TimeoutError):
                return error_response(504, "the answer took too long")
            except (ClientDisconnect, DisconnectedError):
                return Response(status_code=499)

    return answered


def error_response(status: int, why: str) -> Response:
    """An error; one that passes says when to ask again."""
    return JSONResponse(error_of(status, why), status, AGAIN if status == 503 else None)


def _models_routes(names: Callable[[], Collection[str]], born: int) -> list[Route]:
    """The list of models, and each by its name. `born`: seconds of the epoch at which they are said to be made."""

    def described(name: str) -> dict[str, str | int]:
        return {"id": name, "object": "model", "created": born, "owned_by": "modekit"}

    async def listed(_request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [described(name) for name in sorted(names())]})

    async def one(request: Request) -> Response:
        name = request.path_params["name"]
        return JSONResponse(described(name)) if name in names() else error_response(404, unknown_model(name, names()))

    return [Route(MODELS, listed), Route(f"{MODELS}/{{name:path}}", one)]


def unknown_model(name: object, names: Collection[str]) -> str:
    """The error of a model that is not served."""
    return f"there is no model {str(name)[:_SHOWN]!r}; there is {', '.join(map(repr, sorted(names)[:_MOST_NAMED]))}"


async def unless_disconnected(request: Request, wanted: Awaitable[_T]) -> _T:
    """What is wanted, unless the client goes meanwhile. Raises DisconnectedError."""
    task = asyncio.ensure_future(wanted)
    try:
        while not (await asyncio.wait([task], timeout=_LOOK_S))[0]:
            if await request.is_disconnected():
                raise DisconnectedError
        return task.result()
    finally:
        task.cancel()


def is_stream(kind: str) -> bool:
    """Whether a content type is that of a stream of events."""
    return kind.startswith(_EVENTS)


class PassedOn(StreamingResponse):
    """An answer as it comes; whatever becomes of the client, what is `held` for it is let go afterwards, at last after a while.

    `broken_off`: what the last event of a stream says that breaks off.
    """

    def __init__(
        self,
        chunks: AsyncIterator[bytes],
        status: int,
        kind: str,
        held: AsyncExitStack,
        broken_off: str,
        limit_s: float | None = None,
    ) -> None:
        super().__init__(_whole_events(chunks, broken_off) if is_stream(kind) else chunks, status, media_type=kind)
        self._held, self._limit_s = held, None if limit_s is None else limit_s + _GRACE_S

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it. Raises BrokenOffError where it does not end well."""
        async with self._held:
            try:
                await asyncio.wait_for(super().__call__(scope, receive, send), self._limit_s)
            except (aiohttp.ClientError, TimeoutError, asyncio.TimeoutError):  # what was sent cannot be taken back
                raise BrokenOffError from None


async def _whole_events(chunks: AsyncIterator[bytes], why: str) -> AsyncIterator[bytes]:
    """A stream of events, in whole lines; where it breaks off, the last event is an error that says why."""
    rest = b""
    try:
        async for chunk in chunks:
            lines, end, rest = (rest + chunk).rpartition(b"\n")
            if len(rest) > _LONGEST_LINE:
                lines, end, rest = lines + end, rest, b""
            if end:
                yield lines + end
    except (aiohttp.ClientError, asyncio.TimeoutError, TimeoutError):
        yield b"\ndata: " + json.dumps(error_of(503, why)).encode() + b"\n\n"  # the first line end closes the event before it
        return
    if rest:
        yield rest
