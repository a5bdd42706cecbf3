"""One vocabulary for models that have different numbers of tokens: which rows embedding and head have in the mixture.

    id                  0 to 31,999    32,000, 32,001      32,002 to 32,063
    base                its own        -                   -
    law (ChatML)        its own        its own             -
    code (padded)       its own        padding             padding
    rows of the base    its own        law's               code's

A model keeps the rows of the tokens that it has. Other rows are the base's; those that the base lacks too are those of the
experts that have the token (their mean), and padding where nobody has it. A model has the tokens of its
tokenizer, or of the base's without one, as far as it has rows for them. The mixture's tokenizer is the largest, if it has all
tokens of the others: up to the size of the smaller one two tokenizers have the same tokens with the same ids.

Shape legend: V tokens, D hidden size, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from modekit.errors import some_of
from modekit.files.write import json_bytes
from modekit.sources.adapter import AdapterSource
from modekit.sources.config import Config, whole
from modekit.sources.cuts import other_cuts
from modekit.sources.family import Family
from modekit.sources.grown import Grown, TokenRows
from modekit.sources.source import ModelSource
from modekit.sources.tokenizer import (
    TOKENIZER_FILES,
    Readers,
    ReadTokens,
    Tokens,
    chat_template,
    check_alike,
    check_ids_fit,
    check_same_pieces,
    check_same_tokenizer,
    copied_files,
    read_beside,
    read_tokens,
)

_GENERATION, _TEMPLATE = "generation_config.json", "chat_template.jinja"
_ONE_TOKENIZER = "train both with one tokenizer that has the tokens of both, or leave one of the experts out"


@dataclass(frozen=True)
class Vocabulary:
    """The models of a mixture with rows for all its tokens, and the tokenizer that knows them.

    Attributes:
        sources: in the order in which they were given; the base's config says how many rows there are.
        given: the same models as their files have them.
        tokenizer: whose it is, and what goes with it.
        is_grown: whether any model has other tokens or rows than the base.
        notes: what a user should know.
    """

    sources: tuple[ModelSource, ...]
    given: tuple[ModelSource, ...]
    tokenizer: TokenizerChoice
    is_grown: bool = False
    notes: tuple[str, ...] = ()


def one_vocabulary(sources: tuple[ModelSource, ...], family: Family) -> Vocabulary:
    """The models, base first, with the tokens of all of them.

    Raises MismatchError for tokenizers that disagree, or have tokens without a row; SourceError for one that cannot be read;
    UnsupportedError for an adapter that cannot be given more rows.
    """
    base, unique = sources[0], list(dict.fromkeys(sources))
    if family.pair:
        for source in unique[1:]:
            check_same_tokenizer(base.folder, source.folder, where=source.where)
        where = f"base_model ({base.spec})"
        check_ids_fit(_tokens(read_tokens(base.folder, where=where)), whole(base.config, "vocab_size"), where=where)
        return Vocabulary(sources, sources, TokenizerChoice(base))
    shared = share_tokens(unique)
    pairs = zip(unique, shared.read, strict=True)
    models = [TokenRows(source, base, family, None if read is None else read.tokens) for source, read in pairs]
    rows, owner = max(model.rows for model in models), models[shared.largest]
    known = [model.rows or models[0].rows for model in models if model.ids == owner.ids]  # padding of others is no token's row
    check_ids_fit(_tokens(shared.read[shared.largest]), max(known), where=owner.source.where)
    if shared.are_same and all(model.rows in (0, rows) for model in models):
        return Vocabulary(sources, sources, TokenizerChoice(base), notes=shared.notes)
    for model in models:
        model.check_rows()
    grown = Grown(models, rows)
    choice = choose_tokenizer(unique, shared)
    made = {model.source: grown.model(model) for model in models}
    config = {**base.config, "vocab_size": rows, **choice.settings}
    made[base] = replace(made[base], config=config, on_disk=base.on_disk or base.config)
    notes = (*shared.notes, *_notes(models, shared, rows), *choice.notes)
    return Vocabulary(tuple(made[source] for source in sources), sources, choice, True, notes)


def _tokens(read: ReadTokens | None) -> Tokens:
    return {} if read is None else read.tokens


def _notes(models: Sequence[TokenRows], shared: SharedTokens, rows: int) -> Iterator[str]:
    """Which tokens the base lacks, who has them, and how many rows there are."""
    added = [model.ids - models[0].ids for model in models]
    tokens = sorted(set().union(*added))
    if tokens:
        names = [model.source.label for model, ids in zip(models, added, strict=True) if ids]
        several = any(sum(token in ids for ids in added) > 1 for token in tokens)
        which = ", the mean of their rows" if several else ""
        yield f"tokens that the base model lacks, from {', '.join(names)}{which}: {len(tokens)} ({shared.shown(tokens)})"
    sizes = ", ".join(f"{model.source.label} {model.rows:,}" for model in models if model.rows)
    yield f"embedding and head have {rows:,} rows, as many as the largest model's ({sizes})"


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

    def shown(self, ids: Sequence[int]) -> str:
        """Some tokens of the largest, for a message."""
        names = {number: token for token, number in _tokens(self.read[self.largest]).items()}
        return some_of([f"{names.get(number, '')[:60]!r} {number}" for number in ids], 5)


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
            notes += other_cuts(base.folder, source.folder, where=where)
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
    inside = {*read.tokens.values()}
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
    whose = "no model has a chat template" if teller is None else f"the chat template is that of {teller.label}"
    notes = [f"the tokenizer is that of {owner.label}, and {whose}", *([f"a text ends at {shared.shown(eos)}"] if eos else [])]
    return TokenizerChoice(owner, shared.largest, eos, settings, written, tuple(notes))


def _ends(source: ModelSource, tokens: Tokens) -> Iterator[int]:
    """Ids of the tokens at which a model's texts end, by its tokenizer, its generation config and its config."""
    said = read_beside(source.folder, "tokenizer_config.json").get("eos_token")
    name = said.get("content") if isinstance(said, dict) else said
    if isinstance(name, str) and name in tokens:
        yield tokens[name]
    for config in (read_beside(source.folder, _GENERATION), {} if isinstance(source, AdapterSource) else source.config):
        found = config.get("eos_token_id")
        yield from (each for each in (found if isinstance(found, list) else [found]) if type(each) is int)
