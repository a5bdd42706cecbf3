"""What was kept and what was dropped: balance.json and balance.md."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from modekit.evaluation.markdown import markdown_table
from modekit.experts.corpus.choose import diff_percent
from modekit.experts.corpus.settings import BalanceSettings

FORMAT = 1
JSON_FILE, MARKDOWN_FILE = "balance.json", "balance.md"
Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


@dataclass(frozen=True)
class Amount:
    """So much text."""

    documents: int = 0
    tokens: int = 0

    def less(self, *others: Amount) -> Amount:
        """What is left of it without others."""
        documents, tokens = (sum(getattr(other, name) for other in others) for name in ("documents", "tokens"))
        return Amount(self.documents - documents, self.tokens - tokens)

    def as_data(self) -> dict[str, int]:
        """Plain data for JSON."""
        return {"documents": self.documents, "tokens": self.tokens}


@dataclass
class Part:
    """A domain's share of a split.

    Attributes:
        found: what there was, without duplicates.
        not_common: of it what some other domain lacks; nothing where domains are apart.
        kept: what is in the file.
        sha256: of the file.
    """

    found: Amount
    not_common: Amount
    kept: Amount
    sha256: str = ""

    @property
    def over(self) -> Amount:
        """What was dropped because the domains would have been too far apart with it."""
        return self.found.less(self.not_common, self.kept)

    @property
    def dropped(self) -> float:
        """Share of the tokens that is not kept."""
        return 1 - self.kept.tokens / self.found.tokens

    def as_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "found": self.found.as_data(),
            "kept": self.kept.as_data(),
            "not_common": self.not_common.as_data(),
            "over": self.over.as_data(),
            "dropped": round(self.dropped, 6),
            "sha256": self.sha256,
        }


@dataclass
class BalancedDomain:
    """A domain: what its text is called, what was no document of it, and its share of each split."""

    name: str
    text: str
    duplicates: int
    silent: int
    parts: dict[Split, Part] = field(default_factory=dict)

    def as_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "name": self.name,
            "text": self.text,
            "duplicates": self.duplicates,
            "without_tokens": self.silent,
            **{split: part.as_data() for split, part in self.parts.items()},
        }


@dataclass
class Balanced:
    """Everything that is said of a corpus; `tokenizer` is its name, and a digest of it."""

    settings: BalanceSettings
    tokenizer: Mapping[str, str]
    domains: Sequence[BalancedDomain]

    @property
    def splits(self) -> list[Split]:
        """Those that there are."""
        return [split for split in SPLITS if split in self.domains[0].parts]

    def diff_percent(self, split: Split) -> float:
        """100 (largest - smallest) / smallest of the domains' totals."""
        return diff_percent([domain.parts[split].kept.tokens for domain in self.domains])

    @property
    def sha256(self) -> str:
        """Of the files of all domains, in their order."""
        files = "".join(domain.parts[split].sha256 for split in self.splits for domain in self.domains)
        return hashlib.sha256(files.encode()).hexdigest()

    def as_data(self) -> dict[str, Any]:
        """Plain data for JSON: what balance.json says."""
        return {
            "format": FORMAT,
            "settings": self.settings.as_data(),
            "tokenizer": dict(self.tokenizer),
            "diff_percent": {split: round(self.diff_percent(split), 4) for split in self.splits},
            "domains": [domain.as_data() for domain in self.domains],
            "sha256": self.sha256,
        }

    def as_markdown(self) -> str:
        """What balance.md says."""
        header, rows = table_of(self)
        asked = f"{self.settings.max_diff_percent:g} %"
        found = ", ".join(f"{split} {self.diff_percent(split):.2f} %" for split in self.splits)
        return "\n".join(
            [
                "# A balanced corpus",
                "",
                f"Tokens of {self.tokenizer['name']}. Largest difference between two domains: {found}; asked for: {asked}.",
                "",
                markdown_table(header, rows),
                "",
                *([*(f"* {note}" for note in notes_of(self)), ""] if notes_of(self) else []),
                f"sha256 {self.sha256}",
                "",
            ]
        )


def table_of(balanced: Balanced) -> tuple[list[str], list[list[str]]]:
    """Header and rows: per split and domain what was kept and what was dropped."""
    common = balanced.settings.common
    header = ["split", "domain", "documents", "tokens", "dropped", *(["not common"] if common else []), "over the cap"]
    rows = []
    for split in balanced.splits:
        for domain in balanced.domains:
            part = domain.parts[split]
            over = [f"{part.not_common.documents:,}"] if common else []
            cells = [f"{part.kept.documents:,}", f"{part.kept.tokens:,}", f"{part.dropped:.1%}", *over]
            rows.append([split, domain.name, *cells, f"{part.over.documents:,}"])
    return header, rows


def notes_of(balanced: Balanced) -> list[str]:
    """What was no document, and what one domain costs the others."""
    notes = []
    for domain in balanced.domains:
        if domain.duplicates:
            notes.append(f"{domain.name}: {domain.duplicates:,} documents were there before, letter for letter, and count once")
        if domain.silent:
            notes.append(f"{domain.name}: the tokenizer makes no token of {domain.silent:,} documents")
    return notes
