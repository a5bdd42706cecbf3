"""Before the servers of transformers and vLLM: the key, the paths that are served, and how large a request is.

llama.cpp's server has a key and a limit of its own.
"""

from __future__ import annotations

import hmac

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST_BODY = 2**23
_OPEN = frozenset({"/health", "/metrics"})
"""Paths that need no key."""
_SERVED = frozenset({*_OPEN, "/v1/models", "/v1/chat/completions", "/v1/completions"})


def refusal(status: int, why: str) -> JSONResponse:
    """An answer with an error in OpenAI's shape."""
    said = {"error": {"message": why, "type": "invalid_request_error", "code": status}}
    return JSONResponse(said, status, {"connection": "close"})


class Guard:
    """One ASGI application around another."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app, self._key = app, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, and its answer to the last byte."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            try:
                refused = self._refusal(scope)
                content = b"" if refused else await _read(Request(scope, receive))
            except ClientDisconnect:
                return
            status, why = refused or (413, f"a request may have at most {LARGEST_BODY:,} bytes")
            if refused or len(content) > LARGEST_BODY:
                await refusal(status, why)(scope, receive, send)
            else:
                await self._app(scope, _again(content, receive), send)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and reason; None for a request that is served."""
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        if scope["path"] not in _SERVED:
            return 404, "there is nothing here"
        if scope["path"] not in _OPEN and self._key and not hmac.compare_digest(given, self._key.encode()):
            return 401, "the key is missing or wrong"
        return None


async def _read(request: Request) -> bytes:
    """A request's body, as far as it is not too long."""
    content = bytearray()
    async for piece in request.stream():
        content += piece
        if len(content) > LARGEST_BODY:
            break
    return bytes(content)


def _again(body: bytes, receive: Receive) -> Receive:
    """The body once more, for the server; then what comes from the client."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return left.pop() if left else await receive()

    return again
