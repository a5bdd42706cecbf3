"""A glance at the texts of a recipe before anything is written: `plan` says what is wrong with one, as `build` does.

Small texts are read whole, by what reads them for the fit; of larger ones the beginning of some files. So a plan stays under a
second. Data sets of the hub are not asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from modekit.errors import TextError
from modekit.recipes.recipe import WRITTEN_FOLDER, Recipe
from modekit.sources.family import Reads
from modekit.text.document import text_of
from modekit.text.documents import bytes_of_text, check_beginnings, is_local
from modekit.text.held_out import DomainText, check_texts_present, fit_documents, read_text
from modekit.text.written import is_written

_WHOLE = 2**22  # bytes of a text that is read whole
_PACKED = 8  # as many bytes of text as this has one of a parquet file, about
_FEWEST_DOCUMENTS, _FEWEST_CHARACTERS = 10, 2_000  # of a text that says what its domain is


def check_texts(recipe: Recipe, root: Path, reads: Reads) -> list[str]:
    """What to say of the texts of a recipe whose base `reads` plain text or pairs.

    Raises TextError for a text that is not there, and for what is wrong with the part of it that is read.
    """
    check_texts_present(recipe, root)
    notes: list[str] = []
    writers: list[str] = []
    for place, expert in enumerate(recipe.experts):
        where = f"experts[{place}] '{expert.name}': text"
        if expert.writes_text and not is_written(expert, root):
            if reads == "pairs":
                raise TextError(
                    "a model with an encoder cannot write text of its own",
                    where=where,
                    found="self",
                    expected="pairs of source and target",
                    remedy="give parallel text",
                )
            writers.append(expert.name)
            continue
        text = _read(expert.texts, root, where)
        if recipe.mixture.needs_text and (text is not None or not expert.text):
            fit_documents(expert, root, place, reads=reads)
        if text is not None:
            notes += _too_little(expert.name, text)
    for domain, specs in recipe.eval.items():
        _read(specs, root, f"eval.{domain}")
    if writers:
        notes.append(f"{', '.join(writers)} will write text, into {WRITTEN_FOLDER}/ beside the recipe; real text is better")
    return notes


def _read(specs: Sequence[str], root: Path, where: str) -> DomainText | None:
    """A text, read whole; None where there is none, or it is too large for that. Raises TextError."""
    if not specs or not all(is_local(spec, root) for spec in specs):
        return None
    if sum(bytes_of_text([spec], root) * (_PACKED if spec.endswith(".parquet") else 1) for spec in specs) <= _WHOLE:
        return read_text(specs, root=root, where=where)
    check_beginnings(specs, root=root, where=where)
    return None


def _too_little(name: str, text: DomainText) -> Iterator[str]:
    characters = sum(len(text_of(document)) for document in text.documents)
    if len(text.documents) < _FEWEST_DOCUMENTS or characters < _FEWEST_CHARACTERS:
        yield (
            f"{name}: its text is {text.found} with {characters:,} characters, too little to learn a domain from: give at "
            f"least {_FEWEST_DOCUMENTS} documents and {_FEWEST_CHARACTERS:,} characters; hundreds of documents are better"
        )
