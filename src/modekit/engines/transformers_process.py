"""Run as a process of its own: `transformers serve` with one mixture. See serve.py.

What is added to it: mixtures in the modekit architecture, whose class transformers looks up in itself; the guard; the end of
the context; draws where a temperature is asked for; a status for what it would pass over in silence; and no list of what else
lies in the user's cache.
"""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, Json, ValidationError, model_validator
from starlette.responses import Response

from modekit.engines.child import answer_caller, settings_of_caller, url_of
from modekit.engines.guard import Guard, refusal
from modekit.files.typed import problem_in, said_by
from modekit.processes import DEVICE_VARIABLE
from modekit.sources.tokenizer_choice import chat_template

_LOOK_S = 0.05
_GRACE_S = 8.0  # in which answers may end after the command did
_NOT_DONE = ["best_of", "echo", "functions", "generation_config", "logit_bias", "logprobs", "n", "presence_penalty"]
_NOT_DONE += ["response_format", "suffix", "tool_choice"]
_HARMLESS = {"best_of": 1, "n": 1, "response_format": {"type": "text"}, "tool_choice": "auto"}
_LEAST_TEMPERATURE = 1e-4
"""Below it, the likeliest token is taken: no softmax is computed."""
_Tokens = Annotated[int, Field(ge=1, le=2**31)]


def _listed(kind: type) -> BeforeValidator:
    """One value where a list may stand."""
    return BeforeValidator(lambda value: [value] if isinstance(value, kind) else value)


class Part(BaseModel, extra="allow"):
    """A part of what a message says."""

    type: str
    text: str

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, part: object) -> object:
        if isinstance(part, dict) and part.get("type") != "text":
            raise ValueError(f"{part.get('type')}: transformers does not do this; leave it out")
        return {"type": "text", "text": part} if isinstance(part, str) else part


class CalledFunction(BaseModel, extra="allow"):
    """What an earlier answer called."""

    arguments: Json[dict[str, Any]] | dict[str, Any]


class ToolCall(BaseModel, extra="allow"):
    """The call of a function in an earlier answer."""

    function: CalledFunction


class ChatMessage(BaseModel, extra="allow"):
    """One message of a chat."""

    role: str
    content: Annotated[list[Part], _listed(str)] | None = None
    tool_calls: list[ToolCall] | None = None


class CompletionRequest(BaseModel, extra="allow", allow_inf_nan=False):
    """What transformers reads of a request, and would end in an error of its own where it is malformed."""

    max_tokens: _Tokens | None = None
    seed: Annotated[int, Field(ge=0, le=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2**31)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(gt=-1, le=2)] | None = None
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1), _listed(str)] | None = None
    stream: bool | None = None
    prompt: str = ""

    @model_validator(mode="before")
    @classmethod
    def _is_unicode(cls, body: object) -> object:
        json.dumps(body, ensure_ascii=False).encode()  # raises where half a character stands alone
        return body


class ChatRequest(CompletionRequest):
    """The same of a chat."""

    max_completion_tokens: _Tokens | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] = {}


def _refuse_what_is_not_done(chats: bool) -> None:
    """By itself it only logs which parts of a request it passes over, and breaks off where a chat has no template."""
    from fastapi import HTTPException
    from transformers import PreTrainedTokenizerBase
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.utils import BaseHandler

    known, write = BaseHandler._validate_request, PreTrainedTokenizerBase.apply_chat_template

    def checked(handler: Any, body: dict[str, Any]) -> None:
        is_chat = isinstance(handler, ChatCompletionHandler)
        if is_chat and not chats:
            raise HTTPException(400, "the model has no chat template: send a prompt to /v1/completions")
        if asked := [key for key in _NOT_DONE if body.get(key) and body[key] != _HARMLESS.get(key)]:
            raise HTTPException(400, f"{', '.join(asked)}: transformers does not do this; leave it out")
        try:
            request = (ChatRequest if is_chat else CompletionRequest).model_validate(body)
        except ValidationError as error:
            raise HTTPException(400, problem_in(error)) from None
        known(handler, body)
        body.update(request.model_dump(exclude_unset=True))

    def written(tokenizer: Any, *messages: Any, **settings: Any) -> Any:
        try:
            return write(tokenizer, *messages, **settings)
        except Exception as error:  # a template raises what it likes
            raise HTTPException(400, f"the chat template does not take these messages: {said_by(error)}") from None

    BaseHandler._validate_request = checked
    PreTrainedTokenizerBase.apply_chat_template = written


