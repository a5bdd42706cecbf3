"""Is a GGUF file in llama.cpp the model that transformers has? Asked before anybody is told that it is.

Compared are the tokens of texts, what is written greedily, and the log-probability of every token. With float32 weights all
must agree, up to the rounding of sums. With fewer bits, the loss of perplexity is bounded, over texts enough to know it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.engines.llama import Llama
from modekit.engines.pre_tokenizer import TEXTS
from modekit.engines.threads import default_threads
from modekit.errors import EngineError, ModekitError, TextError
from modekit.evaluation.domains import recipe_texts
from modekit.evaluation.uncertainty import mean_error
from modekit.loaded.load import load_model, load_tokenizer
from modekit.run import QUIET, Run
from modekit.text.chat import chat_template_of
from modekit.text.document import Document, message_of
from modekit.text.sequences import encode
from modekit.text.shipped import shipped_documents

EXACT = "f32"
"""The outtype with which all must agree."""
TOLERANCE = 2e-3  # nats, of log-probabilities with float32 weights
LARGEST_LOSS = 0.01  # of perplexity, with fewer bits
LARGEST_TYPICAL = 0.1  # nats, of log-probabilities on average, with fewer bits: another model of the same quality is no proof
_SURE = 2.0  # standard errors
GREEDY_TOKENS = 24
_BEGINNING = 8  # tokens after which the model writes on
MOST_TOKENS = 4_000
"""Of all texts together."""
LONGEST = 128
"""Tokens of one text."""
FEWEST_TEXTS = 16
"""Of which a standard error says something."""
_SHIPPED = ("general", "code", "medicine", "german", "french")
_CHAT = [message_of("user", "Hi"), message_of("assistant", "Hello."), message_of("user", "Why?")]

_Compared = tuple[list[float], list[float]]
"""Log-probabilities of the tokens of one text, by transformers and by llama.cpp."""


@dataclass(frozen=True)
class Proof:
    """What was found.

    Attributes:
        same, written: of the tokens written greedily, those that both write, up to the first that differs in a text, and all.
        difference, typical: largest and mean difference of the log-probabilities of a token, in nats.
        loss, margin: how much larger the perplexity is in llama.cpp, as a share, and two standard errors of that.
        notes: where llama.cpp reads or ends a text otherwise.
    """

    outtype: str
    same: int
    written: int
    text: str
    texts: int
    tokens: int
    difference: float
    typical: float
    perplexity: float
    loss: float
    margin: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return (
            f"{self.same} of {self.written} greedy tokens as in transformers, log-probabilities {self.typical:.1e} apart "
            f"(at most {self.difference:.1e}), perplexity {self.perplexity:.5g} ({self.loss:+.2%} \u00b1 {self.margin:.2%}) "
            f"over {self.tokens:,} tokens of {self.texts:,} texts ({self.text})"
        )

    def check(self, file: Path) -> None:
        """Raise EngineError, which names the file, where llama.cpp computes another model, or fewer bits lost too much."""
        if self.outtype == EXACT:
            if self.same < self.written or not self.difference <= TOLERANCE:
                raise EngineError(
                    "llama.cpp computes another model than transformers",
                    where=str(file),
                    found=str(self),
                    expected=f"the same tokens, log-probabilities within {TOLERANCE:g}",
                    remedy="do not use llama.cpp for it; serve the mixture with vLLM or transformers, and report this",
                )
        elif not (self.loss - self.margin <= LARGEST_LOSS and self.typical <= LARGEST_TYPICAL):
            raise EngineError(
                "the model in llama.cpp is not as good as in transformers",
                where=str(file),
                found=str(self),
                expected=f"perplexity at most {LARGEST_LOSS:.0%} higher, two standard errors aside, and log-probabilities "
                f"within {LARGEST_TYPICAL:g} on average",
                remedy=f"choose a finer --outtype; {EXACT} shows whether it is the bits",
            )


@dataclass(frozen=True)
class ProofTexts:
    """Documents, and in words what they are."""

    name: str
    documents: Sequence[Document]

    @classmethod
    def of(cls, name: str, kinds: Iterable[Sequence[Document]]) -> ProofTexts:
        """One document of each kind, then the next of each."""
        rounds = zip_longest(*(documents[:MOST_TOKENS] for documents in kinds))
        return cls(name, [document for document in chain.from_iterable(rounds) if document is not None])

    def ids(self, tokenizer: PreTrainedTokenizerBase, longest: int) -> Iterator[list[int]]:
        """Their beginnings of at most `longest` tokens, until there are MOST_TOKENS; texts of a single token are left out.
        Raises TextError for a conversation that the tokenizer has no template for.
        """
        left = MOST_TOKENS
        length = min(longest, LONGEST)
        for document in self.documents:
            for sequence in encode(tokenizer, [document], max_tokens=min(left, length), sequence_length=length)[:1]:
                left -= len(sequence.ids)
                yield list(sequence.ids)
            if left < 2:
                return


def texts_of(checkpoint: Checkpoint) -> ProofTexts:
    """The held-out text of a mixture's domains, where it can be read; text that comes with modekit where that is little."""
    try:
        domains = {held.name: held.documents for held in recipe_texts(checkpoint).report() if held.documents}
    except ModekitError:  # whatever is wrong with a text, the weights can be compared on another
        domains = {}
    own = ProofTexts.of(f"held-out text of {', '.join(domains)}", domains.values())
    if len(own.documents) >= FEWEST_TEXTS:
        return own
    more = shipped_texts()
    return ProofTexts(f"{own.name}; {more.name}", [*own.documents, *more.documents]) if domains else more


