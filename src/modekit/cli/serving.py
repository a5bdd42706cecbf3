"""Commands that let others use a mixture."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from modekit.cli.options import grouped
from modekit.cli.printing.console import out
from modekit.cli.progress import drawn_progress
from modekit.cli.shell import AsJson, Fsync, OutFolder, Trust, app, resolved
from modekit.engines.settings import EngineName, GgufSettings, Outtype, ServeSettings
from modekit.run import Run


@dataclass(frozen=True)
class ServeOptions:
    """By which engine, and where."""

    engine: Annotated[EngineName, typer.Option(help="auto takes the first that fits, and says why.")] = "auto"
    host: Annotated[str, typer.Option(help="Address to listen on; by default nobody but this machine is heard.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port; 0 takes any that is free.")] = 8000
    context: Annotated[int | None, typer.Option(min=64, help="Tokens of the longest conversation; default: the model's.")] = (
        None
    )
    parallel: Annotated[int, typer.Option(min=1, max=256, help="Conversations at once (llama, vllm).")] = 4
    outtype: Annotated[Outtype | None, typer.Option(help="How weights are stored (llama; default: as the checkpoint).")] = None
    pre_tokenizer: Annotated[str | None, typer.Option(help="llama.cpp's name of how text is cut into words (llama).")] = None
    accept: Annotated[bool, typer.Option("--accept", help="Take a file although it lost more than allowed (llama).")] = False
    fsync: Fsync = True
    trust_remote_code: Trust = False


@app.command()
@grouped
def serve(checkpoint: OutFolder, options: ServeOptions) -> None:
    """Serve a mixture by OpenAI's API in the engine that fits; MODEKIT_API_KEY in the environment is the key, if any."""
    from modekit.checkpoint.checkpoint import open_checkpoint
    from modekit.engines.serve import serving

    settings = ServeSettings(
        options.engine, options.host, options.port, options.context, options.parallel,
        GgufSettings(options.outtype, options.pre_tokenizer, options.accept),
    )  # fmt: skip
    opened = open_checkpoint(resolved(checkpoint))
    with ExitStack() as stack:
        with drawn_progress() as progress:
            run = Run(options.trust_remote_code, progress, options.fsync)
            served = stack.enter_context(serving(opened, settings, run=run))
        said = f": {served.engine} ({served.why}), model {opened.folder.name}; Ctrl-C ends it"
        out.print(Text.assemble((f"{served.address}/v1", "bold"), said))
        with suppress(KeyboardInterrupt):
            served.wait()


@dataclass(frozen=True)
class FrontOptions:
    """Whom the front passes requests to, and where it listens."""

    worker: Annotated[list[str], typer.Option(help="URL of a server with OpenAI's API; may be given several times.")]
    name: Annotated[
        list[str] | None, typer.Option(metavar="EXPERT=MODEL", help="What the workers call an expert, or base, where not so.")
    ] = None
    host: Annotated[str, typer.Option(help="Address to listen on; by default nobody but this machine is heard.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port; 0 takes any that is free.")] = 8000
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that an answer may take.")] = 600.0
    adapters: Annotated[
        Path | None, typer.Option(help="Folder as export writes it; workers load its adapters, and let go those taken out.")
    ] = None
    trust_remote_code: Trust = False


@app.command()
@grouped
def front(checkpoint: OutFolder, options: FrontOptions) -> None:
    """One address before servers that have the experts: model "auto" goes to the expert whose text a request is."""
    from modekit.checkpoint.checkpoint import open_checkpoint
    from modekit.engines.run_front import Address, FrontSettings, run_front

    adapters = None if options.adapters is None else resolved(options.adapters)
    settings = FrontSettings(workers=options.worker, names=options.name or [], timeout=options.timeout, adapters=adapters)
    opened = open_checkpoint(resolved(checkpoint))

    def listening(address: str) -> None:
        out.print(Text.assemble((f"{address}/v1", "bold"), ": model auto, or what the workers serve; Ctrl-C ends it"))

    run_front(opened, settings, Address(options.host, options.port), listening, run=Run(options.trust_remote_code))


@app.command()
def route(
    checkpoint: OutFolder,
    text: Annotated[str, typer.Argument(help="A text; - reads it from the standard input.")],
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Say whose text it is, by the mixture's router alone: no model is run."""
    from modekit.checkpoint.checkpoint import open_checkpoint
    from modekit.routing.text_router import TextRouter

    router = TextRouter(open_checkpoint(resolved(checkpoint)), run=Run(trust_remote_code))
    decision = router.decide(sys.stdin.read() if text == "-" else text)
    if as_json:
        sys.stdout.write(json.dumps(vars(decision), indent=2) + "\n")
        return
    shares = ", ".join(
        f"{name} {share:.0%}" for name, share in sorted(decision.probabilities.items(), key=lambda each: -each[1])
    )
    out.print(Text.assemble((decision.expert, "bold"), f": {shares} ({decision.tokens} tokens)"))
