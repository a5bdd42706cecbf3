"""Held-out text that candidates are compared on: the `select` split, cut into rungs.

Nothing of it is ever in the report split; what a recipe names under `eval` is split by the same hashes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from modekit.errors import TextError, TuneError
from modekit.evaluation.evaluate import Domain, score_domain
from modekit.loaded.models import load_tokenizer
from modekit.recipes.recipe import Recipe
from modekit.text.documents import read_documents
from modekit.text.sequences import TokenSequence, encode
from modekit.text.splits import TRAINED_DIGITS, TRAINED_FILE, Split, digest_of, digests_in, documents_of_split, text_record

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


def read_selection(
    recipe: Recipe, root: Path, model_folders: Sequence[Path], *, split: Split, tokens_per_domain: int, sequence_length: int,
    trust_remote_code: bool = False,
) -> Selection:  # fmt: skip
    """Text of one split of every domain that has an expert. `model_folders`: the base's first; documents that
    `modekit specialize` trained on, and prompts that set routers, are left out.

    Raises TextError when a domain has none.
    """
    tokenizer = load_tokenizer(model_folders[0], trust_remote_code=trust_remote_code)
    used = {digest for folder in model_folders for digest in digests_in(folder / TRAINED_FILE)}
    used |= {digest_of(prompt)[:TRAINED_DIGITS] for expert in recipe.experts for prompt in expert.prompts or []}
    domains, digests = [], []
    read = hashlib.sha256()
    for place, expert in enumerate(recipe.experts):
        specs = expert.text or recipe.eval.get(expert.name)
        if specs is None:
            continue
        where = f"experts[{place}] '{expert.name}': text" if expert.text else f"eval.{expert.name}"
        everything = read_documents(specs, root=root, where=where)
        read.update("".join([expert.name, *map(digest_of, everything)]).encode())
        documents = documents_of_split(everything, split)
        documents = [document for document in documents if digest_of(document)[:TRAINED_DIGITS] not in used]
        sequences: list[TokenSequence] = encode(
            tokenizer, documents, max_tokens=tokens_per_domain, sequence_length=sequence_length
        )
        if not sequences:
            raise TextError(
                f"no document of the {split} split is left", where=where, found=f"{len(documents)} documents",
                expected="one document in ten is for choosing between variants, one in ten for the report",
                remedy="give more documents",
            )  # fmt: skip
        digests += [digest_of(document)[:TRAINED_DIGITS] for document in documents]
        record = text_record(documents, sum(len(sequence.ids) for sequence in sequences))
        domains.append(Domain(expert.name, place, sequences, {**record, "sequence_length": sequence_length}))
    if not domains:
        raise TextError(
            "there is no text to choose by", where="experts[].text, eval", remedy="add text per expert: a search needs it"
        )
    return Selection(domains, digests, read.hexdigest())


class Tally:
    """Loss of one candidate, summed over the rungs so far."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._tokens: dict[str, int] = {}

    def add(self, model: PreTrainedModel, domains: Sequence[Domain], where: str) -> None:
        """Score some text. Raises TuneError when the loss is not a number."""
        for domain in domains:
            loss = score_domain(model, domain, lambda _: None).loss
            if loss != loss:
                raise TuneError(
                    "the loss is not a number", where=f"{where}, domain {domain.name}",
                    remedy="look for NaN in the models with `modekit build`, which checks every tensor",
                )  # fmt: skip
            self._sums[domain.name] = self._sums.get(domain.name, 0.0) + loss * domain.scored_tokens
            self._tokens[domain.name] = self._tokens.get(domain.name, 0) + domain.scored_tokens

    @property
    def losses(self) -> dict[str, float]:
        """Nats per token, per domain."""
        return {name: self._sums[name] / self._tokens[name] for name in self._sums}

    @property
    def mean(self) -> float:
        """Over the domains, each counting equally."""
        return sum(self.losses.values()) / len(self.losses)

    @property
    def tokens(self) -> int:
        """Scored so far."""
        return sum(self._tokens.values())
