"""What lies beside the weights of a model, its tokenizer above all: do two models read text the same way? Compared by file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modekit.errors import MismatchError, SourceError, some_of
from modekit.files.json import parse_json
from modekit.files.read import LARGE, UNREADABLE, read_bytes, read_json, read_text
from modekit.sources.config import damaged_model, read_beside
from modekit.sources.cuts import other_cuts

if TYPE_CHECKING:
    from modekit.sources.source import ModelSource

PAIR_FILES = ("source.spm", "target.spm", "target_vocab.json", "sentencepiece.bpe.model", "spiece.model")
"""Tokenizer files of Marian, of mBART and M2M100 (NLLB), and of T5."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    *PAIR_FILES,
)
GENERATION = "generation_config.json"
COPIED_FILES = (*TOKENIZER_FILES, GENERATION)
"""Of the base, into the result, beside the weights."""
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_BESIDE = ("lstrip", "rstrip", "single_word", "normalized")
"""What an added token does to the text beside it."""


def copied_files(folder: Path, *, where: str) -> tuple[Path, ...]:
    """Those of the files to copy that a model's folder has. Raises SourceError for one that is not its own: what a link in a
    stranger's folder points at would be copied into the result, and published with it.
    """
    found = [folder / name for name in COPIED_FILES if (folder / name).is_symlink() or (folder / name).exists()]
    for path in found:
        if not is_own_file(path, folder):
            raise SourceError(
                "a file that would be copied into the result is not the model's own",
                where=f"{where}: {path.name}",
                found=f"a link to {path.readlink()}" if path.is_symlink() else "no regular file",
                expected="a file in the model's folder",
                remedy="put the file itself there, or remove what is there",
            )
    return tuple(found)


def is_own_file(path: Path, folder: Path) -> bool:
    """Whether a file lies in its folder, or where the hub's cache keeps those of a snapshot: snapshots/x links to blobs/hash
    beside it.
    """
    try:
        target = path.resolve(strict=True)
        snapshot = folder.resolve()
    except (OSError, RuntimeError):  # a link to nothing, or to itself
        return False
    blobs = snapshot.parents[1] / "blobs" if snapshot.parent.name == "snapshots" else None
    is_blob = target.parent == blobs and _BLOB.fullmatch(target.name) is not None
    return target.is_file() and (target.is_relative_to(snapshot) or is_blob)


def copied_content(file: Path) -> bytes:
    """Of a file that goes along; a config without `auto_map`, by which transformers would run code of the hub.

    Raises OSError and ValueError.
    """
    content = read_bytes(file, LARGE)
    if not file.name.endswith("_config.json") or (b"auto_map" not in content and b"\\u" not in content):
        return content
    said = parse_json(content.decode("utf-8"))
    return content if (plain := _without_code(said)) == said else json.dumps(plain, indent=2, ensure_ascii=False).encode()


def _without_code(said: object) -> object:
    if isinstance(said, dict):
        return {key: _without_code(value) for key, value in said.items() if key != "auto_map"}
    return [_without_code(each) for each in said] if isinstance(said, list) else said


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder has files of one; a chat template alone is none."""
    return any((folder / name).exists() for name in TOKENIZER_FILES if not name.startswith("chat_"))


def gone_pair_files(folder: Path, copied: Iterable[Path]) -> list[str]:
    """Names of PAIR_FILES that a mixture's folder has, and that are not among the files that its base would give it now."""
    return sorted({name for name in PAIR_FILES if (folder / name).exists()} - {file.name for file in copied})


Tokens = dict[str, int]
"""Token -> id."""


@dataclass(frozen=True)
class ReadTokens:
    """The tokens of a tokenizer; of a tokenizer.json also the merges of BPE, and what else decides how text is cut: `rest`, and
    `added`, a token -> what it does to the text beside it; `special`: tokens that no plain text has.
    """

    folder: Path
    tokens: Tokens
    merges: list[str] | None = None
    rest: Mapping[str, object] = field(default_factory=dict)
    added: Mapping[str, object] = field(default_factory=dict)
    special: frozenset[str] = frozenset()

    @cached_property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.tokens.values(), default=-1) + 1

    def may_cut_otherwise(self, other: ReadTokens) -> bool:
        """Whether both are read from a tokenizer.json, and these differ in more than tokens and merges."""
        beside = any(self.added[each] != other.added[each] for each in self.added.keys() & other.added.keys())
        return bool(self.rest and other.rest) and (beside or self.rest != other.rest)


