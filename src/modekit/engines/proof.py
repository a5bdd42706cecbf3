"""Is a GGUF file in llama.cpp the model that transformers has? Asked before anybody is told that it is.

Three questions, over texts of several kinds:

* tokens: does llama.cpp cut the texts into the very same ids?
* greedy: does it write the same tokens after the beginnings of the texts, and with the same log-probabilities?
* perplexity: exp of the mean negative log-probability of every token of the texts, each after those before it.

With float32 weights all must agree, up to the rounding of sums; stored with fewer bits the model is another one, and what it
may lose is bounded by its perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from modekit.engines.llama import Llama
from modekit.engines.threads import default_threads
from modekit.errors import EngineError, TextError
from modekit.loaded.load import load_model, load_tokenizer
from modekit.run import QUIET, Run
from modekit.text.chat import chat_template_of, message_of

TEXTS = (
    "The heart moves blood through the body. It beats about a hundred thousand times a day, and rests only between two beats.",
    "def area(width, height):\n    # two sides, 3.14 would be for circles\n    return width * height\n\n\nprint(area(12, 7))\n",
    "Das Gericht hat die Klage abgewiesen; die Kosten tr\u00e4gt der Kl\u00e4ger. L'appel est recevable, s'il est motiv\u00e9.",
    "Item 27:  4,096 kg at 19.95 \u2013 \u201cas is\u201d, we're told\n\n\tTotal\t81,715.20  (VAT 7%)\n",
)
"""Prose, code, other languages, numbers and white space."""
EXACT = "f32"
"""The outtype with which all must agree."""
GREEDY_TOKENS = 24
TOLERANCE = 2e-3  # nats, of log-probabilities with float32 weights
LARGEST_LOSS = 0.01  # of perplexity, with fewer bits
LARGEST_TYPICAL = 0.1  # nats, of log-probabilities on average, with fewer bits: another model of the same quality is no proof
_CHAT = [message_of("user", "Hi"), message_of("assistant", "Hello."), message_of("user", "Why?")]
_BEGINNING = 8  # tokens after which the model writes on


@dataclass(frozen=True)
class Proof:
    """What was found.

    Attributes:
        tokens: tokens whose log-probabilities were compared: those of the texts, and those written.
        same, written: of the tokens written greedily, those that both write, up to the first that differs in a text, and all.
        difference, typical: largest and mean difference of the log-probabilities of a token, in nats.
        perplexity, in_transformers: over all these tokens.
        notes: where llama.cpp reads a text otherwise, though the model is the same.
    """

    tokens: int
    same: int
    written: int
    difference: float
    typical: float
    perplexity: float
    in_transformers: float
    notes: tuple[str, ...] = ()

    @property
    def loss(self) -> float:
        """How much larger the perplexity is, as a share."""
        return self.perplexity / self.in_transformers - 1

    def __str__(self) -> str:
        return (
            f"{self.same} of {self.written} greedy tokens as in transformers, log-probabilities {self.typical:.1e} apart "
            f"(at most {self.difference:.1e}), perplexity {self.perplexity:.5g} ({self.loss:+.2%})"
        )

    def as_data(self) -> dict[str, Any]:
        """For a record."""
        return {name: value for name, value in vars(self).items() if name != "notes"} | {"loss": self.loss}


def prove(folder: Path, file: Path, outtype: str, *, run: Run = QUIET) -> Proof:
    """Compare a GGUF file, whose weights are stored as `outtype`, with the model folder that it was made of.

    Raises EngineError where they are not the same model, or it lost too much.
    """
    with in_both(folder, file, run=run) as both:
        return both.proof(file, outtype, run=run)


@dataclass(frozen=True)
class InBoth:
    """A model that transformers has loaded, and llama.cpp, and what both read; cut alike, which has been checked.

    Attributes:
        texts: ids of the texts.
        notes: where llama.cpp reads a text otherwise.
    """

    model: Any
    llama: Llama
    texts: Sequence[list[int]]
    notes: tuple[str, ...]

    def proof(self, file: Path, outtype: str, *, run: Run = QUIET) -> Proof:
        """Compare the two as they are now; `file` is what messages name. Raises EngineError as `prove`."""
        found = []
        for done, ids in enumerate(self.texts):
            run.progress(f"compare {file.name} in llama.cpp", done, len(self.texts))
            found.append(_compare(self.model, self.llama, ids))
        proof = _summed_up(found, self.notes)
        if outtype == EXACT:
            _refuse_difference(proof, file)
        _refuse_loss(proof, file)
        return proof


@contextmanager
def in_both(folder: Path, file: Path, *, adapters: Sequence[Path] = (), run: Run = QUIET) -> Iterator[InBoth]:
    """A model folder in transformers, and a GGUF file of it with its adapters in llama.cpp, as long as the block lasts.

    Raises EngineError where they cut a text into other tokens, or llama.cpp cannot load a file.
    """
    tokenizer = load_tokenizer(folder, run=run)
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    model = load_model(folder, run=run)
    texts = [ids[: int(model.config.max_position_embeddings) - GREEDY_TOKENS - 1] for ids in texts]
    context = max(map(len, texts)) + GREEDY_TOKENS + 1
    with Llama(file, context=context, threads=default_threads(), adapters=adapters) as llama:
        _check_tokens(llama, texts, folder)
        yield InBoth(model, llama, texts, tuple(_other_readings(llama, tokenizer)))


@dataclass(frozen=True)
class _Text:
    """What was found with one text: tokens written greedily by transformers and llama.cpp, log-probabilities by both."""

    written: tuple[list[int], list[int]]
    logprobs: tuple[list[float], list[float]]


def _compare(model: Any, llama: Llama, ids: list[int]) -> _Text:
    begun = ids[:_BEGINNING]
    written = _greedy(model, begun), llama.greedy(begun, GREEDY_TOKENS)
    ours, theirs = ([*logprobs(ids), *logprobs(begun + written[0])] for logprobs in (partial(_logprobs, model), llama.logprobs))
    return _Text(written, (ours, theirs))


def _check_tokens(llama: Llama, texts: Sequence[Sequence[int]], folder: Path) -> None:
    for text, ids in zip(TEXTS, texts, strict=True):
        found = llama.tokenize(text)[: len(ids)]
        if found != list(ids):
            place = _parting(found, ids)
            raise EngineError(
                "llama.cpp cuts text into other tokens than the tokenizer", where=str(folder),
                found=f"{found[place : place + 3]} at token {place} of {text!r}", expected=list(ids[place : place + 3]),
                remedy="name the pre-tokenizer that llama.cpp has for it with --pre-tokenizer",
            )  # fmt: skip


def _other_readings(llama: Llama, tokenizer: Any) -> Iterator[str]:
    """Where llama.cpp begins a text, or puts a chat, otherwise than transformers."""
    begun, ours = llama.tokenize(TEXTS[0], begun=True), tokenizer(TEXTS[0])["input_ids"]
    if begun != ours:
        yield f"llama.cpp begins a text with the ids {begun[:3]}, transformers with {ours[:3]}"
    template = chat_template_of(tokenizer)
    if template is None:
        return
    try:
        ids = template.ids(template.text(_CHAT, answer=True))
        theirs = llama.chat(_CHAT)
    except (TextError, EngineError) as error:
        yield f"the chat template was not compared: {error.found}"
        return
    if theirs != ids:
        place = _parting(theirs, ids)
        shown, expected = (tokenizer.convert_ids_to_tokens(each[place : place + 3]) for each in (theirs, ids))
        yield f"llama.cpp puts a chat otherwise than the chat template: {shown} where it has {expected}, at token {place}"


def _parting(a: Sequence[int], b: Sequence[int]) -> int:
    """The place where two lists of ids part."""
    return next((place for place, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))


@torch.no_grad()
def _greedy(model: Any, ids: list[int]) -> list[int]:
    """What transformers writes."""
    begun = torch.tensor([ids], device=model.device)
    made = model.generate(
        begun, attention_mask=torch.ones_like(begun), max_new_tokens=GREEDY_TOKENS, do_sample=False, repetition_penalty=1.0,
        pad_token_id=0,
    )  # fmt: skip
    return [int(token) for token in made[0, len(ids) :]]


@torch.no_grad()
def _logprobs(model: Any, ids: list[int]) -> list[float]:
    logprobs_SV = model(torch.tensor([ids], device=model.device)).logits[0, :-1].float().log_softmax(-1)
    return [float(logprobs_SV[place, token]) for place, token in enumerate(ids[1:])]


def _summed_up(texts: Sequence[_Text], notes: tuple[str, ...]) -> Proof:
    same = sum(_parting(*text.written) for text in texts)
    ours, theirs = ([value for text in texts for value in text.logprobs[engine]] for engine in (0, 1))
    apart = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    return Proof(
        tokens=len(ours), same=same, written=sum(max(map(len, text.written)) for text in texts),
        difference=max(apart), typical=sum(apart) / len(apart), perplexity=_perplexity(theirs),
        in_transformers=_perplexity(ours), notes=notes,
    )  # fmt: skip


def _perplexity(logprobs: Sequence[float]) -> float:
    return math.exp(-sum(logprobs) / len(logprobs))


def _refuse_difference(proof: Proof, file: Path) -> None:
    """Raise EngineError where llama.cpp computes another model."""
    if proof.same < proof.written or not proof.difference <= TOLERANCE:
        raise EngineError(
            "llama.cpp computes another model than transformers", where=str(file), found=str(proof),
            expected=f"the same tokens, log-probabilities within {TOLERANCE:g}",
            remedy="do not use llama.cpp for it; serve the mixture with vLLM or transformers, and report this",
        )  # fmt: skip


def _refuse_loss(proof: Proof, file: Path) -> None:
    """Raise EngineError where the stored weights are too coarse, or the model is another one."""
    if not (abs(proof.loss) <= LARGEST_LOSS and proof.typical <= LARGEST_TYPICAL):
        raise EngineError(
            "the model in llama.cpp is not as good as in transformers", where=str(file), found=str(proof),
            expected=f"perplexity within {LARGEST_LOSS:.0%}, log-probabilities {LARGEST_TYPICAL:g} apart on average",
            remedy=f"choose --outtype {EXACT}, which shows whether it is the bits",
        )  # fmt: skip
