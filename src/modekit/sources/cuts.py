"""Do two tokenizers of the same tokens cut text alike?"""

from __future__ import annotations

from pathlib import Path

from modekit.errors import MismatchError
from modekit.sources.config import damaged_model

_PAGE = (
    "The court held, on 12 May 1998, that section 3(b) doesn't apply; see Smith v. Jones, 410 U.S. 113 (1973).",
    "def  area(x_1, y):\n\t    return x_1 ** 2 - 0.5e-10*y  # TODO: camelCaseNames, HTTPServer\r\n\r\n",
    "  Ünïcödé ﬁne café e\u0301 ½ ² “quotes” … naïve İstanbul STRASSE straße   ",
    "漢字とひらがな 한국어 عربي हिन्दी ไทย Ελληνικά русский 𐍈 🙂👩‍👩‍👧 \u200b\u00a0x",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaa 1234567890 00012 ,,,,----==== <tag attr='1'/> a@b.example/c?d=e&f",
)
"""Text of many kinds: two tokenizers that cut it alike are taken to cut all text alike."""


def other_cuts(base: Path, expert: Path, *, where: str, remedy: str) -> list[str]:
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
                remedy=remedy,
            )
    if around[0] == around[1]:
        return []
    other = (
        f"puts other special tokens around a text ({around[1]} ...) than the base's ({around[0]} ...), which the mixture has"
    )
    return [f"{where}: its tokenizer {other}"]
