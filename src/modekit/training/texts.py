"""Which text a training reads: fit documents to move by, select documents to compare states by; the rest is for the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.errors import TextError
from modekit.evaluation.evaluate import Domain
from modekit.loaded.models import load_tokenizer
from modekit.text.documents import read_documents
from modekit.text.sequences import TokenSequence, encode
from modekit.text.splits import TRAINED_DIGITS, digest_of, documents_of_split, text_record
from modekit.training.batches import Corpus
from modekit.training.losses import GENERIC
from modekit.training.settings import TrainSettings

GENERIC_NAME = "(generic)"  # no expert can be named so
_SHORTEST = 4  # a rest of a document shorter than a quarter of a sequence would mostly be padding


@dataclass(frozen=True)
class Text:
    """Documents of one domain that are trained on and selected by, as sequences; digests of both, and what the record says."""

    corpus: Corpus
    select: Sequence[TokenSequence]
    trained_on: list[str]
    selected_by: list[str]
    record: dict[str, Any]

    @property
    def held_out(self) -> Domain:
        """What states are compared on."""
        return Domain(self.corpus.name, self.corpus.expert, self.select, {})


def read_texts(
    checkpoint: Checkpoint, settings: TrainSettings, texts: Mapping[str, Sequence[str]], root: Path, *, trust_remote_code: bool
) -> list[Text]:
    """Text of every domain, in recipe order, then generic text.

    `texts`, relative to `root`, counts more than the recipe's. Experts with neither are left out. Raises TextError.
    """
    recipe = checkpoint.record.recipe
    unknown = [name for name in texts if name not in recipe.names]
    if unknown:
        raise TextError(
            "there is no expert for this domain", where=f"--text {unknown[0]}=...", expected=", ".join(recipe.names),
            remedy="name a domain of the mixture; text of no domain goes under generic",
        )  # fmt: skip
    tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code=trust_remote_code)

    def read(name: str, expert: int, specs: Sequence[str], place: Path, where: str) -> Text:
        documents = read_documents(specs, root=place, where=where)
        fit = [document for document in documents_of_split(documents, "fit") if _is_in_share(document, settings.share)]
        select = documents_of_split(documents, "select")
        length = settings.sequence_length
        sequences = encode(tokenizer, fit, max_tokens=2**62, sequence_length=length, shortest_rest=length // _SHORTEST)
        held_out = encode(tokenizer, select, max_tokens=settings.select_tokens, sequence_length=length)
        for found, what in ((sequences, "training"), (held_out, "comparing states")):
            if not found:
                raise TextError(
                    f"no document is left for {what}", where=where, found=f"{len(documents)} documents",
                    expected="eight in ten are trained on, one in ten is for comparing, one in ten for the tables",
                    remedy="give more documents" if settings.share == 1.0 else "give more documents, or raise share",
                )  # fmt: skip
        corpus = Corpus(name, expert, sequences)
        return Text(corpus, held_out, _digests(fit), _digests(select), text_record(fit, corpus.tokens))

    found = []
    for place, expert in enumerate(recipe.experts):
        if expert.name in texts:
            found.append(read(expert.name, place, texts[expert.name], root, f"--text {expert.name}"))
        elif expert.text:
            where = f"experts[{place}] '{expert.name}': text"
            found.append(read(expert.name, place, expert.text, checkpoint.recipe_root, where))
    if not found:
        raise TextError(
            "there is no text to train on", where="experts[].text, --text", remedy="give --text domain=FILE for every domain"
        )
    if settings.generic:
        found.append(read(GENERIC_NAME, GENERIC, settings.generic, root, "generic"))
    return found


def silent_domains(checkpoint: Checkpoint, texts: Sequence[Text]) -> list[str]:
    """Experts of whose domain there is no text."""
    known = {text.corpus.expert for text in texts}
    return [name for place, name in enumerate(checkpoint.names) if place not in known]


def _digests(documents: Sequence[str]) -> list[str]:
    return [digest_of(document)[:TRAINED_DIGITS] for document in documents]


def _is_in_share(document: str, share: float) -> bool:
    """Whether a document belongs to a share of them that its hash alone decides (other digits than those of the splits)."""
    return int(digest_of(document)[8:16], 16) < share * 2**32
