"""`modekit data tokenizer OUT --text en=... --text py=...`: a tokenizer that reads every domain alike.

    sizes of the domains -> the fit split of each, as much of each -> byte-level BPE -> fertility on the report split -> OUT

Every domain weighs the same: where one has less text than another it is read several times, and the last time in part. Texts
are never in memory; what the training holds is how often each word came.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from modekit.experts.corpus.count import WHERE, CountTokens, check_setting, checked_texts, key_of, none_in_split, token_counter
from modekit.files.output import Replace, refuse_existing
from modekit.files.staging import staging
from modekit.files.write import library_writes, write_json
from modekit.recipes.paths import locate
from modekit.run import QUIET, Run
from modekit.text.document import text_of
from modekit.text.documents import stream_records
from modekit.text.held_out import MORE
from modekit.text.splits import Split, split_of

SPECIAL = ("<s>", "</s>", "<pad>")
SMALLEST = 256 + len(SPECIAL)
"""Tokens that there are before anything is joined: a byte each, and the special ones."""
RECORD = "fertility.json"
LARGEST = 2**20
"""Tokens of a vocabulary at most."""
_MOST_TRAINED = 2 * 10**8  # bytes of a domain: more text changes the words' ranks little, and takes minutes
_MOST_READ = 2 * 10**7  # bytes of a domain on which fertility is measured
_TOGETHER = 64


class Fertility(BaseModel, frozen=True):
    """How many tokens held-out documents of one domain take.

    Attributes:
        documents, bytes, words: how much was read; a word is what stands between white space.
        tokens: of the new tokenizer; also per 1,000 bytes and per word.
        against_tokens: of the other tokenizer; also per 1,000 bytes; None without another.
        change: (new - other) / other, so that below zero the new one makes fewer.
    """

    name: str
    documents: int
    bytes: int
    words: int
    tokens: int
    per_1000_bytes: float
    per_word: float
    against_tokens: int | None = None
    against_per_1000_bytes: float | None = None
    change: float | None = None


class TrainedTokenizer(BaseModel, frozen=True):
    """A tokenizer that was made, as fertility.json has it.

    Attributes:
        vocabulary: tokens that it has, of so many that were `asked`.
        against: name of the tokenizer that it is compared with.
        bytes_per_domain: that it was trained on.
    """

    format: int = 1
    vocabulary: int
    asked: int
    against: str | None
    bytes_per_domain: int
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


@dataclass(frozen=True)
class Mix:
    """Text by domain, paths relative to `root`; and the tokenizer that is compared, with its name and folder."""

    texts: Mapping[str, Sequence[str]]
    root: Path
    against: PreTrainedTokenizerBase | None = None
    against_name: str | None = None
    against_folder: Path | None = None


@dataclass(frozen=True)
class _DomainText:
    """One domain's text, read again and again, and the bytes of its splits."""

    name: str
    spec: str
    root: Path
    sizes: Mapping[Split, int]

    def documents(self, split: Split, share: float) -> Iterator[str]:
        """Those of a split, duplicates once; a share of them is chosen by the hash of each, wherever it stands."""
        for key, document in self.all_documents():
            place = int.from_bytes(hashlib.sha256(b"tokenizer" + key).digest()[:8], "big")
            if split_of(document) == split and place < share * 2**64:
                yield document

    def all_documents(self) -> Iterator[tuple[bytes, str]]:
        """Every document with its hash, duplicates once. Raises TextError."""
        seen: set[bytes] = set()
        for record in stream_records([self.spec], root=self.root, where=f"{WHERE} {self.name}"):
            document = record.document
            key = key_of(document)
            if key not in seen:
                seen.add(key)
                yield key, text_of(document)


