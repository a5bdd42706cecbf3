"""Commands that let others use a mixture, and the one that talks with it in the terminal."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Annotated

import typer
from rich.style import Style
from rich.text import Text

from modekit.cli.inspection import tint
from modekit.cli.options import grouped
from modekit.cli.printing import err, out, print_done, print_json
from modekit.cli.progress import running
from modekit.cli.shell import OutFolder, app, checkpoint_in, common, refuse_without_effect
from modekit.engines.registry import ChatSettings, ServeSettings
from modekit.errors import ModekitError
from modekit.text.plain import decode

if TYPE_CHECKING:
    from modekit.checkpoint.checkpoint import Checkpoint
    from modekit.engines.chat import AnswerToken, Chat, ChatAnswer

_PROMPT = "> "


@app.command()
@grouped
def serve(checkpoint: OutFolder, options: ServeSettings) -> None:
    """Serve a mixture with OpenAI's API. Clients must send the key in MODEKIT_API_KEY, if it is set."""
    from modekit.engines.serve import choose_engine, serving, without_effect

    opened = checkpoint_in(checkpoint)
    with running():  # it may look at transformers
        engine, _ = choose_engine(opened, options.engine)
    refuse_without_effect(f"an engine that reads it; {engine} serves this mixture", without_effect(options, engine))
    _warn_without_template(opened)
    with ExitStack() as stack:
        with running() as run:
            served = stack.enter_context(serving(opened, options, run=run))
        threads = "" if served.threads is None else f", {served.threads} thread{'s' if served.threads > 1 else ''}"
        said = f"{served.engine} ({served.why}){threads}, model {opened.folder.name}; Ctrl-C ends it"
        with suppress(KeyboardInterrupt):
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the engine ends well, too
            print_done(f"{served.address}/v1", said)
            served.wait()


@app.command()
def route(
    checkpoint: OutFolder,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The text; - reads standard input.")],
) -> None:
    """Name the expert that best matches a text. Only the mixture's router runs, no model."""
    opened, read = checkpoint_in(checkpoint), decode(sys.stdin.buffer.read(), where="standard input") if text == "-" else text
    if not read:
        raise ModekitError("the text is empty", where="TEXT", remedy="name a text, or - and give one on the standard input")
    with running() as run:
        from modekit.routing.text_router import TextRouter

        decision = TextRouter(opened, run=run).decide(read)
    if common().json:
        print_json(vars(decision))
        return
    shares = ", ".join(
        f"{name} {share:.0%}" for name, share in sorted(decision.probabilities.items(), key=lambda each: -each[1])
    )
    print_done(decision.expert, f"{shares} ({decision.tokens} tokens)")


@app.command()
@grouped
def chat(checkpoint: OutFolder, options: ChatSettings) -> None:
    """Chat with a mixture; colours show which expert leads. Without a terminal, each line of the input is a question."""
    opened = checkpoint_in(checkpoint)
    with running() as run:
        from modekit.engines.chat import Chat

        talk = Chat(opened, options, run=run)
    _introduce(talk, opened)
    with suppress(EOFError):
        for line in _lines():
            if line.strip():
                _answer(talk, opened, line)


def _warn_without_template(checkpoint: Checkpoint) -> None:
    from modekit.sources.tokenizer_choice import chat_template

    if chat_template(checkpoint.folder) is None:
        err.print(Text("The base model has no chat template: what you write is continued, not answered.", style="yellow"))


def _introduce(talk: Chat, checkpoint: Checkpoint) -> None:
    legend = Text("  ").join(Text(f" {name} ", style=tint(place, 1.0)) for place, name in enumerate(checkpoint.names))
    err.print(Text.assemble((checkpoint.folder.name, "bold"), ": ", legend))
    _warn_without_template(checkpoint)
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
    style = Style()
    if out.color_system is not None and not out.no_color and token.leader is not None and token.weights is not None:
        style = tint(token.leader, max(token.weights))
    out.print(Text(token.text.expandtabs(4), style=style), end="", soft_wrap=True, highlight=False)


def _notes(answer: ChatAnswer, talk: Chat, checkpoint: Checkpoint) -> Iterator[str]:
    led = ", ".join(f"{checkpoint.names[expert]} {share:.0%}" for expert, share in answer.led_by().items())
    if led:
        yield f"[{led} of {len(answer.tokens)} tokens]"
    if answer.left_out:
        yield f"[the first {answer.left_out} messages no longer fit into {talk.context:,} tokens, and were left out]"
    if not answer.ended:
        yield f"[cut after {len(answer.tokens)} tokens]"
