"""Run as a process of its own: `transformers serve` with one mixture. See serve.py.

What is added to it: mixtures in the modekit architecture, whose class transformers looks up in itself; the guard; a status for
requests that its handlers would answer with 500; draws where a temperature is asked for; and no list of what else lies in the
user's cache.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Json, PositiveInt, ValidationError

from modekit.engines.child import answer_caller, settings_of_caller
from modekit.engines.guard import Body, Guard, RefusedError
from modekit.engines.listening import url_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOOK_S = 0.05
_GRACE_S = 8.0  # in which answers may end after the command did
_SHOWN = 300  # characters of a library's error
_NOT_DONE = ("best_of", "echo", "generation_config", "logit_bias", "logprobs", "presence_penalty", "suffix")


class _Text(BaseModel):
    type: Literal["text"]


class _Part(_Text):
    text: str


class _Function(BaseModel, extra="allow"):
    name: str
    arguments: Json[dict[str, Any]] | dict[str, Any]


class _Call(BaseModel, extra="allow"):
    function: _Function


class _Message(BaseModel, extra="allow"):
    role: str
    content: str | list[_Part] | None = None
    tool_calls: list[_Call] | None = None

    def as_read(self) -> dict[str, Any]:
        """As transformers gives it to the template: with one text."""
        parts = self.content if isinstance(self.content, list) else []
        text = " ".join(part.text for part in parts) or self.content or ""
        return {**self.model_dump(exclude_unset=True), "content": "" if self.tool_calls else text}


class _Request(BaseModel):
    """What a request may say, where transformers takes its kind for granted."""

    model_config = ConfigDict(strict=True, extra="allow")

    messages: Annotated[list[_Message], Field(min_length=1)] | None = None
    prompt: Annotated[str, Field(min_length=1)] | None = None
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    n: Literal[1] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(gt=-1, le=2)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(min_length=1)] | None = None
    response_format: _Text | None = None
    stream: bool | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class RequestCheck:
    """Refuses what the engine cannot answer, and ends an answer where the context of so many tokens does."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: int) -> None:
        self._tokenizer, self._context = tokenizer, context

    async def __call__(self, body: Body) -> Body:
        """The request for the engine. Raises RefusedError."""
        try:
            asked = _Request.model_validate(body)
        except ValidationError as error:
            first = error.errors()[0]
            raise RefusedError(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        for key in _NOT_DONE:
            if body.get(key):
                raise RefusedError(400, f"{key}: transformers does not do this; leave it out")
        try:
            length = await asyncio.to_thread(self._length, asked)
        except Exception as error:  # a template's own error, or whatever tokenizers raises
            raise RefusedError(400, f"the text cannot be read: {str(error)[:_SHOWN]}") from None
        left = self._context - length
        if not 0 < length < self._context:
            raise RefusedError(400, f"the request has {length} tokens; between 1 and {self._context - 1} fit into the context")
        wanted = min(asked.max_completion_tokens or asked.max_tokens or left, left)
        said = {key: value for key, value in body.items() if value is not None and key != "max_completion_tokens"}
        return {**said, "max_tokens": wanted}

    def _length(self, asked: _Request) -> int:
        if asked.messages is None:
            return len(self._tokenizer(asked.prompt or "", verbose=False)["input_ids"])
        more = {"tools": asked.tools, **(asked.chat_template_kwargs or {})}
        return len(
            self._tokenizer.apply_chat_template(
                [each.as_read() for each in asked.messages], add_generation_prompt=True, **more
            )["input_ids"]
        )


def _draw_where_asked() -> None:
    """By itself a temperature does nothing where the model's own generation config does not draw; beams cannot be streamed."""
    from transformers.cli.serving.utils import BaseHandler

    known = BaseHandler._build_generation_config

    def built(handler: Any, body: Body, *settings: Any, **more: Any) -> Any:
        config = known(handler, body, *settings, **more)
        config.do_sample = bool(body["temperature"]) if "temperature" in body else config.do_sample
        config.num_beams = config.num_return_sequences = 1
        return config

    BaseHandler._build_generation_config = built


def main() -> None:
    """Load the mixture, say where it listens, and serve until the parent is gone."""
    serving: list[Any] = []
    settings = settings_of_caller(at_end=lambda: _end(serving))
    import transformers
    from transformers.cli.serve import Serve

    from modekit.architecture.modeling_modekit import ModekitForCausalLM
    from modekit.loaded.load import load_tokenizer

    transformers.ModekitForCausalLM = ModekitForCausalLM
    transformers.AutoProcessor = transformers.AutoTokenizer
    _draw_where_asked()
    folder = Path(settings["model"])
    check = RequestCheck(load_tokenizer(folder), settings["context"])
    os.chdir(folder.parent)  # so that the model is known by its name, and no answer tells where it lies
    described = {"id": folder.name, "object": "model", "created": int(time.time()), "owned_by": "modekit"}

    class Guarded(Serve):  # type: ignore[misc]
        """With the guard before it."""

        def start_server(self) -> None:
            self._model_manager.list_models = lambda: [described]
            self.server.config.app = Guard(self.server.config.app, settings["key"], check)
            super().start_server()

    fixed = {"device": "auto", "dtype": "auto", "log_level": "error", "non_blocking": True}
    asked = {key: settings[key] for key in ("host", "port", "trust_remote_code")}
    serving.append(Guarded(force_model=folder.name, **asked, **fixed))
    _wait_for(serving[0])
    answer_caller({"address": url_of(settings["host"], settings["port"])})
    threading.Event().wait()


def _wait_for(served: Any) -> None:
    """Until it listens."""
    while not served.server.started:
        if not served._thread.is_alive():
            raise SystemExit("the server ended before it listened")
        time.sleep(_LOOK_S)


def _end(serving: list[Any]) -> None:
    """End the process once the answers that are on their way have ended."""
    for served in serving:
        served.server.should_exit = True
        served._thread.join(_GRACE_S)
    os._exit(0)


if __name__ == "__main__":
    main()
