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
from modekit.cli.printing.console import err, out
from modekit.cli.progress import running
from modekit.cli.shell import OutFolder, app, checkpoint_in
from modekit.errors import ModekitError
from modekit.text.plain import decode

if TYPE_CHECKING:
    from modekit.checkpoint.checkpoint import Checkpoint
    from modekit.engines.chat import AnswerToken, Chat, ChatAnswer

_COMMANDS = "/why: words that decided; /expert NAME: always this expert (/expert: as the routers choose); /reset; /quit"
_PROMPT = "> "
_SHOWN = 3  # experts of /why
_LEAST = 0.005


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

        settings = ChatSettings(options.system, options.temperature, options.seed, options.max_tokens, options.context)
        talk = Chat(opened, settings, run=run)
    _introduce(talk, opened)
    with suppress(EOFError):
        for line in _lines():
            if line.startswith("/") and sys.stdin.isatty():
                if not _obey(talk, opened, line):
                    break
            elif line.strip():
                _answer(talk, opened, line)


def _introduce(talk: Chat, checkpoint: Checkpoint) -> None:
    legend = Text("  ").join(Text(f" {name} ", style=tint(place, 1.0)) for place, name in enumerate(checkpoint.names))
    err.print(Text.assemble((checkpoint.folder.name, "bold"), ": ", legend))
    if not talk.has_template:
        err.print(Text("The base model has no chat template: what you write is continued, not answered.", style="yellow"))
    if sys.stdin.isatty():
        err.print(Text(f"{_COMMANDS}. Ctrl-C stops an answer, Ctrl-D ends.", style="dim"))


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
    if answer.ended == "length":
        yield f"[cut after {len(answer.tokens)} tokens; --max-tokens allows more]"
    if answer.ended == "context":
        yield f"[cut: the context of {talk.context:,} tokens is full]"
    if answer.ended == "stopped":
        yield "[stopped]"


def _obey(talk: Chat, checkpoint: Checkpoint, line: str) -> bool:
    """Do what a line with a slash says; False where it ends the chat."""
    command, _, rest = line.strip().partition(" ")
    if command == "/quit":
        return False
    if command == "/reset":
        talk.reset()
    elif command == "/why":
        _print_why(talk)
    elif command == "/expert":
        _use_expert(talk, checkpoint, rest.strip())
    else:
        err.print(Text(_COMMANDS))
    return True


def _use_expert(talk: Chat, checkpoint: Checkpoint, name: str) -> None:
    if name and name not in checkpoint.names:
        err.print(Text(f"there is no expert {name}; there are {', '.join(checkpoint.names)}"))
        return
    talk.expert = checkpoint.names.index(name) if name else None


def _print_why(talk: Chat) -> None:
    found = talk.why()
    if talk.answer is None:
        out.print("Nothing was answered yet.")
    elif found is None:
        out.print("This router reads more than words, so no words can be named; modekit inspect OUT --text shows who leads.")
    else:
        ranked = sorted(found.weights.items(), key=lambda each: -each[1])[:_SHOWN]
        out.print(
            Text("The answer began with ").append(", ".join(f"{n} {w:.2f}" for n, w in ranked if w >= _LEAST), style="bold")
        )
        out.print("Words that spoke for each, in nats:")
        for name, _ in ranked:
            words = ", ".join(f"{word} {nats:+.2f}" for word, nats in found.words[name] if nats >= _LEAST) or "no word"
            out.print(Text.assemble((f"{name}: ", "bold"), words), highlight=False)