def read_tokens(folder: Path, *, where: str, beside: Tokens | None = None) -> ReadTokens | None:
    """From tokenizer.json, or from vocab.json and added_tokens.json; None when the folder has none of them.

    `beside`: tokens of a folder that has added_tokens.json alone, as old models do. Raises SourceError.
    """
    names = ("tokenizer.json", "vocab.json", *(() if beside is None else ("added_tokens.json",)))
    path = next((folder / name for name in names if (folder / name).exists()), None)
    if path is None:
        return None
    try:
        raw: Any = read_json(path, LARGE)
        if path.name != "tokenizer.json":
            added = read_json(folder / "added_tokens.json") if (folder / "added_tokens.json").exists() else {}
            first = beside if path.name == "added_tokens.json" else None
            file = folder / "merges.txt"  # of byte-level BPE beside vocab.json
            lines = read_text(file, LARGE).split("\n") if path.name == "vocab.json" and file.exists() else None
            merges = None if lines is None else [each for each in lines if each and not each.startswith("#version")]
            return ReadTokens(folder, _checked({**(first or {}), **raw, **added}), merges)
        vocab = raw["model"]["vocab"]
        pairs = vocab.items() if isinstance(vocab, dict) else ((entry[0], index) for index, entry in enumerate(vocab))
        more = {each["content"]: each for each in raw.get("added_tokens") or []}
        tokens = _checked({**dict(pairs), **{token: each["id"] for token, each in more.items()}})
        merges = raw["model"].get("merges")
        settings = {key: each for key, each in raw["model"].items() if key != "merges" and not isinstance(each, dict)}
        rest = {**{key: raw.get(key) for key in ("normalizer", "pre_tokenizer", "post_processor")}, "model": settings}
        joined = None if merges is None else [each if isinstance(each, str) else " ".join(each) for each in merges]
        beside_it = {token: [bool(each.get(flag)) for flag in _BESIDE] for token, each in more.items()}
        special = frozenset(token for token, each in more.items() if each.get("special") is True)
        return ReadTokens(folder, tokens, joined, rest, beside_it, special)
    except (*UNREADABLE, KeyError, TypeError, AttributeError, IndexError) as error:
        raise damaged_model(
            "the tokenizer cannot be read",
            f"{where}: {path.name}",
            f"nothing called {error}" if isinstance(error, KeyError) else error,
        ) from None


def _checked(tokens: Mapping[Any, Any]) -> Tokens:
    """Raises ValueError for a token that is no text, and an id that is none."""
    for token, index in tokens.items():
        if not isinstance(token, str) or type(index) is not int or not 0 <= index < 2**40:
            raise ValueError(f"no token and id: {str(token)[:60]}, {str(index)[:60]}")
    return dict(tokens)


@dataclass(frozen=True)
class Readers:
    """Two models that are to read text the same way, as messages call them, and what to do where they do not."""

    ours: str = "base model"
    theirs: str = "expert"
    remedy: str = (
        "use experts fine-tuned without changing the tokenizer, or put the base's tokenizer files into the expert's folder if "
        "only the files differ"
    )

    @property
    def whose(self) -> str:
        """What is ours, for messages."""
        return f"that of {self.ours}" if self.ours.endswith("'") else f"the {self.ours}'s"

    def differ(self, what: str, where: str, found: object = None, expected: str | None = None) -> MismatchError:
        """The error of two tokenizers that differ."""
        return MismatchError(
            f"the {self.theirs}'s tokenizer {what}", where=where, found=found, expected=expected, remedy=self.remedy
        )


def check_same_tokenizer(base: Path, expert: Path, *, where: str, readers: Readers) -> list[str]:
    """Raise MismatchError that names the tokens in which an expert's tokenizer differs from the base model's; notes as of
    `check_alike`. A folder without tokenizer files is taken to use the base model's.
    """
    ours, theirs = read_tokens(base, where="base_model"), read_tokens(expert, where=where)
    check_same_pieces(base, expert, where=where, readers=readers)
    return [] if ours is None or theirs is None else check_alike(ours, theirs, where=where, readers=readers)


def check_alike(
    one: ReadTokens, other: ReadTokens, *, where: str, readers: Readers = Readers(), below: int = 2**62
) -> list[str]:
    """Raise MismatchError that names the tokens with ids `below` in which two tokenizers differ, for other merges, and where
    they cut a page of text otherwise. Notes where they differ around a text, or beside special tokens, alone.
    """
    ours = one.tokens
    theirs = other.tokens
    called = readers.ours.removesuffix(" model")
    found = {token for token, number in ours.items() ^ theirs.items() if number < below} if ours != theirs else set()
    if found:
        differing = sorted(found, key=lambda token: (ours.get(token, theirs.get(token, 0)), token))
        pairs = ((token, ours.get(token, "-"), theirs.get(token, "-")) for token in differing)
        shown = [f"{token[:60]!r} ({called} {mine}, {readers.theirs} {their})" for token, mine, their in pairs]
        raise readers.differ(
            f"differs from {readers.whose} in {len(differing)} tokens",
            where,
            some_of(shown, 5),
            "the same token for the same id",
        )
    if one.merges is not None and other.merges is not None and one.merges != other.merges:
        raise readers.differ(f"has the same tokens as {readers.whose} but joins them by other merges", where)
    return other_cuts(one, other, where, readers) if one.may_cut_otherwise(other) else []


