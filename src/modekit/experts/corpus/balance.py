"""`modekit data balance OUT --text en=... --text fr=...`: domains of equal size in tokens, for training and validation.

    first reading -> tokens per document -> which are kept -> second reading -> a file per split and domain -> OUT

Kept is so much that (largest total - smallest) / smallest <= max_diff_percent / 100. Documents are whole, and asked in an order
that a seed gives. Apart, a document that does not fit under the cap is passed over; common, it goes in or out of all domains.
Documents are read twice and never all in memory. The same texts, tokenizer and seed give the same documents in the same order,
in whatever files and order they lie.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from modekit.errors import TextError
from modekit.experts.corpus.balanced import (
    JSON_FILE,
    MARKDOWN_FILE,
    SPLITS,
    Amount,
    Balanced,
    BalancedDomain,
    BalanceSettings,
    CountingTokenizer,
    DomainShare,
    Split,
)
from modekit.experts.corpus.count import (
    CountedDomain,
    DomainReader,
    Key,
    check_setting,
    checked_texts,
    none_in_split,
    token_counter,
)
from modekit.experts.corpus.write import write_domain
from modekit.files.output import Replace, refuse_existing
from modekit.files.staging import staging
from modekit.files.write import make_folder, write_file, write_json
from modekit.recipes.paths import locate, name_of
from modekit.run import QUIET, Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KeptUnits = Sequence[Sequence[Key]]
"""Per domain the units that are kept, in order."""
_ROUNDS = 1_000  # in which a cap is lowered
_BATCH = 0.005  # of the tuples left is taken out before the totals are looked at again


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


def choose_apart(units: Sequence[Mapping[Key, int]], percent: float, most: int | None, seed: int) -> KeptUnits | None:
    """Of every domain's units (with their tokens) those to keep, at most `most` tokens of each; None where none are found.

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


def _filled(order: Sequence[Key], tokens: Mapping[Key, int], cap: int) -> list[Key]:
    """Units that fit under a cap, one after the other."""
    kept, left = [], cap
    for unit in order:
        if tokens[unit] <= left:
            kept.append(unit)
            left -= tokens[unit]
    return kept


def choose_common(units: Sequence[Mapping[Key, int]], percent: float, most: int | None, seed: int) -> KeptUnits | None:
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


PERCENT = "--max-diff-percent"
_MOST_PERCENT, _MOST_HELD_OUT = 1_000_000.0, 0.5
Units = Mapping[Key, int]
"""Tokens of a domain's units."""


@dataclass(frozen=True)
class TextsToBalance:
    """Text by domain (paths relative to `root`, or hub data sets), and what counts its tokens."""

    texts: Mapping[str, Sequence[str]]
    root: Path
    tokenizer: PreTrainedTokenizerBase
    tokenizer_folder: Path


def balance(
    given: TextsToBalance, settings: BalanceSettings, out: Path, *, replace: Replace = "nothing", run: Run = QUIET
) -> Balanced:
    """Write OUT/train/NAME.jsonl and OUT/validation/NAME.jsonl, balance.json and balance.md.

    Raises TextError for text that cannot be read or of which no choice is near enough, ModekitError for settings and names,
    OutputError. `replace` says what may be at OUT.
    """
    _check_settings(settings)
    texts = checked_texts(given.texts, given.root, least=2)
    sources = [*(path for spec in texts.values() if (path := locate(spec, given.root))), given.tokenizer_folder]
    refuse_existing(out, replace, sources=sources)
    reader = DomainReader(given.root, token_counter(given.tokenizer), settings.common, run)
    counted = [reader.counted(name, spec) for name, spec in texts.items()]
    kept = _choose(counted, settings)
    name = name_of(str(given.tokenizer_folder), given.root)
    tokenizer = CountingTokenizer(name=name, sha256=_digest_of(given.tokenizer))
    digest = f"balance {settings} {tokenizer.sha256} {_digest_of_texts(counted)}"
    with staging(out, digest, "texts", sources=sources, replace=replace, sync=run.sync) as stage:
        for split in kept:
            make_folder(stage.folder / split)
        domains = []
        for place, each in enumerate(counted):
            files = {stage.folder / split / f"{each.name}.jsonl": of_split[place] for split, of_split in kept.items()}
            digests = dict(zip(kept, write_domain(each, reader, files), strict=True))
            domains.append(_balanced_domain(place, counted, kept, digests, settings, given.root))
        balanced = _balanced(settings, tokenizer, domains)
        write_json(stage.folder / JSON_FILE, balanced.model_dump(mode="json"), sync=False)
        write_file(stage.folder / MARKDOWN_FILE, balanced.as_markdown().encode(), sync=False)
    return balanced


def _check_settings(settings: BalanceSettings) -> None:
    """Raise ModekitError for a setting that cannot be."""
    percent, validation, most = settings.max_diff_percent, settings.validation, settings.max_tokens
    check_setting(PERCENT, percent, f"0 to {_MOST_PERCENT:,.0f}", right=0 <= percent <= _MOST_PERCENT)
    held_out = f"a share from 0 to {_MOST_HELD_OUT}"
    check_setting("--validation", validation, held_out, right=0 <= validation <= _MOST_HELD_OUT)
    check_setting("--max-tokens", most, "1 or more", right=most is None or most >= 1)
    check_setting("--seed", settings.seed, "0 or more", right=settings.seed >= 0)


