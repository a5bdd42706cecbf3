"""Is a GGUF file in llama.cpp the model that transformers has? Asked before anybody is told that it is.

Compared are the tokens of texts, what is written greedily, and the perplexity of texts, whose change is bounded with its
error. With float32 weights what is written must agree, too, and only the rounding of sums is left of a change.

xllamacpp has llama.cpp's own HTTP server; it runs in a process of its own on the loopback address, and ends with this one.
"""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.engines.child import Child, default_threads, threads_environment
from modekit.errors import EngineError, ModekitError
from modekit.evaluation.domains import recipe_texts
from modekit.evaluation.results import mean_error
from modekit.loaded.load import load_model, load_tokenizer
from modekit.run import QUIET, Run
from modekit.text.document import Document
from modekit.text.plain import in_common
from modekit.text.sequences import encode
from modekit.text.shipped import shipped_documents

EXACT = "f32"
"""The outtype with which all must agree."""
LARGEST_LOSS = 0.01  # of perplexity, with fewer bits
ROUNDING = 1e-3  # of perplexity, with float32 weights
_SURE = 2.0  # standard errors
_LARGE_BIAS = 1e6
_ALL = 2**30
_TIMEOUT_S = 600.0
GREEDY_TOKENS = 24
_BEGINNING = 8  # tokens after which the model writes on
MOST_TOKENS = 3_000
"""Of all texts together, with fewer bits."""
LONGEST = 128
"""Tokens of one text."""
_SHIPPED = ("general", "code", "medicine", "german", "french")
TEXTS = (
    "The heart moves blood through the body. It beats about a hundred thousand times a day, and rests only between two beats.",
    "def area(width, height):\n    # two sides, 3.14 would be for circles\n    return width * height\n\n\nprint(area(12, 7))\n",
    "Das Gericht hat die Klage abgewiesen; die Kosten tr\u00e4gt der Kl\u00e4ger. L'appel est recevable, s'il est motiv\u00e9.",
    "Item 27:  4,096 kg at 19.95 \u2013 \u201cas is\u201d, we're told\n\n\tTotal\t81,715.20  (VAT 7%)\n",
)
"""Prose, code, other languages, numbers and white space."""
CUTTING = (
    "\n \n\n \t\t  3 33 333 3333 33333 3.3 3..3 I've I'LL 'RE DON'T ======= ''''```\"\"\" \u043d\u0435\u0449\u043e "
    "\u6211\u60f3\u5728apple\u5de5\u4f5c1314\u5929\uff5e \U0001f680 camelCase HTTPServer x_y\r\n  z"
)
"""What ways to cut a text into words differ in: digits, cases, apostrophes, signs, scripts."""


@dataclass(frozen=True)
class Proof:
    """What was found.

    Attributes:
        same, written: of the tokens written greedily, those that both write, up to the first that differs in a text, and all.
        loss, margin: how much larger the perplexity is in llama.cpp, as a share, and two standard errors of that.
    """

    outtype: str
    same: int
    written: int
    texts: int
    tokens: int
    perplexity: float
    loss: float
    margin: float

    def __str__(self) -> str:
        return (
            f"{self.same} of {self.written} greedy tokens as in transformers, perplexity {self.perplexity:.5g} "
            f"({self.loss:+.2%} \u00b1 {self.margin:.2%}) over {self.tokens:,} tokens of {self.texts:,} texts"
        )

    def check(self, file: Path) -> None:
        """Raise EngineError, which names the file, where llama.cpp computes another model, or fewer bits lost too much."""
        changed = not abs(self.loss) + self.margin <= (ROUNDING if self.outtype == EXACT else LARGEST_LOSS)
        if self.outtype == EXACT and (changed or self.same < self.written):
            raise EngineError(
                "llama.cpp computes another model than transformers",
                where=str(file),
                found=str(self),
                expected=f"the same tokens, perplexity within {ROUNDING:.1%}",
                remedy="do not use llama.cpp for it; serve the mixture with vLLM or transformers, and report this",
            )
        if changed:
            raise EngineError(
                "the model in llama.cpp is not proven to be as good as in transformers",
                where=str(file),
                found=str(self),
                expected=f"perplexity within {LARGEST_LOSS:.0%}, two standard errors included",
                remedy=f"choose a finer --outtype, or give the mixture's domains more text (up to {MOST_TOKENS:,} tokens are "
                f"read); {EXACT} shows whether it is the bits",
            )


def documents_of(checkpoint: Checkpoint) -> list[Document]:
    """Held-out text of a mixture's domains, as far as it can be read, and text that comes with modekit: one of each in turn."""
    try:
        own = [held.documents for held in recipe_texts(checkpoint).report()]
    except ModekitError:  # whatever is wrong with a text, the weights can be compared on another
        own = []
    rounds = islice(zip_longest(*own, *map(shipped_documents, _SHIPPED)), MOST_TOKENS)
    return [document for each in rounds for document in each if document is not None]


