"""Whose tokenizer a mixture has, and what goes with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modekit.files.read import UNREADABLE, read_json, read_text
from modekit.files.write import json_bytes
from modekit.sources.adapter import AdapterSource
from modekit.sources.config import Config, read_beside
from modekit.sources.source import ModelSource
from modekit.sources.tokenizer import GENERATION, SharedTokens, copied_files, ends_of

_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class TokenizerChoice:
    """Whose tokenizer a mixture has, and what goes with it.

    Attributes:
        source: whose files are copied.
        number: its place among the models, the base's being 0.
        eos: ids of the tokens at which a text may end; empty: as the base's config says.
        settings: what config.json says of special tokens.
        written: files that no model has like this -> their content.
        notes: what a user should know.
    """

    source: ModelSource
    number: int = 0
    eos: tuple[int, ...] = ()
    settings: Config = field(default_factory=dict)
    written: Mapping[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template."""
        return _TEMPLATE in self.written or bool(chat_template(self.source.folder))

    @property
    def copied_files(self) -> tuple[Path, ...]:
        """Of its files. Raises SourceError for a link out of the folder."""
        found = copied_files(self.source.folder, where=self.source.where)
        return tuple(file for file in found if file.name not in self.written)


def choose_tokenizer(sources: Sequence[ModelSource], shared: SharedTokens) -> TokenizerChoice:
    """The largest tokenizer, its chat template (or else the base's, or an expert's), and every token that ends a text."""
    owner = sources[shared.largest]
    if shared.are_same:
        return TokenizerChoice(sources[0])
    inside = {*shared.tokens.values()}
    eos = tuple(dict.fromkeys(end for each in (owner, *sources) for end in ends_of(each, shared.tokens) if end in inside))
    said: int | list[int] = eos[0] if len(eos) == 1 else list(eos)
    names = ("bos_token_id", "pad_token_id", "eos_token_id") if not isinstance(owner, AdapterSource) else ()
    settings = {name: owner.config[name] for name in names if name in owner.config} | ({"eos_token_id": said} if eos else {})
    written: dict[str, bytes] = {}
    generation = next((found for each in (owner, sources[0]) if (found := read_beside(each.folder, GENERATION))), None)
    if generation is not None and eos:
        written[GENERATION] = json_bytes({**generation, "eos_token_id": said})
    teller = next((each for each in (owner, *sources) if chat_template(each.folder)), None)
    template = None if teller is None or teller is owner else chat_template(teller.folder)
    if template is not None:
        written[_TEMPLATE] = template.encode()
    whose = "no model has a chat template" if teller is None else f"the chat template is that of {teller.label}"
    notes = [f"the tokenizer is that of {owner.label}, and {whose}", *([f"a text ends at {shared.shown(eos)}"] if eos else [])]
    return TokenizerChoice(owner, shared.largest, eos, settings, written, tuple(notes))


def chat_template(folder: Path) -> str | None:
    """By file, and of several the default; None without one, or where its file cannot be read."""
    try:
        if (folder / _TEMPLATE).exists():
            return read_text(folder / _TEMPLATE).strip()
        for file in ("chat_template.json", "tokenizer_config.json"):
            found: Any = read_json(folder / file).get("chat_template") if (folder / file).exists() else None
            for each in found if isinstance(found, list) else [{"name": "default", "template": found}]:
                if each["name"] == "default" and isinstance(each["template"], str):
                    return str(each["template"]).strip()
    except (*UNREADABLE, AttributeError, KeyError, TypeError):
        return None
    return None
