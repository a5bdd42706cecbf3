"""What `modekit data balance` kept and dropped, as balance.json and balance.md have it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from modekit.evaluation.markdown import markdown_table

JSON_FILE, MARKDOWN_FILE = "balance.json", "balance.md"
Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


class BalanceSettings(BaseModel, frozen=True):
    """Attributes:
    max_diff_percent: largest 100 (largest - smallest) / smallest of the domains' totals of tokens, in every split.
    common: only documents that every domain has, by their id.
    validation: share of the documents that is held out; 0 for none.
    max_tokens: limit of tokens per domain, both splits together.
    seed: random seed of the order in which documents are chosen.
    """

    max_diff_percent: float = 5.0
    common: bool = False
    validation: float = 0.1
    max_tokens: int | None = None
    seed: int = 0

    def share(self, split: Split) -> float:
        """Share of the documents that a split has."""
        return self.validation if split == "validation" else 1 - self.validation


class Amount(BaseModel, frozen=True):
    """So much text."""

    documents: int = 0
    tokens: int = 0

    def __sub__(self, other: Amount) -> Amount:
        return Amount(documents=self.documents - other.documents, tokens=self.tokens - other.tokens)


class DomainShare(BaseModel, frozen=True):
    """A domain's share of a split.

    Attributes:
        found: what there was, without duplicates.
        kept: what is in the file.
        not_common: of `found` what some other domain lacks; nothing without `common`.
        over: what was dropped because the domains would have been too far apart with it.
        dropped: share of the tokens found that is not kept.
        sha256: of the file.
    """

    found: Amount
    kept: Amount
    not_common: Amount
    over: Amount
    dropped: float
    sha256: str


class BalancedDomain(BaseModel, frozen=True):
    """A domain: its name, its text as it was named, documents that did not count, and its share of each split."""

    name: str
    text: str
    duplicates: int
    without_tokens: int
    train: DomainShare
    validation: DomainShare | None

    def share(self, split: Split) -> DomainShare | None:
        """Of a split; None of one that there is not."""
        return self.train if split == "train" else self.validation


class CountingTokenizer(BaseModel, frozen=True):
    """What counted the tokens."""

    name: str
    sha256: str


class Balanced(BaseModel, frozen=True):
    """A balanced corpus.

    Attributes:
        diff_percent: per split 100 (largest - smallest) / smallest of the domains' totals of tokens.
        sha256: of the digests of all files.
    """

    format: int = 1
    settings: BalanceSettings
    tokenizer: CountingTokenizer
    diff_percent: dict[Split, float]
    domains: list[BalancedDomain]
    sha256: str

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows: per split and domain what was kept and what was dropped."""
        common = ["not common"] if self.settings.common else []
        rows = []
        for split in self.diff_percent:
            for domain in self.domains:
                share = domain.share(split)
                if share is not None:
                    cells = [f"{share.kept.documents:,}", f"{share.kept.tokens:,}", f"{share.dropped:.1%}"]
                    cells += [f"{share.not_common.documents:,}" for _ in common]
                    rows.append([split, domain.name, *cells, f"{share.over.documents:,}"])
        return ["split", "domain", "documents", "tokens", "dropped", *common, "over the cap"], rows

    def differences(self) -> str:
        """How far the domains are apart, in words."""
        return ", ".join(f"{split} {percent:.2f} %" for split, percent in self.diff_percent.items())

    def notes(self) -> list[str]:
        """Which documents did not count, and why."""
        notes = []
        for domain in self.domains:
            if domain.duplicates:
                notes.append(
                    f"{domain.name}: {domain.duplicates:,} documents were there before, letter for letter, and count once"
                )
            if domain.without_tokens:
                notes.append(f"{domain.name}: the tokenizer makes no token of {domain.without_tokens:,} documents")
        return notes

    def as_markdown(self) -> str:
        """The content of balance.md."""
        lines = ["# A balanced corpus", "", f"Tokens of {self.tokenizer.name}. Largest difference between two domains: "]
        lines[-1] += f"{self.differences()}; limit: {self.settings.max_diff_percent:g} %."
        lines += ["", markdown_table(*self.table()), "", *(f"* {note}" for note in self.notes())]
        return "\n".join([*lines, *([""] if self.notes() else []), f"sha256 {self.sha256}", ""])