def compare(folder: Path, file: Path, outtype: str, documents: Sequence[Document], *, run: Run = QUIET) -> Proof:
    """Compare a GGUF file, whose weights are stored as `outtype`, with the model folder that it was made of; not judged yet.

    `documents`: what it is compared on where that is not float32. Raises EngineError where llama.cpp cuts a text into other
    tokens, or cannot load the file.
    """
    tokenizer, model = load_tokenizer(folder, run=run), load_model(folder, run=run)
    longest = int(model.config.max_position_embeddings) - 1
    cut = {
        text: tokenizer(text, add_special_tokens=False)["input_ids"][: longest - GREEDY_TOKENS] for text in (*TEXTS, CUTTING)
    }
    context = max(LONGEST, *map(len, cut.values())) + GREEDY_TOKENS + 1
    with Llama(file, context=context, threads=default_threads()) as llama:
        _check_tokens(llama, cut, folder)
        begun = [cut[text][:_BEGINNING] for text in TEXTS]
        written = [(_greedy(model, ids), llama.greedy(ids, GREEDY_TOKENS)) for ids in begun]
        own = [cut[text] for text in TEXTS]
        wanted = own if outtype == EXACT else list(_beginnings(documents, tokenizer, min(longest, LONGEST)))
        step = run.over(f"compare {file.name} in llama.cpp", wanted, len(wanted))
        compared = [(_logprobs(model, ids), llama.logprobs(ids)) for ids in step]
    loss, margin = _loss(compared)
    tokens = sum(len(theirs) for _, theirs in compared)
    return Proof(
        outtype=outtype,
        same=sum(in_common(*each) for each in written),
        written=sum(min(map(len, each)) for each in written),
        texts=len(compared),
        tokens=tokens,
        perplexity=math.exp(-sum(sum(theirs) for _, theirs in compared) / tokens),
        loss=loss,
        margin=margin,
    )


def _beginnings(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, longest: int) -> Iterator[list[int]]:
    """Beginnings of at most `longest` tokens, until there are MOST_TOKENS; texts of a single token are left out."""
    left = MOST_TOKENS
    for document in documents:
        for sequence in encode(tokenizer, [document], max_tokens=min(left, longest), sequence_length=longest)[:1]:
            left -= len(sequence.ids)
            yield list(sequence.ids)
        if left < 2:
            return


@torch.no_grad()
def _greedy(model: Any, ids: list[int]) -> list[int]:
    """What transformers writes, always the likeliest token: of generation_config.json, only the ends of a text are read."""
    ends, made = model.generation_config.eos_token_id, list[int]()
    while len(made) < GREEDY_TOKENS and not (made and made[-1] in (ends if isinstance(ends, list) else [ends])):
        made.append(int(model(torch.tensor([ids + made], device=model.device)).logits[0, -1].argmax()))
    return made


@torch.no_grad()
def _logprobs(model: Any, ids: list[int]) -> list[float]:
    logprobs_SV = model(torch.tensor([ids], device=model.device)).logits[0, :-1].float().log_softmax(-1)
    return [float(logprobs_SV[place, token]) for place, token in enumerate(ids[1:])]


def _check_tokens(llama: Llama, known: Mapping[str, list[int]], folder: Path) -> None:
    for text, ids in known.items():
        found = llama.tokenize(text)[: len(ids)]
        if found != ids:
            place = in_common(found, ids)
            raise EngineError(
                "llama.cpp cuts text into other tokens than the tokenizer",
                where=str(folder),
                found=f"{found[place : place + 3]} at token {place} of {text!r}",
                expected=ids[place : place + 3],
                remedy="serve the mixture with vLLM or transformers",
            )


def _loss(compared: Sequence[tuple[list[float], list[float]]]) -> tuple[float, float]:
    """The share that perplexity grows by, and two standard errors of it, over texts, whose tokens depend on each other.

    `compared`: of each text, log-probabilities by transformers and by llama.cpp.
    """
    sums = [sum(ours) - sum(theirs) for ours, theirs in compared]
    counts = [len(ours) for ours, _ in compared]
    ratio = math.exp(sum(sums) / sum(counts))
    error = mean_error(sums, counts) if len(compared) > 1 else None
    return ratio - 1, math.inf if error is None else _SURE * ratio * error


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
            raise EngineError(
                "llama.cpp did not answer",
                where=str(self._file),
                found=detail if self._child.is_running() else self._child.complaint(),
                remedy="see its message, and try again",
            ) from None
