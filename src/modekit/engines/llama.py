"""llama.cpp, asked what a GGUF file says: how it cuts a text into tokens, what it writes greedily, what it thinks of a text.

xllamacpp has llama.cpp's own HTTP server; it runs in a process of its own on the loopback address, and ends with this one.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modekit.engines.child import Child, threads_environment
from modekit.errors import EngineError

_LARGE_BIAS = 1e6
_ALL = 2**30
_TIMEOUT_S = 600.0


class Llama:
    """A GGUF file in llama.cpp, keys and values as they were computed. Use it as a context manager.

    Raises EngineError when llama.cpp cannot load the file.
    """

    def __init__(self, file: Path, *, context: int, threads: int) -> None:
        self._file = file
        address = {"name": file.name, "host": "127.0.0.1", "port": 0, "key": None}
        settings = {"model": str(file), **address, "context": context, "parallel": 1, "threads": threads, "exact": True}
        self._child = Child("modekit.engines.llama_process", settings, threads_environment(threads))
        ready = self._child.answer()
        if ready is None:
            self._child.stop()
            raise EngineError(
                "llama.cpp cannot load the file",
                where=str(file),
                found=self._child.complaint(),
                remedy="see its message; its docs list the architectures that it knows",
            )
        self._address = ready["address"]
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.stop()

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text, special tokens in it read as such, without those that begin and end every text."""
        answer = self._ask("tokenize", {"content": text, "add_special": False, "parse_special": True})
        return [int(token) for token in answer["tokens"]]

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens after the given ones, always the likeliest; fewer where the text ends."""
        return [int(token) for token in self.complete(ids, n_predict=count, return_tokens=True)["tokens"]]

    def logprobs(self, ids: Sequence[int]) -> list[float]:
        """The log-probability in nats of every token of a text but the first, each after those before it."""
        harmless = self.tokenize("a")[0]
        return [self._logprob(ids[:place], ids[place], harmless) for place in range(1, len(ids))]

    def _logprob(self, before: Sequence[int], token: int, harmless: int) -> float:
        """Of one token.

        llama.cpp says it of the token that it took, which a bias decides without changing what is said; but it says nothing
        where that token is half a character. Then all tokens are asked for, while it takes another one.
        """
        for taken, likeliest in ((token, 1), (harmless, _ALL)):
            answer = self.complete(before, n_predict=1, n_probs=likeliest, logit_bias=[[taken, _LARGE_BIAS]])
            for said in answer.get("completion_probabilities", []):
                for each in (said, *said["top_logprobs"]):
                    if each["id"] == token:
                        return float(each["logprob"])
        raise EngineError(
            "llama.cpp does not know a token of the tokenizer",
            where=str(self._file),
            found=token,
            remedy="serve the mixture with vLLM or transformers",
        )

    def complete(self, ids: Sequence[int], **settings: Any) -> Any:
        """What the server says after the given tokens; `settings` as its /completion takes them."""
        return self._ask("completion", {"prompt": list(ids), "temperature": 0.0, "cache_prompt": True, **settings})

    def _ask(self, what: str, request: dict[str, Any]) -> Any:
        """An answer. Raises EngineError."""
        message = urllib.request.Request(
            f"{self._address}/{what}", json.dumps(request).encode(), {"Content-Type": "application/json"}
        )
        try:
            with self._open(message, timeout=_TIMEOUT_S) as answer:
                return json.load(answer)
        except (OSError, ValueError) as error:
            detail = error.read().decode(errors="replace") if isinstance(error, urllib.error.HTTPError) else str(error)
            found = detail if self._child.is_running() else self._child.complaint()
            raise EngineError(
                "llama.cpp did not answer", where=str(self._file), found=found, remedy="see its message, and try again"
            ) from None