def check_same_pieces(base: Path, expert: Path, *, where: str, readers: Readers = Readers()) -> None:
    """Raise MismatchError for a file of sentencepiece, or of a target's vocabulary, that both have and that differs.

    Where both have a tokenizer.json, that is what counts.
    """
    both_json = all((folder / "tokenizer.json").exists() for folder in (base, expert))
    pieces = () if both_json else (*PAIR_FILES, "tokenizer.model")
    for name in (name for name in pieces if (base / name).exists() and (expert / name).exists()):
        try:
            same = read_bytes(base / name, LARGE) == read_bytes(expert / name, LARGE)
        except UNREADABLE as error:
            raise damaged_model("the tokenizer cannot be read", f"{where}: {name}", error) from None
        if not same:
            raise readers.differ(f"has another {name} than {readers.whose}", where)


_ONE_TOKENIZER = "train both with one tokenizer that has the tokens of both, or leave one of the experts out"


@dataclass(frozen=True)
class SharedTokens:
    """The tokens of several models, the base first.

    Attributes:
        read: of each; None where neither it nor the base has a tokenizer.
        largest: number of the model whose tokenizer has the tokens of all.
        notes: what a user should know of tokenizers that differ, or lack.
    """

    read: Sequence[ReadTokens | None]
    largest: int
    notes: tuple[str, ...]

    @property
    def are_same(self) -> bool:
        """Whether all have the same tokens."""
        tokens = [each and each.tokens for each in self.read]
        return all(each is tokens[0] or each == tokens[0] for each in tokens)

    @property
    def tokens(self) -> Tokens:
        """Of the largest; none where no model has a tokenizer."""
        largest = self.read[self.largest]
        return {} if largest is None else largest.tokens

    def shown(self, ids: Sequence[int]) -> str:
        """Some tokens of the largest, for a message."""
        names = {number: token for token, number in self.tokens.items()}
        return some_of([f"{names.get(number, '')[:60]!r} {number}" for number in ids], 5)


def share_tokens(sources: Sequence[ModelSource], *, more: bool) -> SharedTokens:
    """What the tokenizers of models (the base first) have in common; `more`: whether any may have more tokens than another.

    A folder without tokenizer files is taken to use the base model's. Raises MismatchError where two of them give an id two
    tokens, a token two ids, or join tokens otherwise; SourceError for one that cannot be read.
    """
    base = sources[0]
    first = read_tokens(base.folder, where=base.where)
    found = [first]
    largest = 0
    notes = list[str]()
    if first is None and not has_tokenizer(base.folder):
        notes.append(f"{base.label}: its folder has no tokenizer, which fit, eval, chat and serve need: put its files there")
    for number, source in enumerate(sources[1:], 1):
        where = source.where
        check_same_pieces(base.folder, source.folder, where=where)
        read = None if first is None else read_tokens(source.folder, where=where, beside=first.tokens) or first
        found.append(read)
        if first is None or read is None or read is first:
            continue
        notes += check_alike(first, read, where=where, below=min(first.size, read.size) if more else 2**62)
        most = found[largest]
        if largest and most is not None:
            between = Readers(ours=sources[largest].label, remedy=_ONE_TOKENIZER)
            check_alike(most, read, where=where, readers=between, below=min(most.size, read.size))
        if read.size > (most or first).size:
            largest = number
    shared = SharedTokens(found, largest, tuple(notes))
    return replace(shared, notes=(*notes, *_other_ends(sources, shared))) if shared.are_same else shared


def _other_ends(sources: Sequence[ModelSource], shared: SharedTokens) -> Iterator[str]:
    """Notes on experts whose texts end where those of the base, and of the mixture, go on."""
    known = {*ends_of(sources[0], shared.tokens)}
    where = "eos_token_id in the base model's generation_config.json"
    for source in sources[1:]:
        if others := sorted({*ends_of(source, shared.tokens)} - known):
            yield f"{source.label}: its texts end at {shared.shown(others)}, and the mixture's go on there: add it to {where}"


def ends_of(source: ModelSource, tokens: Tokens) -> Iterator[int]:
    """Ids of the tokens at which a model's texts end, by its tokenizer, its generation config and its config."""
    said = read_beside(source.folder, "tokenizer_config.json").get("eos_token")
    name = said.get("content") if isinstance(said, dict) else said
    if isinstance(name, str) and name in tokens:
        yield tokens[name]
    for config in (read_beside(source.folder, GENERATION), source.config):
        found = config.get("eos_token_id")
        yield from (each for each in (found if isinstance(found, list) else [found]) if type(each) is int)


_OTHER_TOKENIZER = "give the tokenizer that belongs to the model, or resize the model's embeddings"


def check_ids_fit(tokens: Mapping[str, int], vocab_size: int, *, where: str, remedy: str = _OTHER_TOKENIZER) -> None:
    """Raise MismatchError when a tokenizer has ids for which the model has no embedding."""
    beyond = sorted(token for token, index in tokens.items() if index >= vocab_size)
    if beyond:
        raise MismatchError(
            f"the tokenizer has {len(beyond)} tokens that the model has no embedding for",
            where=where,
            found=", ".join(repr(token[:60]) for token in beyond[:5]),
            expected=f"ids below vocab_size {vocab_size}",
            remedy=remedy,
        )
