"""The command that shows what the routers do."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from modekit.cli.options import grouped
from modekit.cli.printing.inspection import print_inspection, print_trace
from modekit.cli.progress import drawn_progress
from modekit.cli.shell import AsJson, OutFolder, Trust, app, resolved
from modekit.errors import ModekitError
from modekit.run import Run
from modekit.text.amounts import SAMPLE_TOKENS


@dataclass(frozen=True)
class TextOptions:
    """A text to show in place of the tables."""

    text: Annotated[str | None, typer.Option(help="Show this text word by word; - reads standard input.")] = None
    text_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Show the text of this file word by word.")] = None
    chat: Annotated[bool, typer.Option("--chat", help="Read the text as a user message in the chat template.")] = False
    system: Annotated[str | None, typer.Option(help="System prompt (with --chat; default: the template's own).")] = None
    layer: Annotated[int | None, typer.Option(min=0, help="Only the routers of this layer (with a text).")] = None

    def given(self) -> list[str]:
        """Those that were given."""
        asked = {
            "--text": self.text,
            "--text-file": self.text_file,
            "--chat": self.chat or None,
            "--system": self.system,
            "--layer": self.layer,
        }
        return [option for option, value in asked.items() if value is not None]


@app.command()
@grouped
def inspect(
    checkpoint: OutFolder,
    shown: TextOptions,
    tokens: Annotated[int, typer.Option(min=64, help="Held-out tokens per domain.")] = SAMPLE_TOKENS,
    sequence_length: Annotated[int, typer.Option(min=8, help="Longest piece of a document or text, in tokens.")] = 512,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Show what the routers do: weights per domain, leave one expert out, similarity, top tokens; or with a text each word."""
    text, layer = shown.text, shown.layer
    from modekit.checkpoint.checkpoint import open_checkpoint
    from modekit.checkpoint.pairs import refuse_pairs
    from modekit.evaluation.inspection.inspect import inspect
    from modekit.evaluation.inspection.text import STDIN, Said, inspect_text, read_text
    from modekit.evaluation.results_folder import RESULTS_FOLDER

    if text is not None and shown.text_file is not None:
        raise ModekitError("two texts are given", where="--text, --text-file", remedy="give one")
    opened = open_checkpoint(resolved(checkpoint))
    for option in shown.given():
        refuse_pairs(
            opened,
            "a source and its target are shown together, and this asks for one text",
            option=option,
            remedy="leave it out: inspect.json and the report have pairs of the held-out text, token by token",
        )
    if shown.text_file is not None or text == STDIN:
        text = read_text(shown.text_file)
    if layer is not None and text is None:
        raise ModekitError("it has an effect with a text only", where="--layer", remedy="add --text, or leave it out")
    if shown.chat and text is None:
        raise ModekitError("there is nothing that the user says", where="--chat", remedy="add --text, or leave it out")
    if shown.system is not None and not shown.chat:
        raise ModekitError("it has an effect in a chat only", where="--system", remedy="add --chat, or leave it out")
    with drawn_progress() as progress:
        if text is None:
            data = inspect(
                opened,
                tokens_per_domain=tokens,
                sequence_length=sequence_length,
                run=Run(trust_remote_code, progress),
            )
        else:
            data = inspect_text(
                opened,
                Said(shown.system, text) if shown.chat else text,
                layer=layer,
                sequence_length=sequence_length,
                run=Run(trust_remote_code, progress),
            )
    if as_json:
        sys.stdout.write(json.dumps(data, indent=2) + "\n")
    elif text is None:
        print_inspection(checkpoint / RESULTS_FOLDER, data)
    else:
        print_trace(data)
