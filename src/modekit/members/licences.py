"""What a mixture's sources say of their licences: read from their own folders, nothing judged.

A model's README.md with front matter counts first, then a licence file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.record import SourceRecord
from modekit.files.read import UNREADABLE, read_text
from modekit.recipes.paths import locate
from modekit.recipes.read import parse_yaml

NONE_FOUND = "no licence found"
_LARGEST = 2**20  # bytes of a README or licence file; more is not one
_LONGEST_MATTER = 2**16  # characters of front matter: YAML is read slowly
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?\Z")
_LICENCE_ID = re.compile(r"^[a-z0-9][a-z0-9.-]*\Z")
_FRONT_MATTER = re.compile(r"^---[ \t]*\r?\n(.*?)\r?\n---[ \t]*\r?(\n|\Z)", re.DOTALL)
_KINDS = (
    ("non-commercial use only", re.compile(r"(^|-)nc(-|$)|non-?commercial")),
    ("share-alike (what is made of it goes under the same licence)", re.compile(r"(^|-)sa(-|$)|^a?gpl|^lgpl|^osl|^eupl|^odbl")),
    ("no derivatives", re.compile(r"(^|-)nd(-|$)")),
    ("terms of its own, to be read", re.compile(r"^other$|^llama|^gemma|rail|research|community|^deepfloyd|^apple-")),
)
"""What a licence's id says of it."""


@dataclass(frozen=True)
class Source:
    """One model of a mixture: who it is and what its own files say: the hub's id of the licence, "other" or None (nothing was
    found), and where that stands.
    """

    used_as: tuple[str, ...]
    spec: str
    hub_id: str | None
    revision: str | None
    licence: str | None
    licence_name: str | None
    licence_link: str | None
    said_by: str

    @property
    def said(self) -> str:
        """The licence in a word or two."""
        if self.licence == "other" and self.licence_name:
            return f"other ({self.licence_name})"
        return self.licence or NONE_FOUND


def sources_of(checkpoint: Checkpoint) -> list[Source]:
    """Every model that a mixture was made from, in the order of modekit.json."""
    record = checkpoint.record
    sources = []
    for place, source in enumerate(record.sources):
        names = [name for name, own in zip(checkpoint.names, record.expert_sources, strict=True) if own == place]
        used_as = (*(["base model"] if place == 0 else []), *(f"expert {name}" for name in names))
        sources.append(licence_of(source, used_as, checkpoint))
    return sources


def facts(sources: Sequence[Source]) -> list[str]:
    """What has to be known of the licences together, one plain sentence each; none when all say one and the same."""
    by_licence: dict[str, list[Source]] = {}
    for source in sources:
        by_licence.setdefault(source.said, []).append(source)
    found = []
    if len(by_licence) > 1:
        told = "; ".join(f"{licence}: {_names(group)}" for licence, group in by_licence.items())
        found.append(f"the sources' licences differ ({told})")
    if NONE_FOUND in by_licence:
        found.append(f"no licence was found for {_names(by_licence[NONE_FOUND])}")
    for kind, pattern in _KINDS:
        meant = [source for source in sources if source.licence and pattern.search(source.licence)]
        if meant:
            found.append(f"{kind}: {', '.join(dict.fromkeys(s.said for s in meant))} ({_names(meant)})")
    return found


def _names(sources: Iterable[Source]) -> str:
    return ", ".join(name for source in sources for name in source.used_as)


def licence_of(record: SourceRecord, used_as: tuple[str, ...], checkpoint: Checkpoint) -> Source:
    """What a model's own files say, of a mixture's or of one that may come to it."""
    hub_id = record.spec if locate(record.spec, checkpoint.recipe_root) is None and _HUB_ID.match(record.spec) else None
    folder = checkpoint.source_folder(record)
    licence, name, link = _licence_in(front_matter(folder / "README.md"))
    said_by = "README.md"
    if licence is None:
        said_by, licence = _licence_file(folder)
    return Source(used_as, record.spec, hub_id, record.revision, licence, name, link, said_by)


def front_matter(readme: Path) -> dict[str, object]:
    """The YAML at the head of a README; empty when there is none that can be read."""
    try:
        text = read_text(readme, _LARGEST).removeprefix("\ufeff").replace("\r\n", "\n")
        matched = _FRONT_MATTER.match(text[:_LONGEST_MATTER])
        data = parse_yaml(matched[1], readme.name) if matched else None
    except UNREADABLE:
        data = None
    return data if isinstance(data, dict) else {}


def _strings(value: object) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(each for each in values if isinstance(each, str) and each))


def _licence_in(matter: dict[str, object]) -> tuple[str | None, str | None, str | None]:
    """Id, name and link. Several licences, and what is no id, are "other"."""
    said = _strings(matter.get("license"))
    name, link = (next(iter(_strings(matter.get(key))), None) for key in ("license_name", "license_link"))
    if not said or said == ("unknown",):
        return None, None, None
    if len(said) == 1 and _LICENCE_ID.match(said[0].lower()):
        return said[0].lower(), name, link
    return "other", name or " and ".join(said), link


def _licence_file(folder: Path) -> tuple[str, str | None]:
    """Name of the licence file, or that there is none, and the licence's id: which it is, its reader sees."""
    try:
        names = sorted(path.name for path in folder.iterdir() if re.match(r"(?i)(licen[cs]e|copying)", path.name))
    except OSError:
        return "the folder is missing", None
    return (names[0], "other") if names else ("neither README.md nor a licence file names one", None)
