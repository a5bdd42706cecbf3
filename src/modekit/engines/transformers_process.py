"""Run as a process of its own: `transformers serve` with one mixture. See serve.py.

What is added to it: mixtures in the modekit architecture, whose class transformers looks up in itself; a key; a limit on what
a request may bring; and that nothing but the model's own answers can be asked for, where it would load any model of the hub.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modekit.engines.child import answer_caller, settings_of_caller
from modekit.engines.guard import Guard, RefusedError
from modekit.engines.serve import url_of

_LIMITS = ("max_tokens", "max_completion_tokens")
_LOOK_S = 0.05


def fitted_to(context: int, length_of: Callable[[Any], int]) -> Callable[[bytes], bytes]:
    """Makes of a request one whose answer ends where the context does.

    `length_of` gives the tokens of what a request says; `context` is the most there may be, its answer included.
    """

    def fitted(body: bytes) -> bytes:
        try:
            request = json.loads(body)
            _check_form(request)
            length = length_of(request)
        except RefusedError:
            raise
        except Exception as error:  # a template, a tokenizer: each raises what it likes
            raise RefusedError(400, f"the request cannot be read: {type(error).__name__}") from None
        asked = max((request[name] for name in _LIMITS if request.get(name) is not None), default=context - length)
        if asked < 1 or length + asked > context:
            raise RefusedError(400, f"{length} tokens and {max(asked, 1)} of answer, and the context has {context}")
        for name in _LIMITS:
            request.pop(name, None)
        return json.dumps({**request, "max_tokens": asked}).encode()

    return fitted


def _check_form(request: Any) -> None:
    """Raise RefusedError where a request has not the form that the server takes for granted, or would set what is set here."""
    if not isinstance(request, dict):
        raise RefusedError(400, "the request is no object")
    messages, prompt = request.get("messages", []), request.get("prompt", "")
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages) or not isinstance(prompt, str):
        raise RefusedError(400, "messages are a list of objects, a prompt is one text")
    if "generation_config" in request:
        raise RefusedError(400, "generation_config is not taken here")
    if any(type(request.get(name, 1)) is not int and request.get(name) is not None for name in _LIMITS):
        raise RefusedError(400, f"{' and '.join(_LIMITS)} are whole numbers")


def _length_by(tokenizer: Any) -> Callable[[Any], int]:
    """Counts the tokens of a request."""

    def length_of(request: Any) -> int:
        if "messages" in request:
            said = tokenizer.apply_chat_template(request["messages"], add_generation_prompt=True, return_dict=True)
        else:
            said = tokenizer(request.get("prompt", ""))
        return len(said["input_ids"])

    return length_of


def main() -> None:
    """Load the mixture, say where it listens, and serve until the parent is gone."""
    settings = settings_of_caller()
    import transformers
    from transformers.cli.serve import Serve

    from modekit.architecture.modeling_modekit import ModekitForCausalLM
    from modekit.loaded.load import load_tokenizer

    transformers.ModekitForCausalLM = ModekitForCausalLM
    folder = Path(settings["model"])
    fitted = fitted_to(settings["context"], _length_by(load_tokenizer(folder)))
    os.chdir(folder.parent)  # so that the model is known by its name, and no answer tells where it lies

    class Guarded(Serve):  # type: ignore[misc]
        """With the guard before it."""

        def start_server(self) -> None:
            self.server.config.app = Guard(self.server.config.app, settings["key"], fitted=fitted)
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
