"""The command that talks with a mixture in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich.style import Style
from rich.text import Text

from modekit.cli.inspection import tint
from modekit.cli.options import grouped
from modekit.cli.printing import err, out
from modekit.cli.progress import running
from modekit.cli.shell import OutFolder, app, checkpoint_in
from modekit.errors import ModekitError
from modekit.text.plain import decode

if TYPE_CHECKING:
    from modekit.checkpoint.checkpoint import Checkpoint
    from modekit.engines.chat import AnswerToken, Chat, ChatAnswer

_PROMPT = "> "


@dataclass(frozen=True)
class ChatOptions:
    """How a mixture is talked to."""

    system: Annotated[str | None, typer.Option(help="System prompt (default: the chat template's own).")] = None
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0, max=100, help="Softmax temperature; 0 takes the likeliest token (default: the model's own, else 0)."
        ),
    ] = None
    seed: Annotated[int | None, typer.Option(min=0, max=2**31, help="Random seed (default: a new one each time).")] = None
    max_tokens: Annotated[int, typer.Option(min=1, max=2**20, help="Longest answer in tokens.")] = 512
    context: Annotated[
        int | None, typer.Option(min=16, help="Longest conversation in tokens (default: the model's maximum, at most 8192).")
    ] = None


@app.command()
@grouped
def chat(checkpoint: OutFolder, options: ChatOptions) -> None:
    """Chat with a mixture; colours show which expert leads. Without a terminal, each line of the input is a question."""
    opened = checkpoint_in(checkpoint)
    with running() as run:
        from modekit.engines.chat import Chat, ChatSettings

        talk = Chat(opened, ChatSettings(**vars(options)), run=run)
    _introduce(talk, opened)
    with suppress(EOFError):
        for line in _lines():
            if line.strip():
                _answer(talk, opened, line)


def _introduce(talk: Chat, checkpoint: Checkpoint) -> None:
    legend = Text("  ").join(Text(f" {name} ", style=tint(place, 1.0)) for place, name in enumerate(checkpoint.names))
    err.print(Text.assemble((checkpoint.folder.name, "bold"), ": ", legend))
    if not talk.has_template:
        err.print(Text("The base model has no chat template: what you write is continued, not answered.", style="yellow"))
    if sys.stdin.isatty():
        err.print(Text("Ctrl-C stops an answer, Ctrl-D ends.", style="dim"))


def _lines() -> Iterator[str]:
    """What the user says; on a terminal with history, and Ctrl-C empties the line. Raises EOFError."""
    if not sys.stdin.isatty():
        yield from (decode(line, where="standard input").rstrip("\r\n") for line in sys.stdin.buffer)
        return
    with suppress(ImportError):  # where a system has it, `input` edits lines and remembers them
        import readline  # noqa: F401
    while True:
        try:
            yield input(_PROMPT)
        except KeyboardInterrupt:
            err.print()


def _answer(talk: Chat, checkpoint: Checkpoint, said: str) -> None:
    """Stream an answer. Raises TextError where nobody is there to ask again."""
    try:
        answer = talk.ask(said, _show)
    except ModekitError as error:
        if not sys.stdin.isatty():
            raise
        err.print(Text.assemble(("error:", "bold red"), f" {error}"), soft_wrap=True)
        return
    out.print()
    for note in _notes(answer, talk, checkpoint):
        err.print(Text(note, style="dim"))


def _show(token: AnswerToken) -> None:
    coloured = out.color_system is not None and not out.no_color and token.leader is not None and token.weights is not None
    style = tint(token.leader, max(token.weights)) if coloured and token.leader is not None and token.weights else Style()
    out.print(Text(token.text.expandtabs(4), style=style), end="", soft_wrap=True, highlight=False)


def _notes(answer: ChatAnswer, talk: Chat, checkpoint: Checkpoint) -> Iterator[str]:
    led = ", ".join(f"{checkpoint.names[expert]} {share:.0%}" for expert, share in answer.led_by().items())
    if led:
        yield f"[{led} of {len(answer.tokens)} tokens]"
    if answer.left_out:
        yield f"[the first {answer.left_out} messages no longer fit into {talk.context:,} tokens, and were left out]"
    if not answer.ended:
        yield f"[cut after {len(answer.tokens)} tokens]"
