"""Run as a process of its own: `transformers serve` with one mixture. See serve.py.

What is added to it: mixtures in the modekit architecture, whose class transformers looks up in itself; a key; a limit on what
a request may bring; and that nothing but the model's own answers can be asked for, where it would load any model of the hub.
"""

from __future__ import annotations

import hmac
import json
import os
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from modekit.engines.child import answer_caller, settings_of_caller

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
LARGEST_BODY = 2**23
_PATHS = {"/health", "/v1/models", "/v1/chat/completions", "/v1/completions"}
_LOOK_S = 0.05


class Guard:
    """Around the server: who may ask what, and how much at once.

    `length_of` gives the tokens that a request comes to, its answer included; `context` is the most there may be.
    """

    def __init__(self, app: App, key: str | None, context: int, length_of: Callable[[Any], int]) -> None:
        self._app, self._key, self._context, self._length_of = app, key, context, length_of

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refused = self._refusal(scope)
        if refused is None and scope["method"] == "POST":
            body = await _read(receive)
            refused, receive = self._too_long(body), _again(body, receive)
        if refused is not None:
            await _refuse(send, *refused)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Message) -> tuple[int, str] | None:
        """By what the head of a request says."""
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        length = headers.get(b"content-length", b"")
        if scope["path"] not in _PATHS:
            return 404, "there is nothing here"
        if self._key and scope["path"] != "/health" and not hmac.compare_digest(given, self._key.encode()):
            return 401, "the key is missing or wrong"
        if scope["method"] == "POST" and not length.isdigit():
            return 411, "the length of the request must be said"
        if length and int(length) > LARGEST_BODY:
            return 413, f"a request may have {LARGEST_BODY} bytes"
        return None

    def _too_long(self, body: bytes) -> tuple[int, str] | None:
        try:
            request = json.loads(body)
            if not _is_understood(request):
                return 400, "messages are a list of objects, a prompt is a text"
            length = self._length_of(request)
        except Exception:  # whatever else is wrong with it, the server says so
            return None
        return (400, f"{length} tokens, and the context has {self._context}") if length > self._context else None


def _is_understood(request: Any) -> bool:
    """Whether a request has the form that the server takes for granted."""
    messages, prompt = request.get("messages", []), request.get("prompt", "")
    return isinstance(messages, list) and all(isinstance(each, dict) for each in messages) and isinstance(prompt, str | list)


async def _read(receive: Receive) -> bytes:
    """A request's body: as long as its head says, which has been looked at."""
    chunks = []
    while True:
        message = await receive()
        chunks.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(chunks)


def _again(body: bytes, receive: Receive) -> Receive:
    """The same once more, for the server."""
    told = False

    async def again() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _length_by(tokenizer: Any) -> Callable[[Any], int]:
    """Counts the tokens of a request, and those that it asks for."""

    def length_of(request: Any) -> int:
        if "messages" in request:
            ids = tokenizer.apply_chat_template(request["messages"], add_generation_prompt=True, return_dict=True)["input_ids"]
        else:
            prompt = request["prompt"]
            ids = prompt if isinstance(prompt, list) else tokenizer(prompt)["input_ids"]
        return len(ids) + int(request.get("max_tokens") or request.get("max_completion_tokens") or 1)

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
    answer_caller({"address": f"http://{host}:{port}"})
    threading.Event().wait()


if __name__ == "__main__":
    main()
