"""Run as a process of its own: `transformers serve` with one mixture. See serve.py.

What is added to it: mixtures in the modekit architecture, whose class transformers looks up in itself; the guard; the end of
the context; draws where a temperature is asked for; a status for what it would pass over in silence; and no list of what else
lies in the user's cache.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

from starlette.responses import Response

from modekit.engines.child import answer_caller, settings_of_caller, url_of
from modekit.engines.guard import Guard, refusal
from modekit.files.typed import said_by
from modekit.processes import DEVICE_VARIABLE
from modekit.sources.tokenizer_choice import chat_template

_LOOK_S = 0.05
_GRACE_S = 8.0  # in which answers may end after the command did
_NOT_DONE = ["best_of", "echo", "functions", "generation_config", "logit_bias", "logprobs", "n", "presence_penalty"]
_NOT_DONE += ["response_format", "suffix", "tool_choice"]
_HARMLESS = {"best_of": 1, "n": 1, "response_format": {"type": "text"}, "tool_choice": "auto"}
_LEAST_TEMPERATURE = 1e-4
"""Below it, the likeliest token is taken: no softmax is computed."""


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
        asked = [key for key in _NOT_DONE if body.get(key) and body[key] != _HARMLESS.get(key)]
        try:
            contents = [message.get("content") for message in body.get("messages", ())]
            parts = [part for content in contents if isinstance(content, list) for part in content]
            asked += [str(part["type"]) for part in parts if part["type"] != "text"]
        except (AttributeError, LookupError, TypeError):
            raise HTTPException(400, "messages must be a list of messages, each of role and content") from None
        if asked:
            raise HTTPException(400, f"{', '.join(asked)}: transformers does not do this; leave it out")
        known(handler, body)

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
