"""Run as a process of its own: `transformers serve` with one mixture. See serve.py.

What is added to it: mixtures in the modekit architecture, whose class transformers looks up in itself; the guard; the end of
the context; draws where a temperature is asked for; a status for what it would pass over in silence; and no list of what else
lies in the user's cache.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modekit.engines.child import answer_caller, settings_of_caller, url_of
from modekit.engines.guard import Guard
from modekit.run import DEVICE_VARIABLE
from modekit.sources.tokenizer_choice import chat_template

_LOOK_S = 0.05
_GRACE_S = 8.0  # in which answers may end after the command did
_NOT_DONE = ["best_of", "echo", "functions", "generation_config", "logit_bias", "logprobs", "n", "presence_penalty"]
_NOT_DONE += ["response_format", "suffix", "tool_choice"]
_TOKENS, _ANY = (1, 2**31), (0, 2**31)
_NUMBERS = {"max_tokens": _TOKENS, "max_completion_tokens": _TOKENS, "seed": _ANY, "temperature": _ANY, "top_p": (0, 1)}
_HARMLESS = {"best_of": 1, "n": 1, "response_format": {"type": "text"}, "tool_choice": "auto"}


def _refuse_what_is_not_done(chats: bool) -> None:
    """By itself it only logs which parts of a request it passes over, and breaks off where a chat has no template."""
    from fastapi import HTTPException
    from transformers.cli.serving.utils import BaseHandler

    known = BaseHandler._validate_request

    def checked(handler: Any, body: dict[str, Any]) -> None:
        if wrong := [*_malformed(body)]:
            raise HTTPException(400, "; ".join(wrong))
        if body.get("messages") and not chats:
            raise HTTPException(400, "the model has no chat template: send a prompt to /v1/completions")
        parts = (part for message in body.get("messages") or () for part in message.get("content") or ())
        asked = {str(part.get("type")) for part in parts if isinstance(part, dict)} - {"text"}
        asked |= {key for key in _NOT_DONE if body.get(key) and body[key] != _HARMLESS.get(key)}
        if asked:
            raise HTTPException(400, f"{', '.join(sorted(asked))}: transformers does not do this; leave it out")
        known(handler, body)

    BaseHandler._validate_request = checked


def _malformed(body: dict[str, Any]) -> Iterator[str]:
    """What of a request it would end in an error of its own."""
    for key, (least, most) in _NUMBERS.items():
        value = body.get(key)
        if value is not None and not (type(value) in (int, float) and least <= value <= most):
            yield f"{key} must be a number from {least} to {most}"
    for key, kind, kinds in (("messages", dict, "messages"), ("stop", str, "texts")):
        value = [body[key]] if isinstance(body.get(key), str) and kind is str else body.get(key) or []
        if not isinstance(value, list) or not all(isinstance(each, kind) for each in value):
            yield f"{key} must be a list of {kinds}"


def _draw_where_asked() -> None:
    """By itself a temperature does nothing where the model's own generation config does not draw; beams cannot be streamed."""
    from transformers.cli.serving.utils import BaseHandler

    known = BaseHandler._build_generation_config

    def built(handler: Any, body: dict[str, Any], *settings: Any, **more: Any) -> Any:
        config = known(handler, body, *settings, **more)
        config.do_sample = config.do_sample if body.get("temperature") is None else bool(body["temperature"])
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
