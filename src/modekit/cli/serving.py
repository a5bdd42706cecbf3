"""Commands that let others use a mixture."""

from __future__ import annotations

import signal
import sys
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Annotated

import typer

from modekit.cli.options import grouped
from modekit.cli.printing import print_done, print_json
from modekit.cli.progress import running
from modekit.cli.shell import OutFolder, app, checkpoint_in, common, refuse_without_effect
from modekit.engines.registry import ENGINES, EngineName, Outtype, ServeSettings
from modekit.errors import ModekitError


def _read_by(option: str) -> str:
    """The engines that read an option."""
    return ", ".join(name for name, engine in ENGINES.items() if option in engine.options)


@dataclass(frozen=True)
class ServeOptions:
    """By which engine, and where."""

    engine: Annotated[EngineName, typer.Option(help="Engine; auto takes the first that can serve the mixture.")] = "auto"
    host: Annotated[str, typer.Option(help="Address to listen on (default: this machine only).")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port to listen on; 0 takes a free one.")] = 8000
    no_key: Annotated[
        bool, typer.Option("--no-key", help="Serve other machines without a key (--host), if MODEKIT_API_KEY is not set.")
    ] = False
    context: Annotated[
        int | None, typer.Option(min=64, help="Longest conversation in tokens (default: the model's maximum, at most 8192).")
    ] = None
    parallel: Annotated[
        int | None,
        typer.Option(min=1, max=256, help=f"Conversations answered at once ({_read_by('parallel')}; default: 4)."),
    ] = None
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=1_024, help=f"CPU threads ({_read_by('threads')}; default: OMP_NUM_THREADS, or all cores)."),
    ] = None
    outtype: Annotated[
        Outtype | None, typer.Option(help=f"Type of the weights ({_read_by('outtype')}; default: as in the checkpoint).")
    ] = None


@app.command()
@grouped
def serve(checkpoint: OutFolder, options: ServeOptions) -> None:
    """Serve a mixture with OpenAI's API. Clients must send the key in MODEKIT_API_KEY, if it is set."""
    from modekit.engines.serve import choose_engine, serving

    opened = checkpoint_in(checkpoint)
    with running():  # it may look at transformers
        engine, _ = choose_engine(opened, options.engine)
    unread = sorted({option for each in ENGINES.values() for option in each.options} - ENGINES[engine].options)
    refuse_without_effect(
        f"an engine that reads it; {engine} serves this mixture",
        {f"--{name.replace('_', '-')}": getattr(options, name) or None for name in unread},
    )
    with ExitStack() as stack:
        with running() as run:
            served = stack.enter_context(serving(opened, ServeSettings(**vars(options)), run=run))
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
    from modekit.text.plain import decode

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
