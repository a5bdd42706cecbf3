"""Where the command line writes: results on the standard output, progress and errors beside it.

What is written comes from others as often as from here: names, labels, paths, messages. None of it is obeyed: a console knows
no markup (what has a style is `Text.assemble(("name", "bold"), ": rest")`), and writes control characters out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any
from unicodedata import category

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

_PLAIN = "\n\u00ad\u200c\u200d\u2060"


def visible(text: str) -> str:
    """Text without what a terminal would obey: control and format characters are written out. Ends of lines stay, and what
    scripts need: spaces of any kind, and what joins signs or keeps them apart.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _PLAIN or category(c) == "Zs" else _written_out(c) for c in text)


def _written_out(sign: str) -> str:
    return sign.encode("unicode_escape").decode()


class VerbatimConsole(Console):
    """A console on which text is text."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of what is drawn, all that is written among them; only rich's own may move the cursor."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


def console_for(*, stderr: bool = False, **settings: Any) -> Console:
    """A console that wraps and colours on a terminal alone."""
    console = VerbatimConsole(stderr=stderr, **settings)
    console.soft_wrap = not console.is_terminal
    return console


def shows_bold(console: Console) -> bool:
    """Whether bold looks different from the rest; where it does not, a sign has to say what it would."""
    return console.color_system is not None


def print_json(value: object) -> None:
    """On the standard output, as it is whatever a terminal is."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


out = console_for()
err = console_for(stderr=True)
