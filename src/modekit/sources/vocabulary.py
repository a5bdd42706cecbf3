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
from functools import cached_property
from pathlib import Path

from modekit.errors import MismatchError, UnsupportedError, some_of
from modekit.files.write import json_bytes
from modekit.sources.adapter import MERGE_FIRST, AdapterSource, LowRank
from modekit.sources.config import Config, whole
from modekit.sources.family import Family
from modekit.sources.header import TensorRef
from modekit.sources.names import weight_of
from modekit.sources.rows import Giver, RowRange, joined_rows, with_rows
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
    other_cuts,
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
    models = [_Model(source, base, family, None if read is None else read.tokens) for source, read in pairs]
    rows, owner = max(model.rows for model in models), models[shared.largest]
    known = [model.rows or models[0].rows for model in models if model.ids == owner.ids]  # padding of others is no token's row
    check_ids_fit(_tokens(shared.read[shared.largest]), max(known), where=owner.source.where)
    if shared.are_same and all(model.rows in (0, rows) for model in models):
        return Vocabulary(sources, sources, TokenizerChoice(base), notes=shared.notes)
    for model in models:
        model.check_rows()
    grown = _Grown(models, rows)
    choice = choose_tokenizer(unique, shared)
    made = {model.source: grown.model(model) for model in models}
    config = {**base.config, "vocab_size": rows, **choice.settings}
    made[base] = replace(made[base], config=config, on_disk=base.on_disk or base.config)
    notes = (*shared.notes, *_notes(models, shared, rows), *choice.notes)
    return Vocabulary(tuple(made[source] for source in sources), sources, choice, True, notes)


def _tokens(read: ReadTokens | None) -> Tokens:
    return {} if read is None else read.tokens


@dataclass(frozen=True)
class _Model:
    """One model and its rows. `tokens`: of its tokenizer; None without one, when it has all its rows."""

    source: ModelSource
    base: ModelSource
    family: Family
    tokens: Tokens | None

    @cached_property
    def ids(self) -> frozenset[int]:
        """Of its tokenizer."""
        return frozenset((self.tokens or {}).values())

    @cached_property
    def tensors(self) -> Mapping[str, TensorRef]:
        """Embedding, head and the head's bias, as far as the model has its own."""
        source = self.source
        own = source.replaced if isinstance(source, AdapterSource) else source.tensors
        names = (weight_of(self.family.embedding), weight_of(self.family.head), f"{self.family.head}.bias")
        return {name: own[name] for name in names if name in own}

    def tensor(self, name: str) -> TensorRef | None:
        """One of them; a tied head is the embedding. None where the model has the base's."""
        if name == weight_of(self.family.head) and name not in self.tensors and self.family.is_tied(self.base):
            return self.tensors.get(weight_of(self.family.embedding))
        return self.tensors.get(name)

    @property
    def rows(self) -> int:
        """V of the model; 0 of an adapter that has the base's."""
        return max((ref.shape[0] for ref in self.tensors.values()), default=0)

    def check_rows(self) -> None:
        """Raise MismatchError unless embedding and head have as many rows as each other."""
        base = self.base.tensor(weight_of(self.family.embedding)).shape[0]
        untied = self.family.head and not self.family.is_tied(self.base)
        names = [weight_of(self.family.embedding), *([weight_of(self.family.head)] if untied else [])]
        found = {name: self.tensors[name].shape[0] if name in self.tensors else base for name in names}
        if len(set(found.values())) > 1:
            both = "save both in the adapter (modules_to_save: [embed_tokens, lm_head])"
            raise MismatchError(
                "the model's embedding and head have different numbers of tokens",
                where=self.source.where,
                found=", ".join(f"{name} {rows}" for name, rows in found.items()),
                expected="as many rows in both",
                remedy=both if isinstance(self.source, AdapterSource) else "save the model again",
            )

    def has(self, ref: TensorRef) -> set[int]:
        """Ids of the tokens for which the model has a row of its own in a tensor."""
        rows = ref.shape[0]
        return set(range(rows)) if self.tokens is None else {number for number in self.ids if number < rows}


class _Grown:
    """Models with rows for all tokens."""

    def __init__(self, models: Sequence[_Model], rows: int) -> None:
        self._models, self._rows = models, rows
        self._base = models[0]

    def model(self, model: _Model) -> ModelSource:
        """The model with `rows` rows."""
        made = {name: self._tensor(model, name, ref) for name, ref in model.tensors.items()}
        source = model.source
        if not isinstance(source, AdapterSource):
            return replace(source, tensors={name: made.get(name, ref) for name, ref in source.tensors.items()})
        replaced = {name: made.get(name, ref) for name, ref in source.replaced.items()}
        changes = {name: self._change(model, name, change) for name, change in source.changes.items()}
        return replace(source, replaced=replaced, changes=changes)

    def _tensor(self, model: _Model, name: str, own: TensorRef) -> TensorRef:
        """A model's tensor with a row for every token; itself where it has them."""
        owners = [(each, ref, each.has(ref)) for each in self._models if (ref := each.tensor(name)) is not None]
        lacking = set().union(*(ids for _, _, ids in owners)) - model.has(own)
        if not lacking and own.shape[0] == self._rows:
            return own
        for each, _, ids in owners:
            if ids & lacking and isinstance(each.source, AdapterSource) and name in each.source.changes:
                raise UnsupportedError(  # the row that it gives is not in its file as the model has it
                    "the adapter adds tokens and has a low-rank change on their embedding or head as well",
                    where=f"{each.source.where}: {name}",
                    remedy=MERGE_FIRST,
                )

        def giver(row: int) -> Giver:
            given = [(each, ref) for each, ref, ids in owners if row in ids]
            if given and given[0][0] is self._base:
                given = given[:1]
            return tuple((ref, row) for _, ref in given) or next(((ref, row),) for _, ref, _ in owners if row < ref.shape[0])

        elsewhere = sorted(lacking.union(range(own.shape[0], self._rows)))
        return with_rows(own, {row: giver(row) for row in elsewhere})

    def _change(self, model: _Model, name: str, change: LowRank) -> LowRank:
        """An adapter's change of embedding or head, which is zero for tokens that the adapter does not know."""
        count = (model.tensor(name) or self._base.tensors.get(name, change.refs[0])).shape[0]
        if name not in (weight_of(model.family.embedding), weight_of(model.family.head)) or count == self._rows:
            return change
        if change.magnitude is not None:
            raise UnsupportedError(
                "an adapter with DoRA on embedding or head cannot be given more tokens",
                where=f"{model.source.where}: {name}",
                found=f"{count} tokens",
                expected=f"{self._rows}, as the mixture has",
                remedy=MERGE_FIRST,
            )
        if change.transposed:
            return change  # folded row by row: the rows that it lacks stay (weights/folding.py)
        return replace(change, b=joined_rows(change.b, [RowRange(count, (change.b,)), RowRange(self._rows - count)]))


def _notes(models: Sequence[_Model], shared: SharedTokens, rows: int) -> Iterator[str]:
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
