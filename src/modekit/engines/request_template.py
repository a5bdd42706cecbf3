"""A request's messages as the served model's chat template writes them, never on an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from modekit.engines.guard import Body, RefusedError
from modekit.errors import TextError
from modekit.text.chat import chat_template_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN = 300  # characters of a template's error
_NO_TEMPLATE = "the model has no chat template; send a prompt to /v1/completions"
_OF_REQUESTS = ("tools", "documents", "continue_final_message")
"""What a request may say to the template, besides its messages and `chat_template_kwargs`."""
_OURS = ("messages", "answer", "chat_template", "tokenize", "add_generation_prompt")


class RequestTemplate:
    """The chat template of a tokenizer. Requests take turns."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._template = chat_template_of(tokenizer)
        self._one = asyncio.Lock()

    async def checked(self, body: Body) -> Body:
        """The request as it is, for an engine that runs the template itself: what is wrong with it, the engine says."""
        messages = body.get("messages")
        if isinstance(messages, list) and all(isinstance(each, dict) for each in messages):
            with suppress(TextError):
                await self._written(body, [{**each, "content": _joined(each.get("content"))} for each in messages])
        return body

    async def written(self, body: Body, messages: Sequence[Mapping[str, object]]) -> str:
        """A request's messages as the model reads them, up to where the answer begins. Raises RefusedError."""
        try:
            return await self._written(body, messages)
        except TextError as error:
            raise RefusedError(400, f"the chat template does not take these messages: {str(error.found)[:_SHOWN]}") from None

    async def _written(self, body: Body, messages: Sequence[Mapping[str, object]]) -> str:
        """Raises RefusedError, and TextError where the template raises an error."""
        template, more = self._template, body.get("chat_template_kwargs") or {}
        if template is None:
            raise RefusedError(400, _NO_TEMPLATE)
        if not isinstance(more, dict):
            raise RefusedError(400, "chat_template_kwargs must be a JSON object")
        asked = {name: body[name] for name in _OF_REQUESTS if name in body}
        variables = {name: value for name, value in {**asked, **more}.items() if name not in _OURS}
        answer = bool(body.get("add_generation_prompt", True))
        async with self._one:  # a thread per request that waits would leave none for anything else
            return await asyncio.to_thread(partial(template.text, messages, answer=answer, **variables))  # type: ignore[arg-type]


def _joined(content: object) -> object:
    """The texts of a message's parts as one text, which is how engines give them to most templates."""
    parts = content if isinstance(content, list) else []
    texts = [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
    return "\n".join(texts) if texts else content
