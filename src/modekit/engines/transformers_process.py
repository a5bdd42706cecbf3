"""Run as a process of its own: `transformers serve` with one mixture. See serve.py.

What is added to it: mixtures in the modekit architecture, whose class transformers looks up in itself; a key; a limit on what
a request may bring; and that nothing but the model's own answers can be asked for, where it would load any model of the hub.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from modekit.engines.child import answer_caller, settings_of_caller
from modekit.engines.guard import Body, Guard, RefusedError
from modekit.engines.listening import url_of
from modekit.engines.request_template import RequestTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LIMITS = ("max_tokens", "max_completion_tokens")
_LOOK_S = 0.05
_AS_WRITTEN = "{{ messages[0]['content'] }}"
"""The chat template of the engine, which gets conversations as the mixture's own template wrote them."""


class RequestWriter:
    """Makes of a request one that the engine can answer: its messages written, and an answer that ends where the context does.

    `context` is the most tokens that there may be, the answer included. The chat template and the tokenizer run here, in other
    processes and threads, as the engine would run them on its event loop and without limits.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: int) -> None:
        self._tokenizer, self._context, self._template = tokenizer, context, RequestTemplate(tokenizer)

    async def __call__(self, body: Body) -> Body:
        """The request for the engine. Raises RefusedError."""
        _check_form(body)
        chat = "messages" in body
        text = await self._template.written(body, await _messages_of(body)) if chat else body.get("prompt", "")
        try:
            length = await asyncio.to_thread(self._length, text, not chat)
        except Exception as error:  # tokenizers raises what it likes
            raise RefusedError(400, f"the text cannot be read: {type(error).__name__}") from None
        asked = max((body[name] for name in _LIMITS if body.get(name) is not None), default=self._context - length)
        if asked < 1 or length + asked > self._context:
            raise RefusedError(
                400, f"the context has {self._context} tokens; the request has {length}, and asks for {max(asked, 1)} of answer"
            )
        kept = {key: value for key, value in body.items() if key not in {*_LIMITS, "chat_template_kwargs"}}
        return {**kept, **({"messages": [{"role": "user", "content": text}]} if chat else {}), "max_tokens": asked}

    def _length(self, text: str, begun: bool) -> int:
        return len(self._tokenizer(text, add_special_tokens=begun, verbose=False)["input_ids"])


async def _messages_of(body: Body) -> list[dict[str, object]]:
    """The messages as `transformers serve` gives them to a template. Raises RefusedError."""
    from transformers.cli.serving.utils import BaseHandler, Modality

    try:
        messages: list[dict[str, object]] = await asyncio.to_thread(
            BaseHandler.get_processor_inputs_from_messages, body["messages"], Modality.LLM
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        raise RefusedError(400, "messages must be a list of objects with role and content") from None
    return messages


def _check_form(request: Body) -> None:
    """Raise RefusedError where a request has not the form that the server takes for granted, or would set what is set here."""
    messages, prompt = request.get("messages", []), request.get("prompt", "")
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages) or not isinstance(prompt, str):
        raise RefusedError(400, "messages must be a list of objects, a prompt must be one text")
    if "generation_config" in request:
        raise RefusedError(400, "generation_config: the server sets it; leave it out")
    if any(type(request.get(name, 1)) is not int and request.get(name) is not None for name in _LIMITS):
        raise RefusedError(400, f"{' and '.join(_LIMITS)} must be whole numbers")


def main() -> None:
    """Load the mixture, say where it listens, and serve until the parent is gone."""
    settings = settings_of_caller()
    import transformers
    from transformers.cli.serve import Serve

    from modekit.architecture.modeling_modekit import ModekitForCausalLM
    from modekit.loaded.load import load_tokenizer

    # Text alone is served, of a mixture that keeps a vision tower, too.
    transformers.ModekitForCausalLM = transformers.ModekitForImageTextToText = ModekitForCausalLM
    transformers.AutoProcessor = transformers.AutoTokenizer
    folder = Path(settings["model"])
    rewrite = RequestWriter(load_tokenizer(folder), settings["context"])
    os.chdir(folder.parent)  # so that the model is known by its name, and no answer tells where it lies

    class Guarded(Serve):  # type: ignore[misc]
        """With the guard before it."""

        def start_server(self) -> None:
            for loaded in self._model_manager.loaded_models.values():
                loaded.processor.chat_template = _AS_WRITTEN
            self.server.config.app = Guard(self.server.config.app, settings["key"], rewrite=rewrite)
            super().start_server()

    served = Guarded(
        force_model=folder.name,
        host=settings["host"],
        port=settings["port"],
        device="auto",
        dtype="auto",
        trust_remote_code=settings["trust_remote_code"],
        log_level="warning",
        non_blocking=True,
    )
    while not served.server.started:
        if not served._thread.is_alive():
            raise SystemExit("the server ended before it listened")
        time.sleep(_LOOK_S)
    host, port = served.server.servers[0].sockets[0].getsockname()[:2]
    answer_caller({"address": url_of(host, port)})
    threading.Event().wait()


if __name__ == "__main__":
    main()
