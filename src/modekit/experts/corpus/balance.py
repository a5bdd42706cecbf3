"""`modekit data balance OUT --text en=... --text fr=...`: domains of equal size in tokens, for training and validation.

    first reading -> tokens per document -> which are kept -> second reading -> a file per split and domain -> OUT

Documents are read twice and never all in memory. The same texts, tokenizer and seed give the same documents in the same order,
in whatever files and order they lie.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modekit.errors import TextError
from modekit.experts.corpus.balanced import (
    JSON_FILE,
    MARKDOWN_FILE,
    SPLITS,
    Amount,
    Balanced,
    BalancedDomain,
    Part,
    Split,
)
from modekit.experts.corpus.choose import Choice, choose_apart, choose_common, is_held_out
from modekit.experts.corpus.count import Counted, Key, Reader, token_counter
from modekit.experts.corpus.settings import WHERE, BalanceSettings, check_settings, checked_texts
from modekit.experts.corpus.write import write_domain
from modekit.files.output import Replace, refuse_existing
from modekit.files.staging import staging
from modekit.files.write import make_folder, write_file, write_json
from modekit.recipes.paths import locate, name_of
from modekit.run import QUIET, Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PERCENT = "--max-diff-percent"
Choices = dict[Split, Choice]


@dataclass(frozen=True)
class Corpus:
    """What is balanced: text by domain (paths relative to `root`, or hub data sets), and what counts its tokens."""

    texts: Mapping[str, Sequence[str]]
    root: Path
    tokenizer: PreTrainedTokenizerBase
    tokenizer_folder: Path


def balance(
    corpus: Corpus, settings: BalanceSettings, out: Path, *, replace: Replace = "nothing", run: Run = QUIET
) -> Balanced:
    """Write OUT/train/NAME.jsonl and OUT/validation/NAME.jsonl, balance.json and balance.md.

    Raises TextError for text that cannot be read or of which no choice is near enough, ModekitError for settings and names,
    OutputError. `replace` says what may be at OUT.
    """
    check_settings(settings)
    texts = checked_texts(corpus.texts, corpus.root, least=2)
    sources = [*(path for spec in texts.values() if (path := locate(spec, corpus.root))), corpus.tokenizer_folder]
    refuse_existing(out, replace, sources=sources)
    reader = Reader(corpus.root, token_counter(corpus.tokenizer), settings.common, run)
    counted = [reader.counted(name, spec) for name, spec in texts.items()]
    choices = _choices(counted, settings)
    tokenizer = {"name": name_of(str(corpus.tokenizer_folder), corpus.root), "sha256": _digest_of(corpus.tokenizer)}
    balanced = Balanced(settings, tokenizer, _domains(counted, choices, settings, corpus.root))
    digest = f"balance {settings} {tokenizer['sha256']} {_digest_of_texts(counted)}"
    with staging(out, digest, "texts", sources=sources, replace=replace, sync=run.sync) as stage:
        for split in balanced.splits:
            make_folder(stage.folder / split)
        for place, each in enumerate(counted):
            files = {stage.folder / split / f"{each.name}.jsonl": choice.units[place] for split, choice in choices.items()}
            parts = balanced.domains[place].parts.values()
            for part, sha256 in zip(parts, write_domain(each, reader, files), strict=True):
                part.sha256 = sha256
        write_json(stage.folder / JSON_FILE, balanced.as_data(), sync=False)
        write_file(stage.folder / MARKDOWN_FILE, balanced.as_markdown().encode(), sync=False)
    return balanced


def _choices(counted: Sequence[Counted], settings: BalanceSettings) -> Choices:
    """What is kept of every split. Raises TextError where that is nothing of some domain."""
    units = [each.units() for each in counted]
    if settings.common:
        _check_common(counted, units)
    choices: Choices = {}
    for split in SPLITS if settings.validation else SPLITS[:1]:
        own = [_of_split(each, split, settings.validation) for each in units]
        for domain, each in zip(counted, own, strict=True):
            if not each:
                raise TextError(
                    f"no document of a domain is in the {split} split",
                    where=f"{WHERE} {domain.name}",
                    found=f"{len(domain.tokens)} documents in all",
                    expected=f"a share of about {_share(split, settings):g}",
                    remedy="give more documents, or another --validation (0: none)",
                )
        most = None if settings.max_tokens is None else max(1, round(settings.max_tokens * _share(split, settings)))
        choose = choose_common if settings.common else choose_apart
        choice = choose(own, settings.max_diff_percent, most, settings.seed)
        if choice is None:
            raise _nothing_left(split, counted, own, settings)
        choices[split] = choice
    return choices


def _of_split(units: Mapping[Key, int], split: Split, share: float) -> dict[Key, int]:
    return {unit: tokens for unit, tokens in units.items() if is_held_out(unit, share) == (split == "validation")}


def _share(split: Split, settings: BalanceSettings) -> float:
    return settings.validation if split == "validation" else 1 - settings.validation


def _check_common(counted: Sequence[Counted], units: Sequence[Mapping[Key, int]]) -> None:
    if not set.intersection(*(set(each) for each in units)):
        raise TextError(
            "no document is in all domains",
            where="--common",
            found=", ".join(f"{domain.name}: {len(each)} ids" for domain, each in zip(counted, units, strict=True)),
            expected="the same 'id' in the records of every domain, or the same path of files below their folders",
            remedy="correct the ids, or leave out --common",
        )


def _nothing_left(
    split: Split, counted: Sequence[Counted], units: Sequence[Mapping[Key, int]], settings: BalanceSettings
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


def _domains(counted: Sequence[Counted], choices: Choices, settings: BalanceSettings, root: Path) -> list[BalancedDomain]:
    """Every domain with what was found and what is kept; the files are yet to be written."""
    shared = set.intersection(*(set(each.units()) for each in counted)) if settings.common else None
    domains = []
    for place, each in enumerate(counted):
        units, documents = each.units(), each.documents_of_units()

        def amount(of: Iterable[Key], units: Mapping[Key, int] = units, documents: Mapping[Key, int] = documents) -> Amount:
            keys = list(of)
            return Amount(sum(documents[key] for key in keys), sum(units[key] for key in keys))

        domain = BalancedDomain(each.name, name_of(each.spec, root), each.duplicates, each.silent)
        for split, choice in choices.items():
            own = _of_split(units, split, settings.validation)
            alone = () if shared is None else (key for key in own if key not in shared)
            domain.parts[split] = Part(amount(own), amount(alone), amount(choice.units[place]))
        domains.append(domain)
    return domains


def _digest_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of what a tokenizer does, where it can say it; else of its vocabulary."""
    said = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else str(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()


def _digest_of_texts(counted: Sequence[Counted]) -> str:
    together = hashlib.sha256()
    for each in counted:
        together.update(each.name.encode())
        for key in sorted(each.tokens):
            together.update(key)
    return together.hexdigest()
