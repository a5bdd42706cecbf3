"""Before every server: who may ask what, how large a request is, how long it takes to come, and how many there are at once.

One ASGI application around another: the front, `transformers serve` and vLLM stand behind it. Nothing here holds the event
loop: what a request holds is counted before anything is built of it, and large requests are read in another thread, one at a
time.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import traceback
from collections.abc import Awaitable, Callable, Collection
from typing import Any, TypeVar

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

App = ASGIApp
Body = dict[str, Any]
"""A request's JSON object, whose values anybody may have made of any kind."""
Rewrite = Callable[[Body], Awaitable[Body]]
_T = TypeVar("_T")
_LOG = logging.getLogger("modekit.guard")

LARGEST_BODY = 2**23
MOST_VALUES = 2**18
"""Lists, objects and what is in them: a prompt may be a list of as many tokens. Python builds them in 0.1 seconds."""
_MOST_KEYS = 2**16
_MOST_DIGITS = 40
MOST_MESSAGES = 4_096
"""A context of 131,072 tokens is full of messages of 32 tokens."""
MOST_AT_ONCE = 256
BODY_S = 30.0
"""Seconds in which a request must have come."""
ANSWERS = frozenset({"/health", "/v1/models", "/v1/chat/completions", "/v1/completions"})
"""What a served model can be asked for."""
BODY = "modekit.body"
"""The key of a scope under which the application finds the request's JSON."""
_TOO_LARGE = f"a request may have at most {LARGEST_BODY:,} bytes"
_QUICK = 2**16  # bytes that take no longer here than in another thread


class RefusedError(Exception):
    """A request that gets a status and a reason in place of an answer."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


class BrokenOffError(Exception):
    """An answer of which some was sent cannot be ended well: the connection is closed."""


def error_of(status: int, why: str) -> dict[str, dict[str, str | int]]:
    """An error as OpenAI's API says it."""
    return {"error": {"message": why, "type": "invalid_request_error", "code": status}}


class Guard:
    """Lets through what is asked for at `paths` with the key; of `open_paths` nobody needs the key. One that ends with a slash
    has others below it.

    `rewrite` may give another body in place of a request's, or refuse it (RefusedError).
    """

    def __init__(
        self,
        app: App,
        key: str | None,
        paths: Collection[str] = ANSWERS,
        *,
        open_paths: Collection[str] = ("/health",),
        rewrite: Rewrite | None = None,
    ) -> None:
        self._app, self._key, self._paths, self._open, self._rewrite = app, key, paths, open_paths, rewrite
        self._at_once = 0
        self._aside = SideThread()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, and its answer to the last byte."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            counted = scope["path"] not in self._open
            self._at_once += counted
            try:
                await self._let_through(scope, receive, send)
            except RefusedError as error:
                headers = {"connection": "close", **({"retry-after": "1"} if error.status == 429 else {})}
                await JSONResponse(error_of(error.status, error.why), error.status, headers)(scope, receive, send)
            except BrokenOffError:
                raise
            except Exception as fault:  # of any kind, for the log; the server closes the connection
                _LOG.error("%s", json.dumps(_described(fault)))
                raise
            finally:
                self._at_once -= counted

    async def _let_through(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = self._checked(scope)
        scope = {**scope, "headers": list(headers.items())}
        if scope["method"] == "POST":
            try:
                content = await asyncio.wait_for(_read(receive), BODY_S)
            except (TimeoutError, asyncio.TimeoutError):
                raise RefusedError(408, "the request did not come") from None
            body = await self._aside(len(content), body_of, content)
            if self._rewrite is not None:
                body = await self._rewrite(body)
                content = (await self._aside(len(content), json.dumps, body)).encode()
            headers.pop(b"transfer-encoding", None)
            headers[b"content-length"] = str(len(content)).encode()
            receive = _again(content, receive)
            scope |= {"headers": list(headers.items()), BODY: body}
        await self._app(scope, receive, send)

    def _checked(self, scope: Scope) -> dict[bytes, bytes]:
        """The head of a request, by its fields. Raises RefusedError."""
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        length = headers.get(b"content-length", b"0")
        path = scope["path"]
        if path not in self._paths and not any(each.endswith("/") and path.startswith(each) for each in self._paths):
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


class SideThread:
    """Does what is large in another thread, one at a time, so that the event loop has its turn in between."""

    def __init__(self) -> None:
        self._one = asyncio.Lock()

    async def __call__(self, size: int, do: Callable[..., _T], *arguments: object) -> _T:
        """What `do` gives; `size`: bytes of the request."""
        if size <= _QUICK:
            return do(*arguments)
        async with self._one:
            return await asyncio.to_thread(do, *arguments)


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


def body_of(content: bytes) -> Body:
    """A request's JSON. Raises RefusedError."""
    try:
        text = content.decode()
        values, keys = sizes_of(text)
        if values > MOST_VALUES:
            raise RefusedError(413, f"the request has too many values; it may have at most {MOST_VALUES:,}")
        if keys > _MOST_KEYS:
            raise RefusedError(413, f"the request has too many keys; it may have at most {_MOST_KEYS:,}")
        body = json.loads(text, parse_constant=no_constant, parse_int=_short_integer)
    except (ValueError, RecursionError):
        raise RefusedError(400, "the request is not JSON in UTF-8") from None
    if not isinstance(body, dict):
        raise RefusedError(400, "the request must be a JSON object")
    messages = body.get("messages")
    if isinstance(messages, list) and not messages:
        raise RefusedError(400, "messages: the list is empty; give at least one message")
    if isinstance(messages, list) and len(messages) > MOST_MESSAGES:
        raise RefusedError(413, f"messages: {len(messages):,} found; a request may have at most {MOST_MESSAGES:,}")
    return body


def _short_integer(digits: str) -> int:
    """For `parse_int`: numbers of thousands of digits hold the interpreter while they are read. Raises ValueError."""
    if len(digits) > _MOST_DIGITS:
        raise ValueError("a number has too many digits")
    return int(digits)


def no_constant(name: str) -> float:
    """For `parse_constant`: NaN and Infinity are no JSON. Raises ValueError."""
    raise ValueError(name)


def sizes_of(text: str) -> tuple[int, int]:
    """Entries of all lists and objects of a JSON text with these themselves, and keys, by the signs outside strings.

    Beyond MOST_VALUES entries they may be another number beyond it, and keys are not counted.
    """
    bare = text.replace("\\\\", "").replace('\\"', "")  # every quote begins or ends a string
    entries = bare.count('"') // 4  # which have a key and a string at most
    if entries > MOST_VALUES:
        return entries, 0
    outside = "".join(bare.split('"')[::2])
    return outside.count(",") + outside.count("[") + outside.count("{"), outside.count(":")


def _described(fault: BaseException) -> dict[str, object]:
    """Where an exception came from; without its message, which may have text of the request in it."""
    frames = traceback.extract_tb(fault.__traceback__)
    found: dict[str, object] = {
        "fault": type(fault).__name__,
        "at": [f"{each.filename}:{each.lineno} {each.name}" for each in frames],
    }
    before = fault.__cause__ or fault.__context__
    return found if before is None else {**found, "after": _described(before)}


def _again(body: bytes, receive: Receive) -> Receive:
    """The body once more, for the server."""
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
