"""Held-out text that candidates are compared on, cut into rungs, and what the report shows (text/held_out.py)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from modekit.errors import TextError, TuneError
from modekit.evaluation.domains import Domain, domain_of
from modekit.evaluation.loss import score_domain
from modekit.loaded.load import load_tokenizer
from modekit.recipes.recipe import Recipe
from modekit.run import QUIET, Run
from modekit.text.held_out import HeldOutText, RecipeTexts
from modekit.text.splits import HeldOutSplit, digest_of, mark_of

RUNGS = (1, 3, 9)
"""Ninths of the text after which a candidate is compared with the others."""


@dataclass(frozen=True)
class Selection:
    """Text of every domain, the digests of its documents, and one digest of all that was read, whatever its split."""

    domains: Sequence[Domain]
    digests: Sequence[str]
    read: str

    def rung(self, number: int) -> list[Domain]:
        """What a rung adds to those before it; domains of which it adds nothing are left out."""
        return [each for domain in self.domains if (each := _part(domain, number)).sequences]


def _part(domain: Domain, number: int) -> Domain:
    count = len(domain.sequences)
    first = -(-count * RUNGS[number - 1] // RUNGS[-1]) if number else 0
    last = max(1, -(-count * RUNGS[number] // RUNGS[-1]))
    return Domain(domain.name, domain.expert, domain.sequences[first:last], domain.record)


def read_selections(
    recipe: Recipe,
    root: Path,
    model_folders: Sequence[Path],
    *,
    tokens_per_domain: int,
    sequence_length: int,
    run: Run = QUIET,
) -> dict[HeldOutSplit, Selection]:
    """Text of every domain that has an expert: what chooses, and what `modekit eval` will show of the mixture so chosen.

    `model_folders`: the base's first. Raises TextError when a domain has none.
    """
    tokenizer = load_tokenizer(model_folders[0], run=run)
    texts = RecipeTexts(recipe, root, models=model_folders)
    select = texts.select()
    if not select:
        raise TextError(
            "there is no text to choose by", where="experts[].text, eval", remedy="add text per expert: a search needs it"
        )
    chosen = [mark_of(document) for held in select for document in held.documents]
    report = [held for held in texts.report(seen=chosen) if held.expert is not None]
    read = _digest_of_all(select, report)
    splits: dict[HeldOutSplit, Sequence[HeldOutText]] = {"select": select, "report": report}
    found: dict[HeldOutSplit, Selection] = {}
    for split, every in splits.items():
        domains = []
        for held in every:
            domains.append(domain_of(held, tokenizer, tokens_per_domain=tokens_per_domain, sequence_length=sequence_length))
            if held.documents and not domains[-1].sequences:
                raise held.text.none_fits(held.documents, sequence_length, most=tokens_per_domain)
            if not domains[-1].sequences:
                raise held.text.nothing_left(
                    f"no document of the {split} split is left",
                    expected="one document in ten is for choosing between variants, one in ten for the report",
                )
        found[split] = Selection(domains, [mark_of(document) for held in every for document in held.documents], read)
    return found


def _digest_of_all(select: Sequence[HeldOutText], report: Sequence[HeldOutText]) -> str:
    """Of every document of the texts, whatever its split."""
    read = hashlib.sha256()
    for chosen, shown in zip(select, report, strict=True):
        for text in [chosen.text, *([shown.text] if shown.text is not chosen.text else [])]:
            read.update("".join([chosen.name, *map(digest_of, text.documents)]).encode())
    return read.hexdigest()


def losses_of(model: PreTrainedModel, domains: Sequence[Domain], where: str) -> dict[str, float]:
    """Domain -> nats per token. Raises TuneError when that is not a number."""
    losses = {domain.name: score_domain(model, domain, lambda _: None).loss for domain in domains}
    for name, loss in losses.items():
        if loss != loss:
            raise TuneError(
                "the loss is not a number",
                where=f"{where}, domain {name}",
                remedy="look for NaN in the models with `modekit build`, which checks every tensor",
            )
    return losses
