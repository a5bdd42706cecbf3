"""OUT.tuning: whose search it is, and that one command at a time is at it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from modekit.errors import OutputError, TuneError
from modekit.files.libraries import check_own
from modekit.files.lock import Lock
from modekit.files.marker import claim_work_folder, is_work_folder
from modekit.files.read import LARGE, UNREADABLE, read_bytes, read_json
from modekit.files.typed import read_as
from modekit.files.write import remove, sweep, write_json
from modekit.planning.plan import Plan
from modekit.search.tune.results import TuneSettings
from modekit.search.tune.study import SearchJob, damaged

_Kind = TypeVar("_Kind")
_SETTINGS_FILE = "settings.json"
_BUILT_FILE = "built.json"
_SUFFIX = ".tuning"


def folder_of(out: Path) -> Path:
    """Where the search for an output is kept."""
    return out.with_name(out.name + _SUFFIX)


def announce(out: Path, beside: Mapping[str, bytes]) -> None:
    """Say, before the best mixture is built, which files will lie beside it: a kill after that costs no more than a look."""
    write_json(folder_of(out) / _BUILT_FILE, {name: hashlib.sha256(content).hexdigest() for name, content in beside.items()})


def is_built(out: Path) -> bool:
    """Whether OUT is what a search that was killed later had announced."""
    folder = folder_of(out)
    if not is_work_folder(folder, "tuning", out.name):
        return False
    try:
        announced = read_json(folder / _BUILT_FILE)
        return bool(announced) and all(
            hashlib.sha256(read_bytes(out / name, LARGE)).hexdigest() == digest for name, digest in announced.items()
        )
    except (*UNREADABLE, AttributeError):
        return False


def close(out: Path) -> None:
    """The search is over and OUT is in its place."""
    remove(folder_of(out) / _BUILT_FILE)


class SearchIdentity(BaseModel, frozen=True):
    """What makes two searches the same: digests of recipe, space, models and text, and the settings that change losses."""

    recipe: str
    space: str
    native: bool
    tokens_per_domain: int
    sequence_length: int
    seed: int
    models: str
    text: str


def identity_of(job: SearchJob, settings: TuneSettings, native: bool, plan: Plan, text: str) -> SearchIdentity:
    """Of a search of a plan's models; it changes with size and time of their files. `text`: a digest of what is read."""
    settings_of = {source.folder: sorted(filter(Path.is_file, source.folder.glob("*.json"))) for source in plan.sources}
    files = ((each.label, file, file.stat()) for each in plan.sources for file in (*each.files, *settings_of[each.folder]))
    stats = [[label, file.name, stat.st_size, stat.st_mtime_ns] for label, file, stat in files]
    return SearchIdentity(
        recipe=job.recipe.digest(),
        space=hashlib.sha256(job.space.model_dump_json().encode()).hexdigest(),
        native=native,
        tokens_per_domain=settings.tokens_per_domain,
        sequence_length=settings.sequence_length,
        seed=settings.seed,
        models=hashlib.sha256(json.dumps(stats).encode()).hexdigest(),
        text=text,
    )


def claim(folder: Path, identity: SearchIdentity) -> None:
    """Make the work folder, or go on in that of the same search. Raises TuneError for another's."""
    if not claim_work_folder(folder, "tuning", folder.name.removesuffix(_SUFFIX)):
        raise OutputError(
            "a folder that modekit did not make is in the way", where=str(folder), remedy="move it away, or choose another OUT"
        )
    path = folder / _SETTINGS_FILE
    if not path.exists():
        write_json(path, identity.model_dump())
    known = read_kept(path, SearchIdentity)
    if known != identity:
        changed = [name for name, value in identity if getattr(known, name) != value]
        raise TuneError(
            "the folder holds another search",
            where=str(folder),
            found=f"other {', '.join(sorted(changed))}",
            remedy="remove the folder to start over, or choose another OUT",
        )


def read_kept(path: Path, kind: type[_Kind]) -> _Kind:
    """What a search has kept in a file of its folder. Raises TuneError where that is damaged."""
    try:
        return read_as(path, kind, LARGE)
    except UNREADABLE as error:
        raise damaged(path, error) from None


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Held while a command searches: another would take its candidates for those that a kill cut short."""
    lock = Lock(folder / "search.lock")
    if not lock.take():
        raise TuneError(
            "another command is at this search", where=str(folder), remedy="wait for it, or use --processes for more at once"
        )
    try:
        sweep(folder)
        check_own(folder)
        yield
    finally:
        lock.release()
