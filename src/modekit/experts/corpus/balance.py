"""`modekit data balance OUT --text en=... --text fr=...`: domains of equal size in tokens, for training and validation.

    tokens per document -> which are kept -> a file per split and domain -> OUT

Kept is so much that (largest total - smallest) / smallest <= max_diff_percent / 100. Documents are whole, and asked in an order
that a seed gives. Apart, a document that does not fit under the cap is passed over; common, it goes in or out of all domains.
The same texts, tokenizer and seed give the same documents in the same order, in whatever files and order they lie.

A *unit* is what goes in or out as one: a document, known by the hash of its text; or, where only common documents count, all
documents of one id, known by the hash of the id.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel, Field

from modekit.errors import ModekitError, TextError
from modekit.experts.corpus.texts import (
    WHERE,
    DomainText,
    GivenTexts,
    Key,
    count_tokens,
    key_of_id,
    none_in_split,
    read_domain,
)
from modekit.files.place import Replace
from modekit.files.staging import staging
from modekit.files.write import json_bytes, make_folder, write_file
from modekit.recipes.paths import name_of
from modekit.run import QUIET, Run
from modekit.text.document import text_of
from modekit.text.records import data_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
Units = Mapping[Key, int]
"""Tokens of a domain's units."""
KeptUnits = Sequence[Sequence[Key]]
"""Per domain the units that are kept, in order."""
_ROUNDS = 1_000  # in which a cap is lowered
_BATCH = 0.005  # of the tuples left is taken out before the totals are looked at again


class BalanceSettings(BaseModel, frozen=True, allow_inf_nan=False):
    """Settings of `modekit data balance`."""

    max_diff_percent: float = Field(
        5.0, ge=0, le=1e6, description="Largest 100 (largest - smallest) / smallest total of tokens, in every split."
    )
    common: bool = Field(False, description="Keep only documents that every domain has, by their id.")
    validation: float = Field(0.1, ge=0, le=0.5, description="Share of the documents to hold out; 0: none.")
    max_tokens: int | None = Field(None, ge=1, description="Tokens per domain at most, both splits together.")
    seed: int = Field(0, ge=0, description="Random seed of the order in which documents are chosen.")


class Share(BaseModel, frozen=True):
    """A domain's share of a split: tokens found (duplicates once), documents and tokens kept."""

    found_tokens: int
    documents: int
    tokens: int


class BalancedDomain(BaseModel, frozen=True):
    """A domain: its name, its text as it was named, copies of documents, and its share of each split."""

    name: str
    text: str
    duplicates: int
    splits: dict[Split, Share]


class Balanced(BaseModel, frozen=True):
    """A balanced corpus, as balance.json has it; `diff_percent` per split, as `max_diff_percent` has it."""

    settings: BalanceSettings
    tokenizer: str
    diff_percent: dict[Split, float]
    domains: list[BalancedDomain]

    def notes(self) -> list[str]:
        """Which documents did not count."""
        copies = "documents are copies of others, and count once"
        return [f"{domain.name}: {domain.duplicates:,} {copies}" for domain in self.domains if domain.duplicates]


def diff_percent(totals: Sequence[int]) -> float:
    """100 (largest - smallest) / smallest; infinite where one has nothing."""
    return 100 * (max(totals) - min(totals)) / min(totals) if min(totals) else float("inf")


def in_order(units: Iterable[Key], seed: int) -> list[Key]:
    """Units in the order that a seed gives, in whatever order they come."""
    return sorted(units, key=lambda unit: hashlib.sha256(f"balance {seed} ".encode() + unit).digest())


def is_held_out(unit: Key, share: float) -> bool:
    """Whether a unit is validation: by its own hash, whatever the seed and the other units.

    It is another hash than that of `text/splits.py`, so that what is left for training has all three of its splits.
    """
    return int.from_bytes(hashlib.sha256(b"validation" + unit).digest()[:8], "big") < share * 2**64


