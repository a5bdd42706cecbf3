"""The one address of `modekit serve`, before whichever engine answers there.

client -> guard (key, size) -> bounds (bounds.py) -> the engine's process, on a port that only this machine sees
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from modekit.engines.bounds import check_chat, check_request
from modekit.engines.gateway import AGAIN, CHATS, PassedOn, gateway_app, is_stream, unknown_model, unless_disconnected
from modekit.engines.guard import BODY, App, Body, RefusedError
from modekit.engines.registry import Engine
from modekit.engines.request_template import RequestTemplate
from modekit.engines.supervisor import Supervisor

_BACK_S = 15.0  # that a request waits for an engine that is started again
_LOOK_S = 0.1
_ENDED = "the engine ended while it was answering, and is started again; send the request once more"
_HINT = re.compile(r"( - hint:|,? (?:please )?try (?:increasing|using|setting)|\.? [Ss]tart it with ).*", re.DOTALL)
"""What engines advise their own users to do, who have other options."""
_JSON: Mapping[str, str] = {"content-type": "application/json"}
_NOT_DONE: Mapping[str, str] = {
    "echo": "add the prompt to the answer yourself",
    "best_of": "ask for several answers by n",
    "logprobs": "ask /v1/chat/completions with logprobs and top_logprobs",
    "suffix": "write the prompt so that the answer comes last",
}
"""What /v1/completions of some engines would ignore, or answer in a form that clients do not read; and what to do instead."""


@dataclass
class Proxy:
    """What is known of the engine. `template`: the mixture's chat template, for an engine that runs it without limits; None
    where the engine sees to it.
    """

    supervisor: Supervisor
    engine: Engine
    model: str
    inner_key: str
    template: RequestTemplate | None
    _client: aiohttp.ClientSession = field(init=False)

    def app(self, key: str | None) -> App:
        """As an ASGI application for clients with a key, if any."""
        others = {"/health": self._health} | ({"/metrics": self._metrics} if self.engine.metrics else {})
        return gateway_app(self._complete, lambda: [self.model], others, key, self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        headers = {"Accept-Encoding": "identity", "Authorization": f"Bearer {self.inner_key}"}
        # One connection per request: a kept one may lead to a process that is gone, as if it had died of this request.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        limit = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=limit) as self._client:
            yield

    async def _complete(self, request: Request, held: AsyncExitStack) -> Response:
        path, body = request.url.path, request.scope[BODY]
        # A thread of its own, so that a long request does not hold up the others' answers.
        content = await asyncio.to_thread(self._checked, path, body)
        if self.template is not None and path == CHATS:
            await self.template.checked(body)
        return await self._answer(request, content, held)

    def _checked(self, path: str, body: Body) -> bytes:
        """A request as the engine gets it. Raises RefusedError."""
        asked = {"model": self.model, **body}
        check_request(asked)
        model = asked["model"]
        if model != self.model:
            raise RefusedError(404, unknown_model(model, [self.model]))
        if path == CHATS:
            check_chat(asked)
        elif not self.engine.full_completions:
            for key, advice in _NOT_DONE.items():
                if asked.get(key) not in (None, False, 1 if key == "best_of" else None):
                    raise RefusedError(400, f"{key}: {self.supervisor.engine} does not do this; {advice}")
        return json.dumps(asked).encode()

    async def _answer(self, request: Request, body: bytes, held: AsyncExitStack) -> Response:
        """What the engine answers, as it comes where it is a stream. Raises RefusedError and DisconnectedError."""
        answer = await held.enter_async_context(await unless_disconnected(request, self._sent(request.url.path, body)))
        kind = answer.headers.get("content-type", "application/json")
        if is_stream(kind):
            return PassedOn(answer.content.iter_any(), answer.status, kind, held.pop_all(), _ENDED)
        try:
            content = await unless_disconnected(request, answer.read())
        except aiohttp.ClientError:
            raise RefusedError(503, _ENDED) from None
        return Response(_without_hint(content) if answer.status >= 400 else content, answer.status, media_type=kind)

    async def _sent(self, path: str, body: bytes) -> aiohttp.ClientResponse:
        """The head of the engine's answer. Raises RefusedError where it ends, or is not back in time."""
        end = time.monotonic() + _BACK_S
        while time.monotonic() < end and (address := await self.supervisor.address_within(end - time.monotonic())) is not None:
            try:
                return await self._client.post(address + path, data=body, headers=_JSON, allow_redirects=False)
            except aiohttp.ClientConnectorError:  # it has just ended, and got nothing of the request
                await asyncio.sleep(_LOOK_S)
            except aiohttp.ClientError:
                raise RefusedError(503, _ENDED) from None
        raise RefusedError(503, "the engine is started again; send the request once more")

    async def _health(self, _request: Request) -> Response:
        if self.supervisor.address is None:
            return JSONResponse({"status": "starting"}, 503, AGAIN)
        return JSONResponse({"status": "ok"})

    async def _metrics(self, _request: Request) -> Response:
        try:
            async with self._client.get(f"{self.supervisor.address}/metrics", allow_redirects=False) as answer:
                return Response(await answer.read(), answer.status, media_type=answer.headers.get("content-type"))
        except (aiohttp.ClientError, ValueError):
            return JSONResponse({"status": "starting"}, 503, AGAIN)


def _without_hint(content: bytes) -> bytes:
    """An engine's error without its advice to its own users."""
    try:
        said = json.loads(content)
        said["error"]["message"] = _HINT.sub("", str(said["error"]["message"]))
    except (ValueError, TypeError, KeyError, RecursionError):
        return content
    return json.dumps(said).encode()