def shipped_texts() -> ProofTexts:
    """Prose, code, and other languages."""
    return ProofTexts.of("text that comes with modekit", map(shipped_documents, _SHIPPED))


def compare(folder: Path, file: Path, outtype: str, *, texts: ProofTexts | None = None, run: Run = QUIET) -> Proof:
    """Compare a GGUF file, whose weights are stored as `outtype`, with the model folder that it was made of; not judged yet.

    `texts`: what it is compared on where that is not float32; None: text that comes with modekit. Raises EngineError where
    llama.cpp cuts a text into other tokens, or cannot load the file.
    """
    tokenizer, model = load_tokenizer(folder, run=run), load_model(folder, run=run)
    longest = int(model.config.max_position_embeddings)
    known = {text: tokenizer(text, add_special_tokens=False)["input_ids"][: longest - GREEDY_TOKENS - 1] for text in TEXTS}
    context = max(LONGEST, *map(len, known.values())) + GREEDY_TOKENS + 1
    with Llama(file, context=context, threads=default_threads()) as llama:
        _check_tokens(llama, known, folder)
        begun = [ids[:_BEGINNING] for ids in known.values()]
        written = [(_greedy(model, ids), llama.greedy(ids, GREEDY_TOKENS)) for ids in begun]
        if outtype == EXACT:
            goes_on = [ids + ours for ids, (ours, _) in zip(begun, written, strict=True)]
            name, wanted = "short, of several kinds", [*known.values(), *goes_on]
        else:
            texts = texts or shipped_texts()
            name, wanted = texts.name, list(texts.ids(tokenizer, longest - 1))
        step, count = f"compare {file.name} in llama.cpp", len(wanted)
        both = ((_logprobs(model, ids), llama.logprobs(ids)) for ids in run.over(step, wanted, count))
        compared = list(both if outtype == EXACT else _till_known(both))
        run.progress(step, count, count)
        return _proof(outtype, written, name, compared, tuple(_other_readings(llama, tokenizer)))


def _proof(
    outtype: str, written: Sequence[tuple[list[int], list[int]]], name: str, compared: list[_Compared], notes: tuple[str, ...]
) -> Proof:
    ours, theirs = ([value for text in compared for value in text[engine]] for engine in (0, 1))
    apart = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    loss, margin = _loss(compared)
    ends = sum(len(one) != len(other) for one, other in written)
    if ends:
        notes = (*notes, f"llama.cpp ends {ends} of {len(written)} texts elsewhere: it has other tokens for the end of a text")
    return Proof(
        outtype=outtype,
        same=sum(_parting(*each) for each in written),
        written=sum(min(map(len, each)) for each in written),
        text=name,
        texts=len(compared),
        tokens=len(ours),
        difference=max(apart),
        typical=sum(apart) / len(apart),
        perplexity=math.exp(-sum(theirs) / len(theirs)),
        loss=loss,
        margin=margin,
        notes=notes,
    )


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


def _till_known(compared: Iterable[_Compared]) -> Iterator[_Compared]:
    """Text by text, until the loss is known well enough, or surely too large, or there is no more text."""
    so_far: list[_Compared] = []
    for each in compared:
        so_far.append(each)
        yield each
        loss, margin = _loss(so_far)
        if len(so_far) >= FEWEST_TEXTS and (margin <= LARGEST_LOSS / 3 or loss - 2 * margin > LARGEST_LOSS):
            return


def _check_tokens(llama: Llama, known: Mapping[str, Sequence[int]], folder: Path) -> None:
    for text, ids in known.items():
        found = llama.tokenize(text)[: len(ids)]
        if found != list(ids):
            place = _parting(found, ids)
            raise EngineError(
                "llama.cpp cuts text into other tokens than the tokenizer",
                where=str(folder),
                found=f"{found[place : place + 3]} at token {place} of {text!r}",
                expected=list(ids[place : place + 3]),
                remedy="serve the mixture with vLLM or transformers",
            )


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


def _loss(compared: Sequence[_Compared]) -> tuple[float, float]:
    """The share that perplexity grows by, and two standard errors of it, over texts, whose tokens depend on each other."""
    sums = [sum(ours) - sum(theirs) for ours, theirs in compared]
    counts = [len(ours) for ours, _ in compared]
    ratio = math.exp(sum(sums) / sum(counts))
    error = mean_error(sums, counts) if len(compared) > 1 else None
    return ratio - 1, math.inf if error is None else _SURE * ratio * error
