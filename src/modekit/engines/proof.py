"""Is a GGUF file in llama.cpp the model that transformers has? Asked before anybody is told that it is.

Compared are the tokens of texts, what is written greedily, and the log-probability of every token. With float32 weights all
must agree, up to the rounding of sums. With fewer bits, the loss of perplexity is bounded, over texts enough to know it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.engines.llama import Llama
from modekit.engines.proof_result import EXACT, Loss, Proof
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

TEXTS = (
    "The heart moves blood through the body. It beats about a hundred thousand times a day, and rests only between two beats.",
    "def area(width, height):\n    # two sides, 3.14 would be for circles\n    return width * height\n\n\nprint(area(12, 7))\n",
    "Das Gericht hat die Klage abgewiesen; die Kosten tr\u00e4gt der Kl\u00e4ger. L'appel est recevable, s'il est motiv\u00e9.",
    "Item 27:  4,096 kg at 19.95 \u2013 \u201cas is\u201d, we're told\n\n\tTotal\t81,715.20  (VAT 7%)\n",
)
"""Prose, code, other languages, numbers and white space."""
GREEDY_TOKENS = 24
_CHAT = [message_of("user", "Hi"), message_of("assistant", "Hello."), message_of("user", "Why?")]
_BEGINNING = 8  # tokens after which the model writes on


MOST_TOKENS = 4_000
"""Of all texts together."""
LONGEST = 128
"""Tokens of one text."""
FEWEST_TEXTS = 16
"""Of which a standard error says something."""
_SHIPPED = ("general", "code", "medicine", "german", "french")

_Compared = tuple[list[float], list[float]]
"""Log-probabilities of the tokens of one text, by transformers and by llama.cpp."""


@dataclass(frozen=True)
class ProofTexts:
    """Documents, and in words what they are."""

    name: str
    documents: Sequence[Document]

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
    if not domains:
        return shipped_texts()
    own = _in_turn(f"held-out text of {', '.join(domains)}", domains.values())
    if len(own.documents) >= FEWEST_TEXTS:
        return own
    more = shipped_texts()
    return ProofTexts(f"{own.name}; {more.name}", [*own.documents, *more.documents])


def shipped_texts() -> ProofTexts:
    """Prose, code, and other languages."""
    return _in_turn("text that comes with modekit", map(shipped_documents, _SHIPPED))


def _in_turn(name: str, kinds: Iterable[Sequence[Document]]) -> ProofTexts:
    """One of each kind, then the next of each."""
    rounds = zip_longest(*(documents[:MOST_TOKENS] for documents in kinds))
    return ProofTexts(name, [document for document in chain.from_iterable(rounds) if document is not None])


def compare(folder: Path, file: Path, outtype: str, *, texts: ProofTexts | None = None, run: Run = QUIET) -> Proof:
    """Compare a GGUF file, whose weights are stored as `outtype`, with the model folder that it was made of; not judged yet.

    `texts`: what it is compared on where that is not float32; None: text that comes with modekit. Raises EngineError as
    `in_both`.
    """
    with in_both(folder, file, run=run) as both:
        return both.proof(file, outtype, texts=texts, run=run)


@dataclass(frozen=True)
class BothEngines:
    """A model that transformers has loaded, and llama.cpp, and what both read; cut alike, which has been checked. `notes`:
    where llama.cpp reads a text otherwise.
    """

    model: Any
    llama: Llama
    tokenizer: Any
    beginnings: Sequence[list[int]]
    longest: int
    notes: tuple[str, ...]

    def proof(self, file: Path, outtype: str, *, texts: ProofTexts | None = None, run: Run = QUIET) -> Proof:
        """Compare the two as they are now, without a judgement; `file` is what messages name. `texts` as `compare`."""
        written = [(_greedy(self.model, ids), self.llama.greedy(ids, GREEDY_TOKENS)) for ids in self._begun]
        if outtype == EXACT:
            goes_on = [ids + ours for ids, (ours, _) in zip(self._begun, written, strict=True)]
            name, compared = "short, of several kinds", [self._compared(ids) for ids in (*self.beginnings, *goes_on)]
        else:
            texts = texts or shipped_texts()
            name, compared = texts.name, self._compared_till_known(texts, file, outtype, run)
        ours, theirs = ([value for text in compared for value in text[engine]] for engine in (0, 1))
        apart = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
        return Proof(
            outtype=outtype,
            same=sum(_parting(*each) for each in written),
            written=sum(max(map(len, each)) for each in written),
            text=name,
            texts=len(compared),
            tokens=len(ours),
            difference=max(apart),
            typical=sum(apart) / len(apart),
            perplexity=_perplexity(theirs),
            in_transformers=_perplexity(ours),
            loss=_loss(compared),
            notes=self.notes,
        )

    @property
    def _begun(self) -> list[list[int]]:
        return [ids[:_BEGINNING] for ids in self.beginnings]

    def _compared(self, ids: list[int]) -> _Compared:
        return _logprobs(self.model, ids), self.llama.logprobs(ids)

    def _compared_till_known(self, texts: ProofTexts, file: Path, outtype: str, run: Run) -> list[_Compared]:
        """Text by text, until the loss is known well enough, or surely too large, or there is no more text."""
        wanted = list(texts.ids(self.tokenizer, self.longest)) or self.beginnings
        compared: list[_Compared] = []
        for ids in run.over(f"compare {file.name} in llama.cpp", wanted, len(wanted)):
            compared.append(self._compared(ids))
            if len(compared) >= FEWEST_TEXTS and _loss(compared).is_known(outtype):
                break
        run.progress(f"compare {file.name} in llama.cpp", len(wanted), len(wanted))
        return compared


@contextmanager
def in_both(folder: Path, file: Path, *, adapters: Sequence[Path] = (), run: Run = QUIET) -> Iterator[BothEngines]:
    """A model folder in transformers, and a GGUF file of it with its adapters in llama.cpp, as long as the block lasts. Raises
    EngineError where they cut a text into other tokens, or llama.cpp cannot load a file.
    """
    tokenizer = load_tokenizer(folder, run=run)
    model = load_model(folder, run=run)
    most = int(model.config.max_position_embeddings)
    known = {text: tokenizer(text, add_special_tokens=False)["input_ids"][: most - GREEDY_TOKENS - 1] for text in TEXTS}
    known = {text: ids for text, ids in known.items() if len(ids) > 1}  # of a tokenizer without its characters nothing is left
    if not known:
        raise EngineError(
            "the tokenizer makes no tokens of the texts that a proof begins with",
            where=str(folder),
            found="no text of two tokens or more",
            expected="a tokenizer that reads prose, code or numbers",
            remedy="serve the mixture with vLLM or transformers",
        )
    texts = list(known.values())
    context = max(LONGEST, *map(len, texts)) + GREEDY_TOKENS + 1
    with Llama(file, context=context, threads=default_threads(), adapters=adapters) as llama:
        _check_tokens(llama, known, folder)
        yield BothEngines(model, llama, tokenizer, texts, most - 1, tuple(_other_readings(llama, tokenizer)))


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
                remedy="name the pre-tokenizer that llama.cpp has for it with --pre-tokenizer",
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


@torch.no_grad()
def _greedy(model: Any, ids: list[int]) -> list[int]:
    """What transformers writes."""
    begun = torch.tensor([ids], device=model.device)
    made = model.generate(
        begun,
        attention_mask=torch.ones_like(begun),
        max_new_tokens=GREEDY_TOKENS,
        do_sample=False,
        repetition_penalty=1.0,
        pad_token_id=0,
    )
    return [int(token) for token in made[0, len(ids) :]]


@torch.no_grad()
def _logprobs(model: Any, ids: list[int]) -> list[float]:
    logprobs_SV = model(torch.tensor([ids], device=model.device)).logits[0, :-1].float().log_softmax(-1)
    return [float(logprobs_SV[place, token]) for place, token in enumerate(ids[1:])]


def _loss(compared: Sequence[_Compared]) -> Loss:
    """Its standard error is that over texts, whose tokens depend on each other."""
    sums = [sum(ours) - sum(theirs) for ours, theirs in compared]
    counts = [len(ours) for ours, _ in compared]
    ratio = math.exp(sum(sums) / sum(counts))
    error = mean_error(sums, counts) if len(compared) > 1 else None
    return Loss(ratio - 1, math.inf if error is None else ratio * error)


def _perplexity(logprobs: Sequence[float]) -> float:
    return math.exp(-sum(logprobs) / len(logprobs))
