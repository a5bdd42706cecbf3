"""OUT/results: a class for each file there, by which it is written, read back, printed and reported."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeVar

from pydantic import JsonValue

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.evaluation.tables import ResultTable, markdown_page
from modekit.files.change import change_together
from modekit.files.json import parse_json
from modekit.files.read import LARGE, UNREADABLE, read_bytes, read_json
from modekit.files.typed import adapter_of, as_kind, shortened
from modekit.files.user_cache import is_proven_here, keep_proven
from modekit.files.write import json_bytes

RESULTS_FOLDER = "results"
_Kind = TypeVar("_Kind", bound="Result")


@dataclass(frozen=True)
class Result(ABC):
    """What a command found out about a checkpoint: its fields are the keys of `file`, and FILE.md shows them to people.

    A part of it that has another key in the file, or other digits, says so in its annotation.
    """

    file: ClassVar[str]
    command: ClassVar[str]
    expected: ClassVar[bool] = False
    """Whether everybody runs the command, so that a report says when nobody did."""

    notes: Sequence[str] = field(default=(), kw_only=True)
    """What a reader has to know."""
    checkpoint: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    """`Checkpoint.identity` of what it was found out about."""

    @abstractmethod
    def tables(self) -> list[ResultTable]:
        """Everything that it shows, the main table first."""

    def markdown(self) -> str:
        """For people to read in a file."""
        return markdown_page(self.tables(), self.notes)

    def belongs_to(self, checkpoint: Checkpoint) -> bool:
        """Whether it was found out about this checkpoint as it is now: models, router, recipe and tokenizer."""
        return self.checkpoint == checkpoint.identity

    def as_data(self) -> dict[str, JsonValue]:
        """Plain data for JSON."""
        data: dict[str, JsonValue] = adapter_of(type(self)).dump_python(self, mode="json", by_alias=True)
        return data

    def as_json(self) -> bytes:
        """As it is written."""
        return json_bytes(self.as_data())

    @classmethod
    def from_data(cls: type[_Kind], data: object) -> _Kind:
        """Back from `as_data`. Raises ValueError for anything else, and for parts that do not fit together."""
        found = as_kind(data, cls)
        try:
            found.tables()
        except LookupError as error:
            raise ValueError(f"its parts do not fit together: {shortened(error)}") from None
        return found

    def write(self, checkpoint: Checkpoint) -> None:
        """Write both files, together, and keep that they are this user's own. Raises OSError and OutputError."""
        page, content = Path(self.file).with_suffix(".md").name, self.as_json()
        write_results(checkpoint, {self.file: content, page: self.markdown().encode()})
        keep_proven(_claim(self.file, content))

    @classmethod
    def read(cls: type[_Kind], checkpoint: Checkpoint) -> _Kind:
        """What lies in the checkpoint, whatever it was made of. Raises OSError and ValueError."""
        return cls.from_data(read_json(results_path(checkpoint, cls.file), LARGE))

    @classmethod
    def written_here(cls: type[_Kind], checkpoint: Checkpoint) -> _Kind | None:
        """What lies in the checkpoint, if this user's modekit wrote that very file, as this version does.

        A file that somebody else brought is shown as what it says (`modekit report`), but no score of it is taken over.
        """
        try:
            content = read_bytes(results_path(checkpoint, cls.file), LARGE)
            return cls.from_data(parse_json(content.decode())) if is_proven_here(_claim(cls.file, content)) else None
        except UNREADABLE:
            return None

    @classmethod
    def find(cls: type[_Kind], checkpoint: Checkpoint, problems: list[str] | None = None) -> _Kind | None:
        """What lies there of this checkpoint as it is now; None without it. `problems` gets the reason."""
        said: list[str] = [] if problems is None else problems
        if not cls.expected and not os.path.lexists(results_path(checkpoint, cls.file)):
            return None
        try:
            found = cls.read(checkpoint)
        except FileNotFoundError:
            said.append(f"there is no {cls.file}: run `{cls.command}`")
        except UNREADABLE as error:
            said.append(f"{cls.file} is damaged or of another version ({shortened(error)}): run `{cls.command}`")
        else:
            if found.belongs_to(checkpoint):
                return found
            changed = "models, router, recipe, tokenizer or training changed since"
            said.append(f"{cls.file} is of another state of this mixture ({changed}): run `{cls.command}` again")
        return None


def _claim(file: str, content: bytes) -> str:
    return f"{file} {hashlib.sha256(content).hexdigest()}"


def results_path(checkpoint: Checkpoint, file: str) -> Path:
    """Where a file of results lies."""
    return checkpoint.folder / RESULTS_FOLDER / file


def write_results(checkpoint: Checkpoint, files: Mapping[str, bytes], *, all_of: str | None = None) -> None:
    """Write files into OUT/results, all together; `all_of` names a folder there of which no others are to stay. Raises OSError
    and OutputError.
    """
    inside = {f"{RESULTS_FOLDER}/{name}": content for name, content in files.items()}
    change_together(checkpoint.folder, inside, remove_in=f"{RESULTS_FOLDER}/{all_of}" if all_of else None)
