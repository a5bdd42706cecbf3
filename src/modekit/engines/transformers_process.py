"""Run as a process of its own: `transformers serve` with one mixture. See serve.py.

What is added to it: mixtures in the modekit architecture, whose class transformers looks up in itself; a key; a limit on what
a request may bring; and that nothing but the model's own answers can be asked for, where it would load any model of the hub.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from modekit.engines.child import answer_caller, settings_of_caller
from modekit.engines.serve import url_of

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
LARGEST_BODY = 2**23
_PATHS = {"/health", "/v1/models", "/v1/chat/completions", "/v1/completions"}
_LIMITS = ("max_tokens", "max_completion_tokens")
_TOO_LARGE = f"a request may have {LARGEST_BODY} bytes"
_BODY_S = 30.0  # in which a request must have come
_LOOK_S = 0.05


class Guard:
    """Around the server: who may ask what, and how much at once.

    `length_of` gives the tokens of what a request says; `context` is the most there may be, its answer included.
    """

    def __init__(self, app: App, key: str | None, context: int, length_of: Callable[[Any], int]) -> None:
        self._app, self._key, self._context, self._length_of = app, key, context, length_of

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = self._checked(scope)
            if scope["method"] == "POST":
                body = self._fitted(await asyncio.wait_for(_read(receive), _BODY_S))
                receive = _again(body, receive)
                headers[b"content-length"] = str(len(body)).encode()
        except _RefusedError as error:
            await _refuse(send, error.status, error.why)
            return
        except (TimeoutError, asyncio.TimeoutError):
            await _refuse(send, 408, "the request did not come")
            return
        await self._app({**scope, "headers": list(headers.items())}, receive, send)

    def _checked(self, scope: Message) -> dict[bytes, bytes]:
        """The head of a request, by its fields. Raises _RefusedError."""
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        length = headers.get(b"content-length", b"")
        if scope["path"] not in _PATHS:
            raise _RefusedError(404, "there is nothing here")
        if self._key and scope["path"] != "/health" and not hmac.compare_digest(given, self._key.encode()):
            raise _RefusedError(401, "the key is missing or wrong")
        if scope["method"] == "POST" and (not length.isdigit() or b"transfer-encoding" in headers):
            raise _RefusedError(411, "the length of the request must be said")
        if length and int(length) > LARGEST_BODY:
            raise _RefusedError(413, _TOO_LARGE)
        return headers

    def _fitted(self, body: bytes) -> bytes:
        """A request whose answer ends where the context does. Raises _RefusedError."""
        try:
            request = json.loads(body)
            _check_form(request)
            length = self._length_of(request)
        except _RefusedError:
            raise
        except Exception as error:  # a template, a tokenizer: each raises what it likes
            raise _RefusedError(400, f"the request cannot be read: {type(error).__name__}") from None
        asked = max((request[name] for name in _LIMITS if request.get(name) is not None), default=self._context - length)
        if asked < 1 or length + asked > self._context:
            raise _RefusedError(400, f"{length} tokens and {max(asked, 1)} of answer, and the context has {self._context}")
        for name in _LIMITS:
            request.pop(name, None)
        return json.dumps({**request, "max_tokens": asked}).encode()


class _RefusedError(Exception):
    def __init__(self, status: int, why: str) -> None:
        self.status, self.why = status, why


def _check_form(request: Any) -> None:
    """Raise _RefusedError where a request has not the form that the server takes for granted, or would set what is set here."""
    if not isinstance(request, dict):
        raise _RefusedError(400, "the request is no object")
    messages, prompt = request.get("messages", []), request.get("prompt", "")
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages) or not isinstance(prompt, str):
        raise _RefusedError(400, "messages are a list of objects, a prompt is one text")
    if "generation_config" in request:
        raise _RefusedError(400, "generation_config is not taken here")
    if any(type(request.get(name, 1)) is not int and request.get(name) is not None for name in _LIMITS):
        raise _RefusedError(400, f"{' and '.join(_LIMITS)} are whole numbers")


async def _read(receive: Receive) -> bytes:
    """A request's body. Raises _RefusedError."""
    content = bytearray()
    while True:
        message = await receive()
        content += message.get("body", b"")
        if len(content) > LARGEST_BODY:
            raise _RefusedError(413, _TOO_LARGE)
        if not message.get("more_body"):
            return bytes(content)


def _again(body: bytes, receive: Receive) -> Receive:
    """Another body in its place, for the server."""
    told = False

    async def again() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _length_by(tokenizer: Any) -> Callable[[Any], int]:
    """Counts the tokens of a request."""

    def length_of(request: Any) -> int:
        if "messages" in request:
            said = tokenizer.apply_chat_template(request["messages"], add_generation_prompt=True, return_dict=True)
        else:
            said = tokenizer(request.get("prompt", ""))
        return len(said["input_ids"])

    return length_of


async def _refuse(send: Send, status: int, why: str) -> None:
    body = json.dumps({"error": {"message": why, "type": "invalid_request_error", "code": status}}).encode()
    kind = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": kind})
    await send({"type": "http.response.body", "body": body})


def main() -> None:
    """Load the mixture, say where it listens, and serve until the parent is gone."""
    settings = settings_of_caller()
    import transformers
    from transformers.cli.serve import Serve

    from modekit.architecture.modeling_modekit import ModekitForCausalLM
    from modekit.loaded.load import load_tokenizer

    transformers.ModekitForCausalLM = ModekitForCausalLM
    folder = Path(settings["model"])
    length_of = _length_by(load_tokenizer(folder))
    os.chdir(folder.parent)  # so that the model is known by its name, and no answer tells where it lies

    class Guarded(Serve):  # type: ignore[misc]
        """With the guard before it."""

        def start_server(self) -> None:
            self.server.config.app = Guard(self.server.config.app, settings["key"], settings["context"], length_of)
            super().start_server()

    served = Guarded(
        force_model=folder.name, host=settings["host"], port=settings["port"], device="auto", dtype="auto",
        trust_remote_code=settings["trust_remote_code"], log_level="warning", non_blocking=True,
    )  # fmt: skip
    while not served.server.started:
        if not served._thread.is_alive():
            raise SystemExit("the server ended before it listened")
        time.sleep(_LOOK_S)
    host, port = served.server.servers[0].sockets[0].getsockname()[:2]
    answer_caller({"address": url_of(host, port)})
    threading.Event().wait()


if __name__ == "__main__":
    main()
