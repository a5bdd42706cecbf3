"""Commands that let others use a mixture."""

from __future__ import annotations

import sys
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from modekit.cli.options import grouped
from modekit.cli.printing.console import out, print_json
from modekit.cli.progress import drawn_progress
from modekit.cli.shell import AsJson, Fsync, OutFolder, Trust, app, checkpoint_in, refuse_without_effect, resolved
from modekit.engines.registry import ENGINES, EngineName, GgufSettings, Outtype, ServeSettings
from modekit.run import Run

if TYPE_CHECKING:
    from modekit.checkpoint.checkpoint import Checkpoint

_Host = Annotated[str, typer.Option(help="Address to listen on (default: this machine only).")]
_Port = Annotated[int, typer.Option(min=0, max=65_535, help="Port to listen on; 0 takes a free one.")]
_NoKey = Annotated[
    bool, typer.Option("--no-key", help="Serve other machines without a key (--host), if MODEKIT_API_KEY is not set.")
]


def _read_by(option: str) -> str:
    """The engines that read an option."""
    return ", ".join(name for name, engine in ENGINES.items() if option in engine.options)


@dataclass(frozen=True)
class ServeOptions:
    """By which engine, and where."""

    engine: Annotated[EngineName, typer.Option(help="Engine; auto takes the first that can serve the mixture.")] = "auto"
    host: _Host = "127.0.0.1"
    port: _Port = 8000
    no_key: _NoKey = False
    context: Annotated[
        int | None, typer.Option(min=64, help="Longest conversation in tokens (default: the model's maximum).")
    ] = None
    parallel: Annotated[
        int | None,
        typer.Option(min=1, max=256, help=f"Conversations answered at once ({_read_by('parallel')}; default: 4)."),
    ] = None
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, max=1_024, help=f"CPU threads ({_read_by('threads')}; default: OMP_NUM_THREADS, or the idle cores)."
        ),
    ] = None
    outtype: Annotated[
        Outtype | None, typer.Option(help=f"Type of the weights ({_read_by('outtype')}; default: as in the checkpoint).")
    ] = None
    pre_tokenizer: Annotated[
        str | None,
        typer.Option(help=f"llama.cpp's name for the pre-tokenizer ({_read_by('pre_tokenizer')}; default: detected)."),
    ] = None
    accept: Annotated[
        bool, typer.Option("--accept", help=f"Serve a file that lost more than allowed ({_read_by('accept')}).")
    ] = False
    fsync: Fsync = True
    trust_remote_code: Trust = False


@app.command()
@grouped
def serve(checkpoint: OutFolder, options: ServeOptions) -> None:
    """Serve a mixture with OpenAI's API. Clients must send the key in MODEKIT_API_KEY, if it is set."""
    from modekit.engines.serve import choose_engine

    opened = checkpoint_in(checkpoint)
    engine, _ = choose_engine(opened, options.engine)
    unread = sorted({option for each in ENGINES.values() for option in each.options} - ENGINES[engine].options)
    refuse_without_effect(
        f"an engine that reads it; {engine} serves this mixture",
        {f"--{name.replace('_', '-')}": getattr(options, name) or None for name in unread},
    )
    settings = ServeSettings(
        options.engine,
        options.host,
        options.port,
        options.context,
        options.parallel,
        options.threads,
        options.no_key,
        GgufSettings(options.outtype, options.pre_tokenizer, options.accept),
    )
    serve_until_stopped(opened, settings, Run(options.trust_remote_code, sync=options.fsync))


def serve_until_stopped(checkpoint: Checkpoint, settings: ServeSettings, run: Run) -> None:
    """Start the engine, with its progress drawn, say where it listens, and serve until Ctrl-C."""
    from modekit.engines.serve import serving

    with ExitStack() as stack:
        with drawn_progress() as progress:
            served = stack.enter_context(serving(checkpoint, settings, run=replace(run, progress=progress)))
        threads = "" if served.threads is None else f", {served.threads} thread{'s' if served.threads > 1 else ''}"
        said = f": {served.engine} ({served.why}){threads}, model {checkpoint.folder.name}; Ctrl-C ends it"
        with suppress(KeyboardInterrupt):
            out.print(Text.assemble((f"{served.address}/v1", "bold"), said))
            served.supervisor.wait()


@dataclass(frozen=True)
class FrontOptions:
    """Whom the front passes requests to, and where it listens."""

    worker: Annotated[list[str], typer.Option(help="URL of a server with OpenAI's API; repeat it for several.")]
    name: Annotated[
        list[str] | None,
        typer.Option(metavar="EXPERT=MODEL", help="Model name a worker uses for an expert or the base, if different."),
    ] = None
    host: _Host = "127.0.0.1"
    port: _Port = 8000
    no_key: _NoKey = False
    timeout: Annotated[float, typer.Option(min=1, help="Longest time for an answer in seconds.")] = 600.0
    adapters: Annotated[
        Path | None, typer.Option(help="Folder that export wrote; workers load its adapters and unload removed ones.")
    ] = None
    trust_remote_code: Trust = False


@app.command()
@grouped
def front(checkpoint: OutFolder, options: FrontOptions) -> None:
    """Run a gateway; requests for "auto" go to the expert that best matches their text."""
    from modekit.engines.run_front import FrontSettings, run_front

    adapters = None if options.adapters is None else resolved(options.adapters)
    settings = FrontSettings(
        workers=options.worker, names=options.name or [], timeout=options.timeout, adapters=adapters, no_key=options.no_key
    )
    opened = checkpoint_in(checkpoint)

    def listening(address: str) -> None:
        out.print(Text.assemble((f"{address}/v1", "bold"), ": model auto, or what the workers serve; Ctrl-C ends it"))

    run_front(opened, settings, options.host, options.port, listening, run=Run(options.trust_remote_code))


@app.command()
def route(
    checkpoint: OutFolder,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The text; - reads standard input.")],
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Name the expert that best matches a text. Only the mixture's router runs, no model."""
    from modekit.text.plain import decode

    opened, read = checkpoint_in(checkpoint), decode(sys.stdin.buffer.read(), where="standard input") if text == "-" else text
    with drawn_progress():
        from modekit.routing.text_router import TextRouter

        decision = TextRouter(opened, run=Run(trust_remote_code)).decide(read)
    if as_json:
        print_json(vars(decision))
        return
    shares = ", ".join(
        f"{name} {share:.0%}" for name, share in sorted(decision.probabilities.items(), key=lambda each: -each[1])
    )
    out.print(Text.assemble((decision.expert, "bold"), f": {shares} ({decision.tokens} tokens)"))