def _answer_errors_as_openai(app: Any) -> None:
    """The status as it is, and the reason where OpenAI's clients read it."""
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException

    async def refuse(_: object, error: Any) -> Response:
        return refusal(getattr(error, "status_code", 422), getattr(error, "detail", "the body must be a JSON object"))

    app.add_exception_handler(HTTPException, refuse)
    app.add_exception_handler(RequestValidationError, refuse)


def _draw_where_asked() -> None:
    """By itself a temperature does nothing where the model's own generation config does not draw; beams cannot be streamed."""
    from transformers.cli.serving.utils import BaseHandler

    known = BaseHandler._build_generation_config

    def built(handler: Any, body: dict[str, Any], *settings: Any, **more: Any) -> Any:
        config = known(handler, body, *settings, **more)
        if body.get("temperature") is not None:
            config.do_sample = body["temperature"] >= _LEAST_TEMPERATURE
        config.num_beams = config.num_return_sequences = 1
        return config

    BaseHandler._build_generation_config = built


def _end_with_context(context: int) -> None:
    """Refuse a text that fills the context of so many tokens, and end an answer where the context does."""
    from fastapi import HTTPException
    from transformers.cli.serving.utils import GenerateManager

    def bounded(generate: Any) -> Any:
        def within(manager: Any, model: Any, processor: Any, inputs: Any, config: Any, *more: Any, **named: Any) -> Any:
            length = inputs["input_ids"].shape[-1]
            if not 0 < length < context:
                raise HTTPException(400, f"the request has {length} tokens; between 1 and {context - 1} fit into the context")
            config.max_new_tokens = min(config.max_new_tokens, context - length)
            return generate(manager, model, processor, inputs, config, *more, **named)

        return within

    for name in ("generate_streaming", "generate_non_streaming"):
        setattr(GenerateManager, name, bounded(getattr(GenerateManager, name)))


def main() -> None:
    """Load the mixture, say where it listens, and serve until the parent is gone."""
    serving: list[Any] = []
    settings = settings_of_caller(at_end=lambda: _end(serving))
    import transformers
    from transformers.cli.serve import Serve

    from modekit.architecture.modeling_modekit import ModekitForCausalLM

    transformers.ModekitForCausalLM = ModekitForCausalLM
    transformers.AutoProcessor = transformers.AutoTokenizer
    _draw_where_asked()
    _end_with_context(settings["context"])
    folder = Path(settings["model"])
    _refuse_what_is_not_done(chat_template(folder) is not None)
    os.chdir(folder.parent)  # so that the model is known by its name, and no answer tells where it lies
    described = {"id": folder.name, "object": "model", "created": int(time.time()), "owned_by": "modekit"}

    class Guarded(Serve):  # type: ignore[misc]
        """With the guard before it."""

        def start_server(self) -> None:
            self._model_manager.list_models = lambda: [described]
            _answer_errors_as_openai(self.server.config.app)
            self.server.config.app = Guard(self.server.config.app, settings["key"])
            super().start_server()

    fixed = {"device": os.environ.get(DEVICE_VARIABLE, "auto"), "dtype": "auto", "log_level": "error", "non_blocking": True}
    asked = {key: settings[key] for key in ("host", "port", "trust_remote_code")}
    serving.append(Guarded(force_model=folder.name, **asked, **fixed))
    while not serving[0].server.started:
        if not serving[0]._thread.is_alive():
            raise SystemExit("the server ended before it listened")
        time.sleep(_LOOK_S)
    answer_caller({"address": url_of(settings["host"], settings["port"])})
    threading.Event().wait()


def _end(serving: list[Any]) -> None:
    """End the process once the answers that are on their way have ended."""
    for served in serving:
        served.server.should_exit = True
        served._thread.join(_GRACE_S)
    os._exit(0)


if __name__ == "__main__":
    main()