def choose_apart(units: Sequence[Units], percent: float, most: int | None, seed: int) -> KeptUnits | None:
    """Of every domain's units those to keep, at most `most` tokens of each; None where none are found.

    The smallest domain's total is the cap. Where it leaves a domain too far below, it is lowered to what that one reached and
    its percent.
    """
    orders = [in_order(each, seed) for each in units]
    cap = min(sum(each.values()) for each in units)
    cap = cap if most is None else min(cap, most)
    for _ in range(_ROUNDS):
        kept = [_filled(order, tokens, cap) for order, tokens in zip(orders, units, strict=True)]
        totals = [sum(tokens[unit] for unit in each) for each, tokens in zip(kept, units, strict=True)]
        if diff_percent(totals) <= percent:
            return kept
        cap = min(cap - 1, int(min(totals) * (1 + percent / 100)))
        if cap <= 0:
            break
    return None


def _filled(order: Sequence[Key], tokens: Units, cap: int) -> list[Key]:
    """Units that fit under a cap, one after the other."""
    kept, left = [], cap
    for unit in order:
        if tokens[unit] <= left:
            kept.append(unit)
            left -= tokens[unit]
    return kept


def choose_common(units: Sequence[Units], percent: float, most: int | None, seed: int) -> KeptUnits | None:
    """Units that every domain has, at most `most` tokens of each domain; None where none are left.

    Tuples of tokens (of U units in D domains) are taken out until the totals are near enough. A tuple's share in what is wrong
    is the mean of its domains' totals above their mean, weighed by its tokens; those with the largest go first.
    """
    keys = in_order(set.intersection(*(set(each) for each in units)), seed)
    tokens_UD = np.array([[each[key] for each in units] for key in keys], dtype=np.int64).reshape(len(keys), len(units))
    places = np.arange(len(keys))
    if most is not None:
        places = places[(tokens_UD.cumsum(axis=0) <= most).all(axis=1)]
    totals_D = tokens_UD[places].sum(axis=0)
    while len(places) and diff_percent(totals_D.tolist()) > percent:
        mine_UD = tokens_UD[places]
        wrong_U = mine_UD @ (totals_D - totals_D.mean()) / mine_UD.sum(axis=1)
        out = np.argsort(-wrong_U, kind="stable")[: max(1, int(_BATCH * len(places)))]
        totals_D = totals_D - mine_UD[out].sum(axis=0)
        places = np.delete(places, out)
    return [[keys[place] for place in places]] * len(units) if len(places) else None


@dataclass(frozen=True)
class _Domain:
    """A domain's text, the tokens of its units by split, and the documents of each unit."""

    text: DomainText
    tokens: Mapping[Split, Units]
    units: Mapping[Key, Sequence[Key]]

    def lines(self, units: Sequence[Key]) -> bytes:
        """The documents of some units as a .jsonl."""
        records = ((key, self.text.documents[key]) for unit in units for key in self.units[unit])
        said = ({"id": record.id or key.hex(), **data_of(record.document)} for key, record in records)
        return "".join(f"{json.dumps(each, ensure_ascii=False)}\n" for each in said).encode()

    def share(self, split: Split, kept: Sequence[Key]) -> Share:
        """What was found of a split, and what is kept of it."""
        tokens, documents = self.tokens[split], sum(len(self.units[unit]) for unit in kept)
        return Share(found_tokens=sum(tokens.values()), documents=documents, tokens=sum(tokens[unit] for unit in kept))


