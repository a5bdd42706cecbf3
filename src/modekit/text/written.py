"""Text that experts wrote themselves (`text: self`): where it lies beside the recipe, and what made it.

Below the recipe's folder are self-text/NAME-<8 hex>.jsonl, the documents (the model's spec in the recipe gives both parts of
the name), and self-text/NAME-<8 hex>.jsonl.json, what made them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field

from modekit.errors import OutputError, TextError
from modekit.files.change import change_together
from modekit.files.marker import read_marker
from modekit.files.read import UNREADABLE
from modekit.files.typed import Count, Digest, Label, Number, read_as
from modekit.files.write import json_bytes, make_folder, remove, write_file
from modekit.recipes.recipe import Expert, Recipe
from modekit.recipes.strict import WRITTEN_FOLDER
from modekit.text.documents import stream_records
from modekit.text.records import ID, TextRecord, data_of

_LONGEST_STEM = 64
_MOST_DOCUMENTS, _FEWEST_DOCUMENTS = 192, 64
"""That an expert writes; more add little (benchmarks/self_text.md)."""
_DOCUMENT_WEIGHTS = 13_000_000_000
"""Documents times weights of the base: of a larger model fewer, since they take minutes."""
DOCUMENT_TOKENS = 96
QUESTION_TOKENS, ANSWER_TOKENS = 32, 64
BEGUN_TOKENS = 12
"""That the base writes of some documents, for the expert to go on from: it begins what the expert alone never would."""
BEGUN = 3
"""Of so many batches the last is of such documents, and in the second an expert writes as it is."""
CHATS = 4
"""One document of so many is a question and its answer, where there is a chat template."""
_FEWEST_WRITTEN = 8
"""Documents that are not empty: with fewer, no router is set."""
WAY = 3
"""Goes up by one when the numbers here, or those in loaded/sampling.py, change what is written."""
AGAINST = 1.0
"""Weight of what sets an expert apart from the base while it writes."""


class Made(BaseModel, frozen=True, extra="forbid"):
    """What decides a written text.

    Attributes:
        tokens: the most of one document.
        way: number of modekit's way of writing, WAY.
        against: weight of the difference to the base's log-probabilities, 0 for the base itself.
        models: file of base and expert -> its blake3, or the sha256 of its settings; template: sha256 of the chat template.
    """

    tokens: Count
    way: Count
    against: Number
    seed: Count
    models: Annotated[Mapping[Label, Digest], Field(max_length=2**12)]
    template: Digest = ""


class Written(BaseModel, frozen=True, extra="forbid"):
    """A text as it lies there: so many `documents` were sampled, and so many `texts` of them are not empty. Who wants more goes
    on from there.

    `expected`: how often the expert expects every token behind those of what the base writes, float32 in base64.
    """

    made: Made
    documents: Count
    texts: Count
    expected: str = ""


def documents_of(weights: int) -> int:
    """How many an expert writes whose base has so many weights."""
    return max(_FEWEST_DOCUMENTS, min(_MOST_DOCUMENTS, _DOCUMENT_WEIGHTS // max(1, weights)))


def texts_of(expert: Expert) -> list[str]:
    """Its text as paths and data sets: of what it writes itself the file beside the recipe, which its model names."""
    if not expert.writes_text:
        return expert.text or []
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", expert.source.rstrip("/").rpartition("/")[2])[:_LONGEST_STEM].lstrip(".-")
    which = hashlib.sha256(f"{expert.source}\0{expert.revision or ''}".encode()).hexdigest()[:8]
    return [f"./{WRITTEN_FOLDER}/{name or 'expert'}-{which}.jsonl"]


def written_file(expert: Expert, root: Path) -> Path:
    """Where the documents of an expert lie that writes its text."""
    return root / texts_of(expert)[0]


def read_written(file: Path) -> Written | None:
    """What is known of a written text; None where there is none, or nothing that can be read."""
    try:
        return read_as(_about(file), Written)
    except (*UNREADABLE, ValueError):
        return None


def written_so_far(file: Path, made: Made) -> tuple[list[TextRecord], int]:
    """The documents of a text that the same settings and models made, and how many were sampled for them; else none."""
    known = read_written(file)
    if known is None or known.made != made or not file.is_file():
        return [], 0
    records = list(stream_records([str(file)], root=file.parent, where=str(file)))
    counted = [each for each in records if (each.id or "").isdecimal() and int(each.id or 0) < known.documents]
    return counted, known.documents


def keep_written(file: Path, made: Made, records: Sequence[TextRecord], documents: int, expected: bytes) -> None:
    """Write a text and then its record, each whole; a record that another text had goes first. Raises OutputError.

    In a checkpoint both are noted as modekit's own.
    """
    lines = (json.dumps({ID: record.id, **data_of(record.document)}, ensure_ascii=False) for record in records)
    text = "".join(f"{line}\n" for line in lines).encode()
    said = base64.b64encode(expected).decode()
    about = json_bytes(Written(made=made, documents=documents, texts=len(records), expected=said).model_dump(mode="json"))
    folder, known = file.parent.parent, read_written(file)
    marker = read_marker(folder)
    try:
        if marker is not None and marker.kind == "checkpoint":
            names = (each.relative_to(folder).as_posix() for each in (file, _about(file)))
            change_together(folder, dict(zip(names, (text, about), strict=True)))
            return
        make_folder(file.parent)
        if known is None or known.made != made:
            remove(_about(file))
        write_file(file, text)
        write_file(_about(file), about)
    except OSError as error:
        raise OutputError(
            "the text that an expert wrote cannot be kept beside the recipe",
            where=str(file),
            found=error.strerror or error,
            remedy="make room, or put the recipe into a folder that you may write to; the build then continues",
        ) from None


def files_of(recipe: Recipe, root: Path) -> Iterator[Path]:
    """What is kept of the texts that the experts of a recipe wrote."""
    for expert in recipe.experts:
        if expert.writes_text:
            file = written_file(expert, root)
            yield from (each for each in (file, _about(file)) if each.is_file())


def _about(file: Path) -> Path:
    return file.with_name(f"{file.name}.json")


def check_written(expert: Expert, root: Path, where: str) -> None:
    """Raise TextError where an expert writes its text itself, and that is not there or too little."""
    if not expert.writes_text:
        return
    file = written_file(expert, root)
    if not file.is_file():
        raise TextError(
            "the text that this expert writes itself is not there",
            where=where,
            found=str(file),
            remedy="`modekit build` of this recipe, or `modekit fit` of its mixture, writes it, if its fit reads text",
        )
    if (known := read_written(file)) and known.texts < min(_FEWEST_WRITTEN, known.documents):
        raise TextError(
            "this expert wrote too little text to learn its domain from",
            where=where,
            found=f"{known.texts} of {known.documents} documents have text",
            remedy="give it real text (`text: FILE` in the recipe, `mix --text NAME=FILE`)",
        )


def little_written(recipe: Recipe, root: Path) -> Iterator[str]:
    """Who wrote how little: experts of whose documents most are empty."""
    for expert in (each for each in recipe.experts if each.writes_text):
        if (known := read_written(written_file(expert, root))) and 2 * known.texts < known.documents:
            yield f"{expert.name} wrote only {known.texts} of {known.documents} documents, the others are empty; give real text"


def written_notes(recipe: Recipe, root: Path) -> Iterator[str]:
    """What has to be said of a result that was measured on text which experts wrote themselves."""
    given = [expert for expert in recipe.experts if expert.writes_text and expert.name not in recipe.eval]
    for expert in given:
        if known := read_written(written_file(expert, root)):
            yield f"text written by {expert.name}: {known.texts} documents of at most {known.made.tokens} tokens"
    if given:
        names = ", ".join(expert.name for expert in given)
        yield (
            f"no real text of {names}: there the figures show how far the mixture agrees with the own expert on what that "
            "wrote, not how good it is; `modekit eval OUT --text NAME=FILE` scores real text"
        )
