"""Before the servers of transformers and vLLM: the key, the paths that are served, and how large a request is.

llama.cpp's server has a key and a limit of its own.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

Body = dict[str, Any]
"""A request's JSON object, whose values may be of any kind."""
Rewrite = Callable[[Body], Awaitable[Body]]

LARGEST_BODY = 2**23
_OPEN = frozenset({"/health", "/metrics"})
"""Paths that need no key."""
_SERVED = frozenset({*_OPEN, "/v1/models", "/v1/chat/completions", "/v1/completions"})


class RefusedError(Exception):
    """A request that gets a status and a reason in place of an answer."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


class Guard:
    """One ASGI application around another. `rewrite` may give another body in place of a request's, or refuse it."""

    def __init__(self, app: ASGIApp, key: str | None, rewrite: Rewrite | None = None) -> None:
        self._app, self._key, self._rewrite = app, key, rewrite

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, and its answer to the last byte."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            try:
                scope, receive = await self._let_through(scope, receive)
            except ClientDisconnect:
                return
            except RefusedError as error:
                said = {"message": error.why, "type": "invalid_request_error", "code": error.status}
                await JSONResponse({"error": said}, error.status, {"connection": "close"})(scope, receive, send)
                return
            await self._app(scope, receive, send)

    async def _let_through(self, scope: Scope, receive: Receive) -> tuple[Scope, Receive]:
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        if scope["path"] not in _SERVED:
            raise RefusedError(404, "there is nothing here")
        if scope["path"] not in _OPEN and self._key and not hmac.compare_digest(given, self._key.encode()):
            raise RefusedError(401, "the key is missing or wrong")
        if scope["method"] != "POST":
            return scope, receive
        content = await _read(Request(scope, receive))
        if self._rewrite is not None:
            content = json.dumps(await self._rewrite(_object_in(content))).encode()
        headers.pop(b"transfer-encoding", None)
        headers[b"content-length"] = str(len(content)).encode()
        return {**scope, "headers": list(headers.items())}, _again(content, receive)


async def _read(request: Request) -> bytes:
    """A request's body. Raises RefusedError."""
    content = bytearray()
    async for piece in request.stream():
        content += piece
        if len(content) > LARGEST_BODY:
            raise RefusedError(413, f"a request may have at most {LARGEST_BODY:,} bytes")
    return bytes(content)


def _object_in(content: bytes) -> Body:
    """A request's JSON. Raises RefusedError."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        raise RefusedError(400, "the request is not JSON in UTF-8") from None
    if not isinstance(body, dict):
        raise RefusedError(400, "the request must be a JSON object")
    return body


def _again(body: bytes, receive: Receive) -> Receive:
    """The body once more, for the server; then what comes from the client."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return left.pop() if left else await receive()

    return again