def _choose(counted: Sequence[CountedDomain], settings: BalanceSettings) -> dict[Split, KeptUnits]:
    """What is kept of every split. Raises TextError where that is nothing of some domain."""
    units = [each.units() for each in counted]
    if settings.common:
        _check_common(counted, units)
    kept: dict[Split, KeptUnits] = {}
    for split in SPLITS if settings.validation else SPLITS[:1]:
        own = [_of_split(each, split, settings) for each in units]
        for domain, each in zip(counted, own, strict=True):
            if not each:
                found, expected = f"{len(domain.tokens)} documents in all", f"a share of about {settings.share(split):g}"
                remedy = "give more documents, or another --validation (0: none)"
                raise none_in_split(split, domain.name, found, expected, remedy)
        most = None if settings.max_tokens is None else max(1, round(settings.max_tokens * settings.share(split)))
        choose = choose_common if settings.common else choose_apart
        chosen = choose(own, settings.max_diff_percent, most, settings.seed)
        if chosen is None:
            raise _nothing_left(split, counted, own, settings)
        kept[split] = chosen
    return kept


def _of_split(units: Units, split: Split, settings: BalanceSettings) -> dict[Key, int]:
    held_out = split == "validation"
    return {unit: tokens for unit, tokens in units.items() if is_held_out(unit, settings.validation) == held_out}


def _check_common(counted: Sequence[CountedDomain], units: Sequence[Units]) -> None:
    if not set.intersection(*(set(each) for each in units)):
        raise TextError(
            "no document is in all domains",
            where="--common",
            found=", ".join(f"{domain.name}: {len(each)} ids" for domain, each in zip(counted, units, strict=True)),
            expected="the same 'id' in the records of every domain, or the same path of files below their folders",
            remedy="correct the ids, or leave out --common",
        )


def _nothing_left(
    split: Split, counted: Sequence[CountedDomain], units: Sequence[Units], settings: BalanceSettings
) -> TextError:
    """Why no choice is near enough, by what each domain had to choose from."""
    shared = set.intersection(*(set(each) for each in units)) if settings.common else None
    said = []
    for domain, each in zip(counted, units, strict=True):
        tokens = [each[unit] for unit in each if shared is None or unit in shared]
        sizes = f", of {min(tokens):,} to {max(tokens):,}" if len(tokens) > 1 else ""
        said.append(f"{domain.name}: {len(tokens):,} documents, {sum(tokens):,} tokens{sizes}")
    raised = [PERCENT, *(["--validation"] if split == "validation" else [])]
    raised += ["--max-tokens"] if settings.max_tokens is not None else []
    if settings.common:
        others = "leave out --common, or take a tokenizer that reads all domains alike (modekit data tokenizer)"
    else:
        others = "cut long documents, or give more text"
    return TextError(
        f"no choice of whole documents brings the domains within {settings.max_diff_percent:g} %",
        where=f"{PERCENT} ({split})",
        found="; ".join(said),
        remedy=f"raise {' or '.join(raised)}, {others}",
    )


def _balanced_domain(
    place: int,
    counted: Sequence[CountedDomain],
    kept: Mapping[Split, KeptUnits],
    digests: Mapping[Split, str],
    settings: BalanceSettings,
    root: Path,
) -> BalancedDomain:
    """A domain with what was found and kept; `digests` of its files."""
    domain = counted[place]
    units, documents = domain.units(), domain.documents_of_units()
    shared = set.intersection(*(set(each.units()) for each in counted)) if settings.common else set(units)

    def share(split: Split) -> DomainShare:
        own = _of_split(units, split, settings)
        found, mine, alone = (
            Amount(documents=sum(documents[key] for key in keys), tokens=sum(units[key] for key in keys))
            for keys in (list(own), kept[split][place], [key for key in own if key not in shared])
        )
        return DomainShare(
            found=found,
            kept=mine,
            not_common=alone,
            over=found - alone - mine,
            dropped=round(1 - mine.tokens / found.tokens, 6),
            sha256=digests[split],
        )

    return BalancedDomain(
        name=domain.name,
        text=name_of(domain.spec, root),
        duplicates=domain.duplicates,
        without_tokens=domain.silent,
        train=share("train"),
        validation=share("validation") if "validation" in kept else None,
    )


def _balanced(settings: BalanceSettings, tokenizer: CountingTokenizer, domains: list[BalancedDomain]) -> Balanced:
    shares = {split: [share for domain in domains if (share := domain.share(split))] for split in SPLITS}
    return Balanced(
        settings=settings,
        tokenizer=tokenizer,
        diff_percent={
            split: round(diff_percent([share.kept.tokens for share in each]), 4) for split, each in shares.items() if each
        },
        domains=domains,
        sha256=hashlib.sha256("".join(share.sha256 for each in shares.values() for share in each).encode()).hexdigest(),
    )


def _digest_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of what a tokenizer does, where it can say it; else of its vocabulary."""
    said = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else str(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()


def _digest_of_texts(counted: Sequence[CountedDomain]) -> str:
    together = hashlib.sha256()
    for each in counted:
        together.update(each.name.encode())
        for key in sorted(each.tokens):
            together.update(key)
    return together.hexdigest()
