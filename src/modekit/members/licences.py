"""What a mixture's sources say of their licences: read from their own folders, nothing judged.

A model's README.md with front matter counts first, then a licence file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.files.read import UNREADABLE, read_text
from modekit.recipes.read import parse_yaml

NONE_FOUND = "no licence found"
_LARGEST = 2**20  # bytes of a README; more is not one
_LONGEST_MATTER = 2**16  # characters of front matter: YAML is read slowly
_LICENCE_ID = re.compile(r"[a-z0-9][a-z0-9.-]*")
_FRONT_MATTER = re.compile(r"^---[ \t]*\r?\n(.*?)\r?\n---[ \t]*\r?(\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """A model of a mixture. `licence`: an id of the hub, what other terms are called, or that none was found."""

    used_as: str
    spec: str
    revision: str | None
    licence: str
    found_in: str


def sources_of(checkpoint: Checkpoint) -> list[Source]:
    """Every model that a mixture was made from, in the order of modekit.json."""
    record = checkpoint.record
    sources = []
    for place, source in enumerate(record.sources):
        names = [name for name, own in zip(checkpoint.names, record.expert_sources, strict=True) if own == place]
        used_as = ", ".join([*(["base model"] if place == 0 else []), *(f"expert {name}" for name in names)])
        licence, found_in = licence_of(checkpoint.source_folder(source))
        sources.append(Source(used_as, source.spec, source.revision, licence, found_in))
    return sources


def facts(sources: Sequence[Source]) -> list[str]:
    """What has to be known of the licences together, in sentences; none when all say one and the same."""
    used_by_licence: dict[str, list[str]] = {}
    for source in sources:
        used_by_licence.setdefault(source.licence, []).append(source.used_as)
    told = {licence: ", ".join(used) for licence, used in used_by_licence.items()}
    found = []
    if len(told) > 1:
        found.append(f"the sources' licences differ ({'; '.join(f'{licence}: {used}' for licence, used in told.items())})")
    if NONE_FOUND in told:
        found.append(f"no licence was found for {told[NONE_FOUND]}")
    return found


def licence_of(folder: Path) -> tuple[str, str]:
    """The licence that a model's own files say, and where that stands."""
    matter = front_matter(folder / "README.md")
    said = _strings(matter.get("license"))
    if said and said != ["unknown"]:
        if len(said) == 1 and is_licence_id(said[0].lower()):
            return said[0].lower(), "README.md"
        named = _strings(matter.get("license_name")) or said
        return ("other" if named == ["other"] else f"other ({' and '.join(named)})"), "README.md"
    try:
        names = sorted(path.name for path in folder.iterdir() if re.match(r"(?i)(licen[cs]e|copying)", path.name))
    except OSError:
        return NONE_FOUND, "the folder is missing"
    return ("other", names[0]) if names else (NONE_FOUND, "neither README.md nor a licence file names one")


def is_licence_id(licence: str) -> bool:
    """Whether a licence is known by its id on the hub, where `other` stands for all that have none."""
    return licence != "other" and _LICENCE_ID.fullmatch(licence) is not None


def front_matter(readme: Path) -> dict[str, object]:
    """The YAML at the head of a README; empty when there is none that can be read."""
    try:
        text = read_text(readme, _LARGEST).removeprefix("\ufeff").replace("\r\n", "\n")
        matched = _FRONT_MATTER.match(text[:_LONGEST_MATTER])
        data = parse_yaml(matched[1], readme.name) if matched else None
    except UNREADABLE:
        data = None
    return data if isinstance(data, dict) else {}


def _strings(value: object) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [each for each in values if isinstance(each, str) and each]
