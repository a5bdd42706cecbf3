"""Do two tokenizers with the same tokens cut text alike?"""

from __future__ import annotations

from pathlib import Path

from modekit.errors import MismatchError
from modekit.sources.config import damaged_model
from modekit.sources.tokenizer import Readers

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
        ours, theirs = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (base, expert))
        for text in _PAGE:
            cuts = [each.encode(text, add_special_tokens=False).tokens for each in (ours, theirs)]
            if cuts[0] != cuts[1]:
                first = next((place for place, pair in enumerate(zip(*cuts, strict=False)) if pair[0] != pair[1]), 0)
                raise MismatchError(
                    "the expert's tokenizer has the same tokens as the base model's and cuts text otherwise",
                    where=where,
                    found=f"{text[:40]!r}: ... {' '.join(cuts[1][first : first + 6])}",
                    expected=f"... {' '.join(cuts[0][first : first + 6])}",
                    remedy=Readers().remedy,
                )
        around = [" ".join(each.encode(_PAGE[0]).tokens[:2]) for each in (ours, theirs)]
    except MismatchError:
        raise
    except Exception as error:  # the library raises Exception itself
        raise damaged_model("the tokenizer cannot be read", f"{where}: tokenizer.json", error) from None
    other = (
        f"{where}: its tokenizer puts other special tokens around a text ({around[1]} ...) than the base's ({around[0]} ...)"
    )
    return [f"{other}, which the mixture has"] if around[0] != around[1] else []
