"""`modekit data tokenizer OUT --text en=... --text py=...`: a tokenizer that reads every domain alike.

    sizes of the domains -> the fit split of each, as much of each -> byte-level BPE -> fertility on the report split -> OUT

Every domain weighs the same: where one has less text than another it is read several times, and the last time in part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from modekit.experts.corpus.texts import GivenTexts, count_tokens, none_in_split, read_domain
from modekit.files.copies import library_writes
from modekit.files.place import Replace
from modekit.files.staging import staging
from modekit.files.write import write_json
from modekit.run import QUIET, Run
from modekit.text.document import text_of
from modekit.text.held_out import MORE
from modekit.text.splits import Split, split_of

SPECIAL = ("<s>", "</s>", "<pad>")
_MOST_TRAINED = 2 * 10**8  # bytes of a domain: more text changes the words' ranks little, and takes minutes
_MOST_READ = 2 * 10**7  # bytes of a domain on which fertility is measured


class Fertility(BaseModel, frozen=True):
    """How many tokens held-out documents of one domain take.

    Attributes:
        documents, bytes: how much was read.
        per_1000_bytes, per_word: tokens of the new tokenizer; a word is what stands between white space.
        against_per_1000_bytes: of the other tokenizer; None without another.
        change: (new - other) / other, so that below zero the new one makes fewer.
    """

    name: str
    documents: int
    bytes: int
    per_1000_bytes: float
    per_word: float
    against_per_1000_bytes: float | None = None
    change: float | None = None


class TrainedTokenizer(BaseModel, frozen=True):
    """A tokenizer that was made, as fertility.json has it: its tokens, and the name of the one that it is compared with."""

    vocabulary: int
    against: str | None
    domains: list[Fertility]
    notes: list[str]


def byte_level_bpe(documents: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer of at most so many tokens, which puts <s> before every text. Documents are read once and not kept."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(documents, trainer)
    start, end, pad = SPECIAL
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=[(start, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=start, eos_token=end, pad_token=pad)


def train_tokenizer(
    given: GivenTexts, vocabulary: int, out: Path, *, replace: Replace = "nothing", run: Run = QUIET
) -> TrainedTokenizer:
    """Write a tokenizer that transformers opens, beside fertility.json.

    Raises TextError for a domain without text to train on or to measure by, ModekitError for names, OutputError.
    """
    texts, sources = given.checked(out, replace)
    other = given.tokenizer(run)
    domains = {name: _split_text(name, spec, given.root, run) for name, spec in texts.items()}
    each = min(max(_size(documents["fit"]) for documents in domains.values()), _MOST_TRAINED)
    run.begin("train tokenizer")
    tokenizer = byte_level_bpe(_mixed([documents["fit"] for documents in domains.values()], each), vocabulary)
    run.begin("measure")
    size = len(tokenizer)
    too_few = f"the text has words for no more than {size:,} tokens of {vocabulary:,}: give more text"
    trained = TrainedTokenizer(
        vocabulary=size,
        against=given.model,
        domains=[_fertility(name, documents["report"], tokenizer, other) for name, documents in domains.items()],
        notes=[too_few] if size < vocabulary else [],
    )
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    with staging(out, f"tokenizer {digest}", "tokenizer", sources=sources, replace=replace, sync=run.sync) as stage:
        with library_writes(stage.folder) as folder:
            tokenizer.save_pretrained(folder)
        write_json(stage.folder / "fertility.json", trained.model_dump(mode="json"), sync=False)
    return trained


def _split_text(name: str, spec: str, root: Path, run: Run) -> dict[Split, dict[bytes, str]]:
    """Documents by their hash, of the splits that are read. Raises TextError where one has none."""
    found: dict[Split, dict[bytes, str]] = {"fit": {}, "select": {}, "report": {}}
    for key, record in read_domain(name, spec, root, run).documents.items():
        found[split_of(record.document)][key] = text_of(record.document)
    for split in ("fit", "report"):
        if not found[split]:
            raise none_in_split(split, name, spec, "one of ten documents to measure by, and more to train on", MORE)
    return found


def _size(documents: Mapping[bytes, str]) -> int:
    return sum(len(text.encode()) for text in documents.values())


def _mixed(domains: Sequence[Mapping[bytes, str]], each: int) -> Iterator[str]:
    """About `each` bytes of every domain, however much it has; a part of it is chosen by the hash of each document."""
    for documents in domains:
        left = each / _size(documents)
        while left > 0:
            yield from _part(documents, left)
            left -= 1


def _part(documents: Mapping[bytes, str], share: float) -> Iterator[str]:
    for key, text in documents.items():
        if int.from_bytes(hashlib.sha256(b"tokenizer" + key).digest()[:8], "big") < share * 2**64:
            yield text


def _fertility(
    name: str, documents: Mapping[bytes, str], tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase | None
) -> Fertility:
    """On documents of the report split, which no tokenizer was trained on here."""
    texts = list(_part(documents, _MOST_READ / _size(documents)))
    text_bytes, words = (sum(map(len, each)) for each in (map(str.encode, texts), map(str.split, texts)))
    tokens = sum(count_tokens(tokenizer, texts))
    against = None if other is None else sum(count_tokens(other, texts))
    return Fertility(
        name=name,
        documents=len(texts),
        bytes=text_bytes,
        per_1000_bytes=round(1000 * tokens / max(1, text_bytes), 4),
        per_word=round(tokens / max(1, words), 4),
        against_per_1000_bytes=None if against is None else round(1000 * against / max(1, text_bytes), 4),
        change=round(tokens / against - 1, 6) if against else None,
    )
