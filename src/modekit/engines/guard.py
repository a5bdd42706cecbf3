"""Before every server: who may ask what, how large a request is, how long it takes to come, and how many there are at once.

One ASGI application around another: the front, `transformers serve` and vLLM stand behind it. (llama.cpp has its own.)
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Any, Any], Awaitable[None]]

LARGEST_BODY = 2**23
MOST_AT_ONCE = 256
BODY_S = 30.0
"""Seconds in which a request must have come."""
ANSWERS = frozenset({"/health", "/v1/models", "/v1/chat/completions", "/v1/completions"})
"""What a served model can be asked for."""
_TOO_LARGE = f"a request may have {LARGEST_BODY} bytes"


class RefusedError(Exception):
    """A request that gets a status and a reason in place of an answer."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


def error_of(status: int, why: str) -> dict[str, Any]:
    """An error as OpenAI's API says it."""
    return {"error": {"message": why, "type": "invalid_request_error", "code": status}}


class Guard:
    """Lets through what is asked for at `paths` with the key; of `open_paths` nobody needs the key.

    `fitted` may change the body of a request, or refuse it (RefusedError).
    """

    def __init__(
        self,
        app: App,
        key: str | None,
        paths: Collection[str] = ANSWERS,
        *,
        open_paths: Collection[str] = ("/health",),
        fitted: Callable[[bytes], bytes] = bytes,
    ) -> None:
        self._app, self._key, self._paths, self._open, self._fitted = app, key, paths, open_paths, fitted
        self._at_once = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request, and its answer to the last byte."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            counted = scope["path"] not in self._open
            self._at_once += counted
            try:
                await self._let_through(scope, receive, send)
            except RefusedError as error:
                await _refuse(send, error)
            finally:
                self._at_once -= counted

    async def _let_through(self, scope: Message, receive: Receive, send: Send) -> None:
        headers = self._checked(scope)
        if scope["method"] == "POST":
            try:
                body = self._fitted(await asyncio.wait_for(_read(receive), BODY_S))
            except (TimeoutError, asyncio.TimeoutError):
                raise RefusedError(408, "the request did not come") from None
            receive = _again(body, receive)
            headers.pop(b"transfer-encoding", None)
            headers[b"content-length"] = str(len(body)).encode()
        await self._app({**scope, "headers": list(headers.items())}, receive, send)

    def _checked(self, scope: Message) -> dict[bytes, bytes]:
        """The head of a request, by its fields. Raises RefusedError."""
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        length = headers.get(b"content-length", b"0")
        if scope["path"] not in self._paths:
            raise RefusedError(404, "there is nothing here")
        if scope["path"] in self._open:
            if scope["method"] not in {"GET", "HEAD"}:
                raise RefusedError(405, "it is only read")
        elif self._key and not hmac.compare_digest(given, self._key.encode()):
            raise RefusedError(401, "the key is missing or wrong")
        if not length.isdigit() or int(length) > LARGEST_BODY:
            raise RefusedError(413, _TOO_LARGE)
        if self._at_once > MOST_AT_ONCE:
            raise RefusedError(429, "too many requests are being answered")
        return headers


async def _read(receive: Receive) -> bytes:
    """A request's body. Raises RefusedError."""
    content = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RefusedError(400, "the request broke off")
        content += message.get("body", b"")
        if len(content) > LARGEST_BODY:
            raise RefusedError(413, _TOO_LARGE)
        if not message.get("more_body"):
            return bytes(content)


def _again(body: bytes, receive: Receive) -> Receive:
    """The body once more, for the server."""
    told = False

    async def again() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _refuse(send: Send, error: RefusedError) -> None:
    body = json.dumps(error_of(error.status, error.why)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    if error.status == 429:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
