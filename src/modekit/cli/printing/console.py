"""Where the command line writes: results on the standard output, progress and errors beside it.

On a terminal lines are wrapped to its width. In a file or a pipe nothing is wrapped or coloured, so that a line is a line.
"""

from __future__ import annotations

from rich.console import Console


def console_for(*, stderr: bool = False) -> Console:
    """A console that wraps and colours on a terminal alone."""
    console = Console(stderr=stderr)
    console.soft_wrap = not console.is_terminal
    return console


def shows_bold(console: Console) -> bool:
    """Whether bold looks different from the rest; where it does not, a sign has to say what it would."""
    return console.color_system is not None


out = console_for()
err = console_for(stderr=True)
