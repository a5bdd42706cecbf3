"""An answer that is passed on: while the client is there, and to an end that it understands."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

import aiohttp
from starlette.requests import Request

from modekit.engines.guard import error_of

EVENTS = "text/event-stream"
_LOOK_S = 0.5  # between two looks whether a client is still there
_LONGEST_LINE = 2**20
_T = TypeVar("_T")


class GoneError(Exception):
    """The client has gone."""


async def unless_gone(request: Request, wanted: Awaitable[_T]) -> _T:
    """What is wanted, unless the client goes meanwhile. Raises GoneError."""
    task = asyncio.ensure_future(wanted)
    try:
        while not (await asyncio.wait([task], timeout=_LOOK_S))[0]:
            if await request.is_disconnected():
                raise GoneError
        return task.result()
    finally:
        task.cancel()


async def whole_events(chunks: AsyncIterator[bytes], why: str) -> AsyncIterator[bytes]:
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
