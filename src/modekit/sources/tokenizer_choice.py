"""Whose tokenizer a mixture has, and what goes with it; and do two tokenizers of the same tokens cut text alike?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from modekit.errors import MismatchError
from modekit.files.write import json_bytes
from modekit.sources.adapter import AdapterSource
from modekit.sources.config import Config, damaged_model
from modekit.sources.source import ModelSource
from modekit.sources.tokenizer import Readers, Tokens, chat_template, copied_files, read_beside

if TYPE_CHECKING:
    from modekit.sources.vocabulary import SharedTokens


_GENERATION, _TEMPLATE = "generation_config.json", "chat_template.jinja"


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
    def owner(self) -> str:
        """Whose files they are, for messages."""
        return f"those of {self.source.label}" if self.number else "the base model's"

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
    owner, read = sources[shared.largest], shared.read[shared.largest]
    if shared.are_same or read is None:
        return TokenizerChoice(sources[0])
    inside = {*read.tokens.values()}
    eos = tuple(dict.fromkeys(end for each in (owner, *sources) for end in _ends(each, read.tokens) if end in inside))
    said: int | list[int] = eos[0] if len(eos) == 1 else list(eos)
    names = ("bos_token_id", "pad_token_id", "eos_token_id") if not isinstance(owner, AdapterSource) else ()
    settings = {name: owner.config[name] for name in names if name in owner.config} | ({"eos_token_id": said} if eos else {})
    written: dict[str, bytes] = {}
    generation = next((found for each in (owner, sources[0]) if (found := read_beside(each.folder, _GENERATION))), None)
    if generation is not None and eos:
        written[_GENERATION] = json_bytes({**generation, "eos_token_id": said})
    teller = next((each for each in (owner, *sources) if chat_template(each.folder)), None)
    template = None if teller is None or teller is owner else chat_template(teller.folder)
    if template is not None:
        written[_TEMPLATE] = template.encode()
    whose = "no model has a chat template" if teller is None else f"the chat template is that of {teller.label}"
    notes = [f"the tokenizer is that of {owner.label}, and {whose}", *([f"a text ends at {shared.shown(eos)}"] if eos else [])]
    return TokenizerChoice(owner, shared.largest, eos, settings, written, tuple(notes))


def _ends(source: ModelSource, tokens: Tokens) -> Iterator[int]:
    """Ids of the tokens at which a model's texts end, by its tokenizer, its generation config and its config."""
    said = read_beside(source.folder, "tokenizer_config.json").get("eos_token")
    name = said.get("content") if isinstance(said, dict) else said
    if isinstance(name, str) and name in tokens:
        yield tokens[name]
    for config in (read_beside(source.folder, _GENERATION), {} if isinstance(source, AdapterSource) else source.config):
        found = config.get("eos_token_id")
        yield from (each for each in (found if isinstance(found, list) else [found]) if type(each) is int)


_PAGE = (
    "The court held, on 12 May 1998, that section 3(b) doesn't apply; see Smith v. Jones, 410 U.S. 113 (1973).",
    "def  area(x_1, y):\n\t    return x_1 ** 2 - 0.5e-10*y  # TODO: camelCaseNames, HTTPServer\r\n\r\n",
    "  Ünïcödé ﬁne café e\u0301 ½ ² “quotes” … naïve İstanbul STRASSE straße   ",
    "漢字とひらがな 한국어 عربي हिन्दी ไทย Ελληνικά русский 𐍈 🙂👩‍👩‍👧 \u200b\u00a0x",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaa 1234567890 00012 ,,,,----==== <tag attr='1'/> a@b.example/c?d=e&f",
)
"""Text of many kinds: two tokenizers that cut it alike are taken to cut all text alike."""


def other_cuts(base: Path, expert: Path, *, where: str) -> list[str]:
    """Raise MismatchError where two tokenizer.json with the same tokens cut a page of text otherwise; SourceError for a file
    that the tokenizers library does not open. A note where only the special tokens that they put around a text differ.
    """
    from tokenizers import Tokenizer

    try:
        both = [Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (base, expert)]
        cuts = [[each.encode(text, add_special_tokens=False).tokens for each in both] for text in _PAGE]
        around = [" ".join(each.encode(_PAGE[0]).tokens[:2]) for each in both]
    except Exception as error:  # the library raises Exception itself
        raise damaged_model("the tokenizer cannot be read", f"{where}: tokenizer.json", error) from None
    for text, (ours, theirs) in zip(_PAGE, cuts, strict=True):
        if ours != theirs:
            first = next((place for place, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), 0)
            raise MismatchError(
                "the expert's tokenizer has the same tokens as the base model's and cuts text otherwise",
                where=where,
                found=f"{text[:40]!r}: ... {' '.join(theirs[first : first + 6])}",
                expected=f"... {' '.join(ours[first : first + 6])}",
                remedy=Readers().remedy,
            )
    if around[0] == around[1]:
        return []
    other = (
        f"puts other special tokens around a text ({around[1]} ...) than the base's ({around[0]} ...), which the mixture has"
    )
    return [f"{where}: its tokenizer {other}"]