def train_tokenizer(
    mix: Mix, vocabulary: int, out: Path, *, replace: Replace = "nothing", run: Run = QUIET
) -> TrainedTokenizer:
    """Write a tokenizer that transformers opens, beside fertility.json.

    Raises TextError for a domain without text to train on or to measure by, ModekitError for names and sizes, OutputError.
    """
    possible = SMALLEST < vocabulary <= LARGEST
    check_setting("--vocabulary", vocabulary, f"{SMALLEST + 1} to {LARGEST}", right=possible)
    texts = checked_texts(mix.texts, mix.root)
    found = [locate(spec, mix.root) for spec in texts.values()]
    sources = [path for path in (*found, mix.against_folder) if path is not None]
    refuse_existing(out, replace, sources=sources)
    domains = [_looked_at(name, spec, mix.root, run) for name, spec in texts.items()]
    each = min(max(domain.sizes["fit"] for domain in domains), _MOST_TRAINED)
    tokenizer = byte_level_bpe(_mixed(domains, each, run), vocabulary)
    count = token_counter(tokenizer)
    other = None if mix.against is None else token_counter(mix.against)
    fertilities = [_fertility(domain, count, other, run) for domain in domains]
    size = len(tokenizer)
    too_few = f"the text has words for no more than {size:,} tokens of {vocabulary:,}: give more text"
    trained = TrainedTokenizer(
        vocabulary=size,
        asked=vocabulary,
        against=mix.against_name,
        bytes_per_domain=each,
        domains=fertilities,
        notes=[too_few] if size < vocabulary else [],
    )
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    with staging(out, f"tokenizer {digest}", "tokenizer", sources=sources, replace=replace, sync=run.sync) as stage:
        with library_writes(stage.folder) as folder:
            tokenizer.save_pretrained(folder)
        write_json(stage.folder / RECORD, trained.model_dump(mode="json"), sync=False)
    return trained


def _looked_at(name: str, spec: str, root: Path, run: Run) -> _DomainText:
    """How many bytes the splits of a domain have. Raises TextError where one has none."""
    run.begin(f"look at {name}")
    sizes: dict[Split, int] = {"fit": 0, "report": 0}
    domain = _DomainText(name, spec, root, sizes)
    for _, document in domain.all_documents():
        split = split_of(document)
        if split in sizes:
            sizes[split] += len(document.encode())
    for split, size in sizes.items():
        if not size:
            expected = "one of ten documents to measure by, and more to train on"
            raise none_in_split(split, name, spec, expected, MORE)
    return domain


def _mixed(domains: Sequence[_DomainText], each: int, run: Run) -> Iterator[str]:
    """About `each` bytes of every domain, however much it has."""
    total, done = each * len(domains), 0
    for domain in domains:
        left = each / domain.sizes["fit"]
        while left > 0:
            for number, document in enumerate(domain.documents("fit", left)):
                done += len(document.encode())
                if number % _TOGETHER == 0:
                    run.progress("train tokenizer", min(done, total), total)
                yield document
            left -= 1
    run.progress("train tokenizer", total, total)


def _fertility(domain: _DomainText, count: CountTokens, other: CountTokens | None, run: Run) -> Fertility:
    """On documents of the report split, which no tokenizer was trained on here."""
    size = domain.sizes["report"]
    documents = text_bytes = words = tokens = against = 0
    for document in domain.documents("report", _MOST_READ / size):
        documents += 1
        text_bytes += len(document.encode())
        words += len(document.split())
        tokens += sum(count([document]))
        against += sum(other([document])) if other is not None else 0
        if documents % _TOGETHER == 1:
            run.progress(f"measure {domain.name}", min(text_bytes, size), size)
    return Fertility(
        name=domain.name,
        documents=documents,
        bytes=text_bytes,
        words=words,
        tokens=tokens,
        per_1000_bytes=round(1000 * tokens / max(1, text_bytes), 4),
        per_word=round(tokens / max(1, words), 4),
        against_tokens=None if other is None else against,
        against_per_1000_bytes=None if other is None else round(1000 * against / max(1, text_bytes), 4),
        change=round(tokens / against - 1, 6) if against else None,
    )
