"""llama.cpp, asked what a GGUF file says: how it cuts a text into tokens, what it writes greedily, what it thinks of a text.

xllamacpp carries llama.cpp's own HTTP server; it runs in a process of its own on the loopback address, and ends with this one.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from modekit.engines.child import Child
from modekit.engines.sampling import Sampling
from modekit.engines.threads import threads_environment
from modekit.errors import EngineError

_LARGE_BIAS = 1e6
_ALL = 2**30
_TIMEOUT_S = 600.0


class Llama:
    """A GGUF file in llama.cpp, with adapters or without. Use it as a context manager.

    It is the file alone until `use_adapter` says otherwise. `exact`: keys and values as they were computed, where llama.cpp
    rounds them to 16 bits by default. Raises EngineError when llama.cpp cannot load a file.
    """

    def __init__(self, file: Path, *, context: int, threads: int, adapters: Sequence[Path] = (), exact: bool = True) -> None:
        self._file, self._context = file, context
        self._adapters = len(adapters)
        self._chosen: int | None = None
        settings = {
            "model": str(file),
            "name": file.name,
            "host": "127.0.0.1",
            "port": 0,
            "key": None,
            "context": context,
            "parallel": 1,
            "threads": threads,
            "exact": exact,
            "adapters": [str(path.absolute()) for path in adapters],
        }
        self._child = Child("modekit.engines.llama_process", settings, threads_environment(threads))
        ready = self._child.answer()
        if ready is None:
            self._child.stop()
            raise EngineError(
                "llama.cpp cannot load the file",
                where=", ".join(map(str, (file, *adapters))),
                found=self._child.complaint(),
                remedy="see its message; its docs list the architectures that it knows",
            )
        self._address = ready["address"]
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.stop()

    def use_adapter(self, adapter: int | None) -> None:
        """Be the model with an adapter, by its place among those that were given; None: the model alone."""
        self._chosen = adapter

    def tokenize(self, text: str, *, begun: bool = False) -> list[int]:
        """The ids of a text, special tokens in it read as such; `begun`: with those that begin and end every text."""
        answer = self._ask("tokenize", {"content": text, "add_special": begun, "parse_special": True})
        return [int(token) for token in answer["tokens"]]

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a conversation inside the chat template, up to where the answer begins."""
        return self.tokenize(self._ask("apply-template", {"messages": list(messages)})["prompt"], begun=True)

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens after the given ones, always the likeliest; fewer where the text ends."""
        return [int(token) for token in self._complete(ids, n_predict=count, return_tokens=True)["tokens"]]

    def written(self, ids: Sequence[int], count: int, sampling: Sampling) -> Iterator[tuple[str, list[int], bool]]:
        """At most `count` tokens after the given ones as they come: what was written, the tokens of it that are known, and
        whether it ends here because there may be no more.
        """
        settings = {"n_predict": count, "return_tokens": True, "stream": True, **sampling.for_llama()}
        with self._opened("completion", self._request(ids, **settings)) as answer:
            for line in answer:
                if line.startswith(b"data: "):
                    said = json.loads(line.removeprefix(b"data: "))
                    tokens = [int(token) for token in said.get("tokens", [])]
                    yield str(said.get("content", "")), tokens, said.get("stop_type") == "limit"

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
            answer = self._complete(before, n_predict=1, n_probs=likeliest, logit_bias=[[taken, _LARGE_BIAS]])
            for said in answer.get("completion_probabilities", []):
                for each in (said, *said["top_logprobs"]):
                    if each["id"] == token:
                        return float(each["logprob"])
        raise EngineError(
            "llama.cpp does not know a token of the tokenizer",
            where=str(self._file),
            found=token,
            remedy="name the pre-tokenizer with --pre-tokenizer; else serve the mixture with vLLM or transformers",
        )

    def _complete(self, ids: Sequence[int], **settings: Any) -> Any:
        return self._ask("completion", self._request(ids, **settings))

    def _request(self, ids: Sequence[int], **settings: Any) -> dict[str, Any]:
        # every one is named: a request that names none goes on from what another left in the cache
        scales = [{"id": place, "scale": float(place == self._chosen)} for place in range(self._adapters)]
        everywhere = {"repeat_last_n": self._context}  # a penalty, if there is one, is for what stands anywhere before
        return {"prompt": list(ids), "temperature": 0.0, "cache_prompt": True, "lora": scales, **everywhere, **settings}

    def _ask(self, what: str, request: dict[str, Any]) -> Any:
        with self._opened(what, request) as answer:
            return json.load(answer)

    @contextmanager
    def _opened(self, what: str, request: dict[str, Any]) -> Iterator[IO[bytes]]:
        """An answer, to be read inside the block. Raises EngineError."""
        message = urllib.request.Request(
            f"{self._address}/{what}", json.dumps(request).encode(), {"Content-Type": "application/json"}
        )
        try:
            with self._open(message, timeout=_TIMEOUT_S) as answer:
                yield answer
        except (OSError, ValueError) as error:
            detail = error.read().decode(errors="replace") if isinstance(error, urllib.error.HTTPError) else str(error)
            found = detail if self._child.is_running() else self._child.complaint()
            raise EngineError(
                "llama.cpp did not answer", where=str(self._file), found=found, remedy="see its message, and try again"
            ) from None
