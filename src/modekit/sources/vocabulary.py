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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from modekit.sources.config import whole
from modekit.sources.family import Family
from modekit.sources.rows import Grown, TokenRows
from modekit.sources.source import ModelSource
from modekit.sources.tokenizer import SharedTokens, check_ids_fit, share_tokens
from modekit.sources.tokenizer_choice import TokenizerChoice, choose_tokenizer


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
    base = sources[0]
    unique = list(dict.fromkeys(sources))
    shared = share_tokens(unique, more=not family.pair)
    if family.pair:
        check_ids_fit(shared.tokens, whole(base.config, "vocab_size"), where=base.where)
        return Vocabulary(sources, sources, TokenizerChoice(base), notes=shared.notes)
    pairs = zip(unique, shared.read, strict=True)
    models = [TokenRows(source, base, family, None if read is None else read.tokens) for source, read in pairs]
    rows = max(model.rows for model in models)
    owner = models[shared.largest]
    known = [model.rows or models[0].rows for model in models if model.ids == owner.ids]  # padding of others is no token's row
    unused = () if shared.read[0] is None else shared.read[0].special  # a base without rows for them came so
    used = {token: index for token, index in shared.tokens.items() if token not in unused}
    check_ids_fit(used, max(known), where=owner.source.where)
    if shared.are_same and all(model.rows in (0, rows) for model in models):
        return Vocabulary(sources, sources, TokenizerChoice(base), notes=shared.notes)
    return _grown(sources, models, shared, rows)


def _grown(sources: tuple[ModelSource, ...], models: Sequence[TokenRows], shared: SharedTokens, rows: int) -> Vocabulary:
    """With as many rows in each model, and the tokenizer that has the tokens of all."""
    for model in models:
        model.check_rows()
    grown = Grown(models, rows)
    base = sources[0]
    choice = choose_tokenizer([model.source for model in models], shared)
    made = {model.source: grown.model(model) for model in models}
    config = {**base.config, "vocab_size": rows, **choice.settings}
    made[base] = replace(made[base], config=config, on_disk=base.on_disk or base.config)
    notes = (*shared.notes, *_notes(models, shared, rows), *choice.notes)
    return Vocabulary(tuple(made[source] for source in sources), sources, choice, True, notes)


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
