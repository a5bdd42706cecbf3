"""One tokenizer for models of which some have more tokens than others: the largest, if it has all tokens of the others.

Up to the size of the smaller one two tokenizers have the same tokens with the same ids; beyond it the larger one adds some.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from modekit.errors import some_of
from modekit.files.write import json_bytes
from modekit.sources.adapter import AdapterSource
from modekit.sources.config import Config
from modekit.sources.source import ModelSource
from modekit.sources.tokenizer import (
    TOKENIZER_FILES,
    Readers,
    ReadTokens,
    Tokens,
    chat_template,
    check_alike,
    check_same_pieces,
    copied_files,
    other_cuts,
    read_beside,
    read_tokens,
)

_GENERATION, _TEMPLATE = "generation_config.json", "chat_template.jinja"
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
    largest: int = 0
    notes: tuple[str, ...] = ()

    @property
    def are_same(self) -> bool:
        """Whether all have the same tokens."""
        tokens = [each and each.tokens for each in self.read]
        return all(each is tokens[0] or each == tokens[0] for each in tokens)

    @cached_property
    def by_id(self) -> dict[int, str]:
        """Id -> token of the largest."""
        read = self.read[self.largest]
        return {} if read is None else {number: token for token, number in read.tokens.items()}

    def shown(self, ids: Sequence[int]) -> str:
        """Some tokens, for a message."""
        return some_of([f"{self.by_id.get(number, '')[:60]!r} {number}" for number in ids], 5)


def share_tokens(sources: Sequence[ModelSource]) -> SharedTokens:
    """What the tokenizers of models (the base first) have in common.

    A folder without tokenizer files is taken to use the base model's. Raises MismatchError where two of them give an id two
    tokens, a token two ids, or join tokens otherwise; SourceError for one that cannot be read.
    """
    base = sources[0]
    first = read_tokens(base.folder, where=base.where)
    found, largest, notes = [first], 0, list[str]()
    if first is None and not any((base.folder / name).exists() for name in TOKENIZER_FILES):
        notes.append(f"{base.label}: its folder has no tokenizer, which fit, eval, chat and serve need: put its files there")
    for number, source in enumerate(sources[1:], 1):
        where = source.where
        check_same_pieces(base.folder, source.folder, where=where)
        read = None if first is None else read_tokens(source.folder, where=where, beside=first.tokens) or first
        found.append(read)
        if first is None or read is None or read is first:
            continue
        check_alike(first, read, where=where, below=min(first.size, read.size))
        if first.rest and read.rest and first.rest != read.rest:
            notes += filter(None, [other_cuts(base.folder, source.folder, where=where)])
        most = found[largest]
        if largest and most is not None:
            between = Readers(ours=sources[largest].label, remedy=_ONE_TOKENIZER)
            check_alike(most, read, where=where, readers=between, below=min(most.size, read.size))
        if read.size > (most or first).size:
            largest = number
    return SharedTokens(found, largest, tuple(notes))


@dataclass(frozen=True)
class TokenizerChoice:
    """Whose tokenizer a mixture has, and what goes with it.

    Attributes:
        source: whose files are copied.
        number: its place among the models, the base's being 0.
        eos: ids of the tokens at which a text may end; empty: as the base's config says.
        settings: what config.json says of special tokens.
        written: files that no model has like this -> their content.
        notes: what a user should know.
    """

    source: ModelSource
    number: int = 0
    eos: tuple[int, ...] = ()
    settings: Config = field(default_factory=dict)
    written: Mapping[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def owner(self) -> str:
        """Whose files they are, for messages."""
        return f"those of {self.source.label}" if self.number else "the base model's"

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template."""
        return _TEMPLATE in self.written or bool(chat_template(self.source.folder))

    @property
    def copied_files(self) -> tuple[Path, ...]:
        """Of its files. Raises SourceError for a link out of the folder."""
        found = copied_files(self.source.folder, where=self.source.where)
        return tuple(file for file in found if file.name not in self.written)


def choose_tokenizer(sources: Sequence[ModelSource], shared: SharedTokens) -> TokenizerChoice:
    """The largest tokenizer, its chat template (or else the base's, or an expert's), and every token that ends a text."""
    owner, read = sources[shared.largest], shared.read[shared.largest]
    if shared.are_same or read is None:
        return TokenizerChoice(sources[0])
    inside = shared.by_id.keys()
    eos = tuple(dict.fromkeys(end for each in (owner, *sources) for end in _ends(each, read.tokens) if end in inside))
    said: int | list[int] = eos[0] if len(eos) == 1 else list(eos)
    names = ("bos_token_id", "pad_token_id", "eos_token_id") if not isinstance(owner, AdapterSource) else ()
    settings = {name: owner.config[name] for name in names if name in owner.config} | ({"eos_token_id": said} if eos else {})
    written: dict[str, bytes] = {}
    generation = next((found for each in (owner, sources[0]) if (found := read_beside(each.folder, _GENERATION))), None)
    if generation is not None and eos:
        written[_GENERATION] = json_bytes({**generation, "eos_token_id": said})
    teller = next((each for each in (owner, *sources) if chat_template(each.folder)), None)
    template = None if teller is None or teller is owner else chat_template(teller.folder)
    if template is not None:
        written[_TEMPLATE] = template.encode()
    notes = tuple(_notes(owner, teller, shared, eos))
    return TokenizerChoice(owner, shared.largest, eos, settings, written, notes)


def _notes(owner: ModelSource, teller: ModelSource | None, shared: SharedTokens, eos: Sequence[int]) -> Iterator[str]:
    template = "no model has a chat template" if teller is None else f"the chat template is that of {teller.label}"
    yield f"the tokenizer is that of {owner.label}, and {template}"
    if eos:
        yield f"a text ends at {shared.shown(eos)}"


def _ends(source: ModelSource, tokens: Tokens) -> Iterator[int]:
    """Ids of the tokens at which a model's texts end, by its tokenizer, its generation config and its config."""
    said = read_beside(source.folder, "tokenizer_config.json").get("eos_token")
    name = said.get("content") if isinstance(said, dict) else said
    if isinstance(name, str) and name in tokens:
        yield tokens[name]
    for config in (read_beside(source.folder, _GENERATION), {} if isinstance(source, AdapterSource) else source.config):
        found = config.get("eos_token_id")
        yield from (each for each in (found if isinstance(found, list) else [found]) if type(each) is int)
