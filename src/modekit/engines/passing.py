"""An answer that is passed on: while the client is there, and to an end that it understands."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

import aiohttp
from starlette.requests import Request

from modekit.engines.guard import error_of

_LOOK_S = 0.5  # between two looks whether a client is still there
_LONGEST_EVENT = 2**20
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
    """A stream of events, in whole ones; where it breaks off, the last one is an error that says why."""
    rest = b""
    try:
        async for chunk in chunks:
            whole, end, rest = (rest + chunk).rpartition(b"\n\n")
            if end or len(rest) > _LONGEST_EVENT:
                yield whole + end
    except (aiohttp.ClientError, asyncio.TimeoutError):
        yield b"data: " + json.dumps(error_of(503, why)).encode() + b"\n\n"
        return
    if rest:
        yield rest