def balance(
    given: GivenTexts, settings: BalanceSettings, out: Path, *, replace: Replace = "nothing", run: Run = QUIET
) -> Balanced:
    """Write OUT/train/NAME.jsonl, OUT/validation/NAME.jsonl and balance.json; `replace` says what may be at OUT.

    Raises TextError for text that cannot be read or of which no choice is near enough, ModekitError for names, OutputError.
    """
    texts, sources = given.checked(out, replace)
    if len(texts) < 2:
        raise ModekitError(
            "there is nothing to balance",
            where=WHERE,
            expected="2 domains or more",
            remedy="give every domain a --text NAME=PATH",
        )
    tokenizer = given.tokenizer(run)
    assert tokenizer is not None and given.model is not None  # by which tokens are counted
    domains = [_read(name, spec, given.root, tokenizer, settings, run) for name, spec in texts.items()]
    splits = SPLITS if settings.validation else SPLITS[:1]
    kept = {split: _choose(split, domains, settings) for split in splits}
    shares = [{split: domain.share(split, kept[split][place]) for split in splits} for place, domain in enumerate(domains)]
    balanced = Balanced(
        settings=settings,
        tokenizer=name_of(given.model, given.root),
        diff_percent={split: round(diff_percent([each[split].tokens for each in shares]), 4) for split in splits},
        domains=[
            BalancedDomain(
                name=domain.text.name,
                text=name_of(domain.text.spec, given.root),
                duplicates=domain.text.duplicates,
                splits=each,
            )
            for domain, each in zip(domains, shares, strict=True)
        ],
    )
    files = {
        f"{split}/{domain.text.name}.jsonl": domain.lines(units)
        for split in splits
        for domain, units in zip(domains, kept[split], strict=True)
    }
    files["balance.json"] = json_bytes(balanced.model_dump(mode="json"))
    digest = hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in files.values())).hexdigest()
    with staging(out, f"balance {digest}", "texts", sources=sources, replace=replace, sync=run.sync) as stage:
        for name, content in files.items():
            make_folder((stage.folder / name).parent)
            write_file(stage.folder / name, content, sync=False)
    return balanced


def _read(name: str, spec: str, root: Path, tokenizer: PreTrainedTokenizerBase, settings: BalanceSettings, run: Run) -> _Domain:
    text = read_domain(name, spec, root, run, by_id=settings.common)
    run.begin(f"count {name}")
    counts = count_tokens(tokenizer, [text_of(record.document) for record in text.documents.values()])
    units: dict[Key, list[Key]] = {}
    tokens: dict[Split, dict[Key, int]] = {split: {} for split in SPLITS}
    for (key, record), count in zip(text.documents.items(), counts, strict=True):
        if count:
            unit = key_of_id(record.id or "") if settings.common else key
            units.setdefault(unit, []).append(key)
            of_split = tokens["validation" if is_held_out(unit, settings.validation) else "train"]
            of_split[unit] = of_split.get(unit, 0) + count
    if not units:
        raise TextError(
            "the tokenizer makes no token of the text",
            where=f"{WHERE} {name}",
            found=spec,
            remedy="give a tokenizer that knows its letters",
        )
    return _Domain(text, tokens, units)


def _choose(split: Split, domains: Sequence[_Domain], settings: BalanceSettings) -> KeptUnits:
    """What is kept of a split. Raises TextError where that is nothing of some domain."""
    units, share = [domain.tokens[split] for domain in domains], settings.validation
    share = share if split == "validation" else 1 - share
    for domain, each in zip(domains, units, strict=True):
        if not each:
            raise none_in_split(
                split,
                domain.text.name,
                f"{len(domain.units)} in all",
                f"a share of about {share:g}",
                "give more documents, or another validation (0: none)",
            )
    if settings.common and not set.intersection(*(set(domain.units) for domain in domains)):
        raise TextError(
            "no document is in all domains",
            where="common=true",
            expected="the same 'id' in the records of every domain, or the same path of files below their folders",
            remedy="correct the ids, or leave out common=true",
        )
    most = None if settings.max_tokens is None else max(1, round(settings.max_tokens * share))
    choose = choose_common if settings.common else choose_apart
    chosen = choose(units, settings.max_diff_percent, most, settings.seed)
    if chosen is None:
        found = (f"{domain.text.name}: {len(each):,} documents" for domain, each in zip(domains, units, strict=True))
        others = "leave out common=true" if settings.common else "cut long documents"
        raise TextError(
            f"no choice of whole documents brings the domains within {settings.max_diff_percent:g} %",
            where=f"max_diff_percent ({split})",
            found="; ".join(found),
            remedy=f"raise it, validation or max_tokens, {others}, or give more text",
        )
    return chosen
