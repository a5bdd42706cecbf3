"""Do two tokenizers of the same tokens cut text alike?"""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING

from modekit.sources.config import damaged_model

if TYPE_CHECKING:
    from modekit.sources.tokenizer import Readers, ReadTokens

_PAGE = (
    "The court held, on 12 May 1998, that section 3(b) doesn't apply; see Smith v. Jones, 410 U.S. 113 (1973).",
    "def  area(x_1, y):\n\t    return x_1 ** 2 - 0.5e-10*y  # TODO: camelCaseNames, HTTPServer\r\n\r\n",
    "  Ünïcödé ﬁne café e\u0301 ½ ² “quotes” … naïve İstanbul STRASSE straße   ",
    "漢字とひらがな 한국어 عربي हिन्दी ไทย Ελληνικά русский 𐍈 🙂👩‍👩‍👧 \u200b\u00a0x",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaa 1234567890 00012 ,,,,----==== <tag attr='1'/> a@b.example/c?d=e&f",
)
"""Text of many kinds: two tokenizers that cut it alike are taken to cut all text alike."""


def other_cuts(one: ReadTokens, other: ReadTokens, where: str, readers: Readers) -> list[str]:
    """Raise MismatchError where two tokenizer.json with the same tokens cut a page of text otherwise; SourceError for a file
    that the tokenizers library does not open. Notes where they differ around a text, or beside a special token, alone.
    """
    from tokenizers import Tokenizer

    whose = readers.whose
    special = sorted(one.added.keys() & other.added.keys())
    beside = {f"one {token} two{token}\n three": token for token in special}
    try:
        both = [Tokenizer.from_file(str(each.folder / "tokenizer.json")) for each in (one, other)]
        cuts = {text: [each.encode(text, add_special_tokens=False).tokens for each in both] for text in (*_PAGE, *beside)}
        around = [" ".join(each.encode(_PAGE[0]).tokens[:2]) for each in both]
    except Exception as error:  # the library raises Exception itself
        raise damaged_model("the tokenizer cannot be read", f"{where}: tokenizer.json", error) from None
    differing = {text: each for text, each in cuts.items() if each[0] != each[1]}
    for text, (mine, their) in differing.items():
        if text not in beside:
            first = next(place for place, (a, b) in enumerate(zip_longest(mine, their)) if a != b)
            found, expected = (" ".join(each[first : first + 6]) for each in (their, mine))
            raise readers.differ(
                f"has the same tokens as {whose} and cuts text otherwise",
                where,
                f"{text[:40]!r}: ... {found}",
                f"... {expected}",
            )
    said = [f"cuts text beside {beside[text][:60]!r} otherwise than {whose}" for text in [*differing][:1]]
    if around[0] != around[1]:
        said.append(f"puts other special tokens around a text ({around[1]} ...) than {whose} ({around[0]} ...)")
    return [f"{where}: its tokenizer {each}; the mixture has one of the two" for each in said]
